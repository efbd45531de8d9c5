"""The processes of one command, as torchrun and ``accelerate launch`` start them.

torch is imported only if there are several.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from video_opd.errors import ErrorOfFirst, UserError
from video_opd.types import Sample

T = TypeVar("T")

# Processes wait for each other for as long as a stage takes; torch's own limit is some ten minutes.
LONGEST_WAIT = timedelta(days=30)
LOOK_EVERY_S = 0.2  # at the launcher


def launched_count() -> int:
    """The number of processes that a launcher started, which need not be connected yet; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process, number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> Processes:
        """The processes that ``RANK`` and ``WORLD_SIZE`` name. Several are connected by gloo.

        A command that runs on the first process alone must not call this: it would wait for the others.
        """
        rank, count = int(os.environ.get("RANK", 0)), launched_count()
        follow_launcher()
        if count > 1:
            from torch import distributed

            if not distributed.is_initialized():
                distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        return cls(rank=rank, count=count)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """The rows of every ``count``-th video, video by video. Each row belongs to exactly one process."""
        return [sample for rows in by_video(samples)[self.rank :: self.count] for sample in rows]

    def wait(self) -> None:
        """Waits until all processes are here. Raises :class:`UserError` if one of them has stopped."""
        if self.count > 1:
            from torch import distributed

            collective(distributed.barrier)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Raises :class:`UserError` as :meth:`wait` does."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        collective(lambda: distributed.all_gather_object(values, value))
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which the first process does while the others wait; all must call this.

        An error of ``work`` is raised in the first process, and as :class:`ErrorOfFirst` in the others, which
        would wait for ever otherwise. The result must be picklable. Raises :class:`UserError` if the first
        process has stopped.
        """
        if self.count == 1:
            return work()
        from torch import distributed

        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                outcome[0] = work()
            except Exception as caught:
                error = caught
                outcome[1] = str(caught), isinstance(caught, UserError)
        collective(lambda: distributed.broadcast_object_list(outcome))
        if error is not None:
            raise error
        if outcome[1] is not None:
            message, wrong_input = outcome[1]
            raise ErrorOfFirst(message, wrong_input=wrong_input)
        result: T = outcome[0]
        return result


def collective(call: Callable[[], object]) -> None:
    """Calls what all processes call together. Raises :class:`UserError` if one of them has stopped."""
    try:
        call()
    except RuntimeError as error:
        raise UserError(
            f"another process stopped ({str(error).splitlines()[0]}); what was finished is kept: look at "
            "its message, then repeat the command, with as many processes as you like"
        ) from error


def follow_launcher() -> None:
    """Ends this process when the torchrun or ``accelerate launch`` that started it is gone.

    Launchers end their workers before they end themselves, but one that is killed cannot: its workers would
    go on, beside those of the next start. Other parents, such as a shell, may leave before their children.
    """
    if _Follower.started or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _Follower.started = True
    threading.Thread(target=_Follower.follow, args=(os.getppid(),), daemon=True).start()


class _Follower:
    started = False

    @staticmethod
    def follow(launcher: int) -> None:
        if _launcher_was_gone():
            os._exit(1)
        while os.getppid() == launcher:
            time.sleep(LOOK_EVERY_S)
        os._exit(1)


def _launcher_was_gone() -> bool:
    """Whether the launcher ended before this process came to look at its parent: then its store is closed."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=60).close()
    except ConnectionRefusedError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False


def by_video(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The rows of each video; videos are in the order of their first rows."""
    rows_of: dict[str, list[Sample]] = {}
    for sample in samples:
        rows_of.setdefault(str(sample.video), []).append(sample)
    return list(rows_of.values())
