"""The processes of one command, as torchrun and ``accelerate launch`` start them.

torch is imported only if there are several.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from video_opd.errors import UserError
from video_opd.types import Sample

# Processes wait for each other for as long as a stage takes; torch's own limit is some ten minutes.
LONGEST_WAIT = timedelta(days=30)


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
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
        if self.count == 1:
            return
        from torch import distributed

        try:
            distributed.barrier()
        except RuntimeError as error:
            raise UserError(
                f"another process stopped ({str(error).splitlines()[0]}); what was finished is kept: look at "
                "its message, then repeat the command, with as many processes as you like"
            ) from error


def by_video(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The rows of each video; videos are in the order of their first rows."""
    rows_of: dict[str, list[Sample]] = {}
    for sample in samples:
        rows_of.setdefault(str(sample.video), []).append(sample)
    return list(rows_of.values())
