"""What every part of the check does alike: its arguments, its rows, its file."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Report:
    """The rows of a part; the file is written with every row, so that a kill loses nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.record: dict[str, Any] = {"summary": "", "rows": []}

    def note(self, **fields: Any) -> None:
        """Figures of the part as a whole; ``summary`` is what its row in the table says."""
        self.record.update(fields)
        self._write()

    def add(self, what: str, figure: str, ok: bool | None = None, **numbers: Any) -> None:
        """A row: ``figure`` is for the table, ``numbers`` for the file; ``ok`` None: nothing is demanded."""
        print(f"{what}: {figure}{'' if ok is None or ok else ' FAILED'}")
        self.record["rows"].append({"what": what, "figure": figure, "ok": ok, **numbers})
        self._write()

    def compare(self, what: str, difference: float, tolerance: float) -> None:
        """A row that fails where ``difference`` is above ``tolerance``, or no number."""
        ok = math.isfinite(difference) and difference <= tolerance
        self.add(what, f"{difference:.1e} of {tolerance:.0e}", ok, difference=difference, tolerance=tolerance)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Runs ``work``; an error is a row that failed, and the part goes on."""
        try:
            work()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.add(what, f"{type(error).__name__}: {lines[0][:200]}".replace("|", "/"), ok=False)

    @property
    def failed(self) -> list[str]:
        return [row["what"] for row in self.record["rows"] if row["ok"] is False]

    def _write(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        os.replace(part, self.file)


def run(part: Callable[[Report, bool], None], description: str | None) -> int:
    """The ``main`` of a part: 1 where a row failed. ``part`` is given its report, and whether to be tiny."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the file of the part's rows")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    arguments = parser.parse_args()
    report = Report(arguments.out)
    part(report, arguments.tiny)
    return int(bool(report.failed))
