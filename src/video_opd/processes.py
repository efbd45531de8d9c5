"""The processes of one command, as torchrun and ``accelerate launch`` start them. torch only for several."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from video_opd.errors import UserError
from video_opd.types import Sample

# The first to finish waits for the last; a collective's own patience is some ten minutes.
LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process, number ``rank`` of ``count``."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> Processes:
        """As ``RANK`` and ``WORLD_SIZE`` say. Several are connected, by gloo: all they do is wait for others.

        A command that only the first process runs must not ask: it would wait for the others.
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
        """Every ``count``-th video's rows, video by video: every row is some process's, and one's alone."""
        return [sample for rows in by_video(samples)[self.rank :: self.count] for sample in rows]

    def wait(self) -> None:
        """Until all are here. Raises :class:`UserError` where one of them has stopped."""
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
    """The rows of each video, videos in the order of their first rows."""
    rows_of: dict[str, list[Sample]] = {}
    for sample in samples:
        rows_of.setdefault(str(sample.video), []).append(sample)
    return list(rows_of.values())
