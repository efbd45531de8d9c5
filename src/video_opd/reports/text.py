"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from video_opd.reports.runs import METRICS, Run
from video_opd.reports.story import interval


def metrics_lines(record: Mapping[str, Any]) -> list[str]:
    """A metrics record (``evaluate --json``) for people."""
    intervals = record.get("ci95") or {}
    rows = [["metric", "value", "95% interval"]]
    for name in METRICS:
        bounds = intervals.get(name)
        rows.append([name, f"{record[name]:.2f}", f"{bounds[0]:.2f} – {bounds[1]:.2f}" if bounds else "–"])
    lines = columns(rows)
    protocol = (record.get("protocol") or {}).get("name", "paper")
    lines.append(
        f"{record['n']} rows, {record['unparsed']} unparsed, {record['missing']} missing; {protocol} protocol"
    )
    if constant := record.get("best_constant"):
        start, end = constant["start_fraction"], constant["end_fraction"]
        lines.append(
            f"best constant answer ({start:.0%} to {end:.0%} of the duration): mIoU {constant['mIoU']:.2f}"
        )
    if swap := record.get("query_swap"):
        lines.append(
            f"query swap: {swap['share']:.0f}% of {swap['comparisons']} answers are nearer their own event "
            "than the other query's (chance: 50%)"
        )
    return lines


def before_after(run: Run) -> list[str]:
    """mIoU with its 95% interval, a row a test set, a column a model; then the best constant answer."""
    rows = [["mIoU [95%]", *run.models, "best constant"]]
    for testset in run.testsets:
        found = [run.evaluation(model, testset) for model in run.models]
        constants = [e.best_constant for e in found if e is not None and e.best_constant is not None]
        constant = f"{constants[0]:.1f}" if constants else "–"
        rows.append([testset, *("–" if e is None else interval(e) for e in found), constant])
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
