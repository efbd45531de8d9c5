"""The output of ``predict`` and ``score``, which one process appends to or several. No torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.evaluation.batching import Batch, MakeLoader, blocks_of_batches
from video_opd.evaluation.resume import (
    block_size,
    merge_process_files,
    open_output,
    process_file_path,
    read_rows,
    write_provenance,
)
from video_opd.files import write_text
from video_opd.jsonl import append_jsonl
from video_opd.processes import Processes
from video_opd.progress import task
from video_opd.seals import Sealer
from video_opd.types import Sample


class Output:
    """Rows that are appended as soon as they are finished; a kill costs only the unfinished ones.

    A single process appends to ``out`` itself. Each of several processes appends to its own process file
    beside ``out``, and the first process merges these at the end. Process files that a kill
    left are merged when ``out`` is next opened, by any number of processes. Raises :class:`UserError` as
    :func:`open_output` does.

    ``OUT.meta.json`` holds the seal of the rows, which is renewed after each append of a single process and
    after the merge. Whoever opens ``out`` again sees whether a row has changed or is lost.

    A ``repeatable`` output ends with the same bytes whether it was killed on the way or not, if the number of
    processes stays the same. The rows that a kill leaves of a block (:mod:`video_opd.evaluation.batching`)
    would otherwise stay, and the block's other rows would be batched and padded differently. So it is sealed
    at the end of each block only (:meth:`end_block`), and whoever opens it again first cuts it to what was
    sealed. A process file has no seal: its size at the end of a block is in a file beside it
    (``OUT.window-1``).
    """

    def __init__(
        self,
        out: str | Path,
        provenance: Mapping[str, Any],
        *,
        overwrite: bool = False,
        repeatable: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.path = Path(out)
        self.processes = processes if processes is not None else Processes()
        single, rank = self.processes.count == 1, self.processes.rank
        self._mine = self.path if single else process_file_path(out, rank)
        self._provenance, self._repeatable = provenance, repeatable

        def open_again() -> dict[str, dict[str, Any]]:
            _settle_process_files(self.path)
            return open_output(out, provenance, overwrite=overwrite, repeatable=repeatable)

        # No process may append before the files of the last run are merged.
        self.rows = self.processes.on_first(open_again)
        self.ids = set(self.rows)
        self._sealer = Sealer(self.path)
        self._window = None if single or not repeatable else _window_path(self.path, rank)
        if self._window is not None:
            self.end_block()

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples without a row that this process is to do, video by video.

        Those of a repeatable output do not depend on the rows that are there, so the batches after a kill
        are those without one.
        """
        if self._repeatable or self.processes.count == 1:
            return [sample for sample in self.processes.share(samples) if sample.id not in self.ids]
        return self.processes.share([sample for sample in samples if sample.id not in self.ids])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        append_jsonl(self._mine, rows)
        self.ids.update(row["id"] for row in rows)
        if not self._repeatable:
            self._seal()

    def end_block(self) -> None:
        """Marks the end of a block: a kill leaves the rows so far. It does nothing if not ``repeatable``."""
        if self._window is not None:
            size = self._mine.stat().st_size if self._mine.exists() else 0
            write_text(self._window, str(size))
        elif self._repeatable:
            self._seal()

    def _seal(self) -> None:
        if self.processes.count == 1:
            write_provenance(self.path, self._provenance, self._sealer.seal())

    def finish(self, samples: Sequence[Sample]) -> None:
        """Leaves every row in ``out``, in the order of ``samples``, for every process."""
        self.processes.wait()
        self.processes.on_first(lambda: self._merge([sample.id for sample in samples]))
        if self.processes.count > 1:
            self.ids = set(read_rows(self.path))

    def _merge(self, order: Sequence[str]) -> None:
        append_jsonl(self.path, [])  # an output without rows is a file, too
        merge_process_files(self.path, order, self._provenance)
        _settle_process_files(self.path)


def append_batches(
    output: Output,
    samples: Sequence[Sample],
    make_loader: MakeLoader,
    batch_size: int,
    make_rows: Callable[[Batch], Sequence[Mapping[str, Any]]],
    title: str,
) -> None:
    """Loads this process's share of ``samples`` in batches and appends the rows that ``make_rows`` gives.

    Samples that have a row are left out. ``title`` names the work on the progress bar.
    """
    mine = output.share(samples)
    with task(title, len(mine)) as bar:
        append_blocks(output, mine, make_loader, batch_size, make_rows, bar.advance)


def append_blocks(
    output: Output,
    mine: Sequence[Sample],
    make_loader: MakeLoader,
    batch_size: int,
    make_rows: Callable[[Batch], Sequence[Mapping[str, Any]]],
    advance: Callable[[int], object],
) -> None:
    """The same for a share that was taken before; ``advance`` is told the number of rows of each batch."""
    for block in blocks_of_batches(make_loader(mine) if mine else (), batch_size):
        for batch in block:
            output.append(make_rows(batch))
            advance(len(batch))
        output.end_block()


def _window_path(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.window-{rank}")


def _settle_process_files(out: Path) -> None:
    """Cuts the process files of ``out`` to the ends of their blocks, where these are known."""
    for window in out.parent.glob(f"{glob.escape(out.name)}.window-*"):
        rank, size = window.name.rpartition("-")[2], block_size(window)
        file = process_file_path(out, int(rank)) if rank.isdecimal() else None
        if file is not None and size is not None and file.is_file():
            os.truncate(file, min(size, file.stat().st_size))
        window.unlink()
