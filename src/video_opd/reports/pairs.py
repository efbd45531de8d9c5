"""Differences between two models on the same rows, with intervals over videos that both are drawn on.

The bootstrap is that of ``video-opd evaluate --baseline``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from video_opd.evaluation.metrics import Difference, paired_difference
from video_opd.reports.records import METRICS
from video_opd.reports.runs import Run
from video_opd.types import Sample

T = TypeVar("T")

NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, kw_only=True)
class Change:
    """How much the metrics rose from one model to another, in points, on ``n`` annotated rows of both.

    A row without a prediction counts as 0; ``missing`` are their numbers before and after. ``protocols`` are
    those of the two records, with what deviates from them (:attr:`Evaluation.protocol`).
    """

    n: int
    of: dict[str, Difference]
    missing: tuple[int, int]
    protocols: tuple[str, str]

    @property
    def miou(self) -> Difference:
        return self.of["mIoU"]


def change(before: Run, old: str, after: Run, new: str, testset: str) -> Change | None:
    """Returns the change from model ``old`` of one run to model ``new`` of another, or of the same.

    None if the runs lack the rows, evaluated the test set under different protocols, or have no annotated
    row in common.
    """
    first, second = before.rows.get(testset), after.rows.get(testset)
    if first is None or second is None or old not in first.predictions or new not in second.predictions:
        return None
    if first.protocol != second.protocol:
        return None
    samples = _common(first.samples.values(), second.samples)
    if not samples:
        return None
    predictions = first.predictions[old], second.predictions[new]
    evaluations = before.evaluation(old, testset), after.evaluation(new, testset)
    return Change(
        n=len(samples),
        of=paired_difference(samples, *predictions, first.protocol),
        missing=_pair(sum(s.id not in found for s in samples) for found in predictions),
        protocols=_pair("" if e is None else e.protocol for e in evaluations),
    )


@dataclass(frozen=True, kw_only=True)
class DifferenceRow:
    """A line of the table of differences. ``low`` and ``high`` are None where no interval is known."""

    run: int
    name: str
    testset: str
    n: int
    value: float
    low: float | None
    high: float | None
    cells: Sequence[str]  # mIoU and the recalls, each with its interval
    verdict: str
    notes: str  # in what the two were not measured alike; empty if in nothing


def differences(runs: Sequence[Run]) -> list[DifferenceRow]:
    """Returns each run's student less that of the first run, on each test set of both."""
    rows = []
    for number, run in enumerate(runs[1:], start=1):
        for testset in run.rows:
            found = change(runs[0], runs[0].student, run, run.student, testset)
            if found is None:
                continue
            low, high = found.miou.ci95 or (None, None)
            rows.append(
                DifferenceRow(
                    run=number,
                    name=run.name,
                    testset=testset,
                    n=found.n,
                    value=found.miou.value,
                    low=low,
                    high=high,
                    cells=[signed(found.of[name]) for name in METRICS],
                    verdict=verdict(found.miou),
                    notes=_notes(found),
                )
            )
    return rows


def _notes(found: Change) -> str:
    notes = []
    if any(found.missing):
        first, here = found.missing
        notes.append(f"rows without a prediction: {here}, and {first} of the first run")
    first_protocol, protocol = found.protocols
    if first_protocol and protocol and first_protocol != protocol:
        notes.append(f"protocol {protocol}; of the first run {first_protocol}")
    return "; ".join(notes)


def widest(rows: Sequence[DifferenceRow]) -> float:
    """Returns the largest size of anything that is drawn of ``rows``, in points; at least 1."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    return max([1.0, *map(abs, ends)])


def _pair(values: Iterable[T]) -> tuple[T, T]:
    first, second = values
    return first, second


def _common(samples: Iterable[Sample], others: Mapping[str, Sample]) -> Sequence[Sample]:
    return [s for s in samples if s.id in others and others[s.id].spans == s.spans]


def signed(difference: Difference) -> str:
    """``+20.4 [+16.9, +24.1]``, which is broken before the bracket only."""
    text = f"{difference.value:+.1f}"
    if difference.ci95 is None:
        return text
    low, high = difference.ci95
    return f"{text} [{low:+.1f},{NO_BREAK}{high:+.1f}]"


def verdict(difference: Difference) -> str:
    """Says in a word what the interval shows."""
    if difference.ci95 is None:
        return "–"
    low, high = difference.ci95
    return "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
