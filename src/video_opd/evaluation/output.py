"""The output of ``predict`` and ``score``, which one process appends to or several. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.evaluation.batching import Batch, MakeLoader, blocks_of_batches
from video_opd.evaluation.resume import (
    merge_process_files,
    open_output,
    process_file_path,
    read_rows,
    write_provenance,
)
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

    A ``repeatable`` output, which a single process writes, ends with the same bytes whether it was killed on
    the way or not. The rows that a kill leaves of a block (:mod:`video_opd.evaluation.batching`) would
    otherwise stay, and the block's other rows would be batched and padded differently. So it is sealed at the
    end of each block only (:meth:`end_block`), and whoever opens it again first cuts it to what was sealed.
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
        assert not repeatable or self.processes.count == 1, "the blocks of several processes differ"
        single = self.processes.count == 1
        self._mine = self.path if single else process_file_path(out, self.processes.rank)
        self._provenance, self._repeatable = provenance, repeatable
        # No process may append before the files of the last run are merged.
        self.rows = self.processes.on_first(
            lambda: open_output(out, provenance, overwrite=overwrite, repeatable=repeatable)
        )
        self.ids = set(self.rows)
        self._sealer = Sealer(self.path)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        append_jsonl(self._mine, rows)
        self.ids.update(row["id"] for row in rows)
        if not self._repeatable:
            self._seal()

    def end_block(self) -> None:
        """Marks the end of a block: a kill leaves the rows so far. It does nothing if not ``repeatable``."""
        if self._repeatable:
            self._seal()

    def _seal(self) -> None:
        if self.processes.count == 1:
            write_provenance(self.path, self._provenance, self._sealer.seal())

    def finish(self, samples: Sequence[Sample]) -> None:
        """Leaves every row in ``out``, for every process; rows of several in the order of ``samples``."""
        if self.processes.count == 1:
            append_jsonl(self.path, [])  # an output without rows is a file, too
            return
        self.processes.wait()
        order = [sample.id for sample in samples]
        self.processes.on_first(lambda: merge_process_files(self.path, order, self._provenance))
        self.ids = set(read_rows(self.path))


def append_batches(
    output: Output,
    samples: Sequence[Sample],
    make_loader: MakeLoader,
    batch_size: int,
    make_rows: Callable[[Batch], Sequence[Mapping[str, Any]]],
    title: str,
) -> None:
    """Loads this process's share of ``samples`` in batches and appends the rows that ``make_rows`` gives.

    ``title`` names the work on the progress bar.
    """
    mine = output.processes.share(samples)
    with task(title, len(mine)) as bar:
        for block in blocks_of_batches(make_loader(mine) if mine else (), batch_size):
            for batch in block:
                output.append(make_rows(batch))
                bar.advance(len(batch))
            output.end_block()
