"""The code that all sections of the check share: arguments, rows and file."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """The rows of a section. The file is written again with every row, so that a kill loses nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.record: dict[str, Any] = {"summary": "", "rows": []}

    def note(self, **fields: Any) -> None:
        """Adds figures of the section as a whole; ``summary`` is the text of its row in the table."""
        self.record.update(fields)
        self._write()

    def add(self, what: str, figure: str, ok: bool | None = None, **numbers: Any) -> None:
        """Adds a row: ``figure`` for the table, ``numbers`` for the file; ``ok`` None: no requirement."""
        print(f"{what}: {figure}{'' if ok is None or ok else ' FAILED'}")
        self.record["rows"].append({"what": what, "figure": figure, "ok": ok, **numbers})
        self._write()

    def compare(self, what: str, difference: float, tolerance: float) -> None:
        """Adds a row that fails if ``difference`` is above ``tolerance``, or not a number."""
        ok = math.isfinite(difference) and difference <= tolerance
        self.add(what, f"{difference:.1e} of {tolerance:.0e}", ok, difference=difference, tolerance=tolerance)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Runs ``work``. An error becomes a row that failed, and the section goes on."""
        try:
            work()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.add(what, f"{type(error).__name__}: {lines[0][:200]}".replace("|", "/"), ok=False)

    @property
    def failed(self) -> list[str]:
        return [row["what"] for row in self.record["rows"] if row["ok"] is False]

    def _write(self) -> None:
        unfinished = self.file.with_suffix(".part")
        unfinished.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        os.replace(unfinished, self.file)


def add_torchao() -> None:
    """Makes the torchao that was carried importable from now on: transformers must have been imported without
    it, because it would import it in every process, which takes seconds."""
    place = os.environ.get("TORCHAO", "")
    if os.path.isdir(place):
        sys.path.append(place)


def run(section: Callable[[Report, bool], None], description: str | None) -> int:
    """The ``main`` of a section: calls ``section(report, tiny)`` and returns 1 if a row failed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the file of the section's rows")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    arguments = parser.parse_args()
    report = Report(arguments.out)
    section(report, arguments.tiny)
    return int(bool(report.failed))
