"""One output of one process or of several: where each writes, and how it becomes one file. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.evaluation.resume import merge_parts, open_output, part_path, read_rows
from video_opd.jsonl import append_jsonl
from video_opd.processes import Processes
from video_opd.types import Sample


class Output:
    """Rows that are appended as they are finished; a kill costs the unfinished ones only.

    One process appends to ``out`` itself. Of several, each appends to its own part beside it, and the first
    puts them together at the end. Parts that a kill left are put together when ``out`` is next opened, by any
    number of processes. Raises :class:`UserError` as :func:`open_output` does.
    """

    def __init__(
        self,
        out: str | Path,
        made_by: Mapping[str, Any],
        *,
        overwrite: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self.path = Path(out)
        self.processes = processes if processes is not None else Processes()
        self._mine = self.path if self.processes.count == 1 else part_path(out, self.processes.rank)
        if self.processes.first:
            self.rows = open_output(out, made_by, overwrite=overwrite)
        self.processes.wait()  # no part of this run before those of the last one are in
        if not self.processes.first:
            self.rows = read_rows(out)
        self.ids = set(self.rows)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        append_jsonl(self._mine, rows)
        self.ids.update(row["id"] for row in rows)

    def finish(self, samples: Sequence[Sample]) -> None:
        """All that could be made is in ``out``, for every process; of several in the order of ``samples``."""
        if self.processes.count == 1:
            append_jsonl(self.path, [])  # no rows is a file, too
            return
        self.processes.wait()
        if self.processes.first:
            merge_parts(self.path, [sample.id for sample in samples])
        self.processes.wait()
        self.ids = set(read_rows(self.path))
