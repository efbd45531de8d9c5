"""TVDF in pictures: who was selected, how δ drifts from round to round, how far the teacher can be relied on.

Shapes: τ is the teacher's mean IoU on a row, σ the student's, δ = τ − σ (eq 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, quantiles
from typing import Any

from video_opd.reports.charts import Chart, ErrorBar, Series, histogram, line_chart
from video_opd.reports.runs import Run

MOST_SOURCES = 20
MOST_EXAMPLES = 4  # selected rows from either end of the ranking
EXAMPLE_HEADER = ("query", "source", "δ", "teacher's IoU", "student's IoU")
BINS = 20


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The first and the last rows of a selection, below :data:`EXAMPLE_HEADER`."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class SelectionTables:
    """Tables and charts about the selections of a run or of its rounds. A table without rows is not shown."""

    who_header: Sequence[str]
    who: Sequence[Sequence[str]]
    drift_header: Sequence[str]
    drift: Sequence[Sequence[str]]
    trust_header: Sequence[str]
    trust: Sequence[Sequence[str]]
    examples: Sequence[Examples]
    charts: Sequence[Chart]


DRIFT_HEADER = (
    "round",
    "rows scored before and now",
    "δ before",
    "δ now",
    "drift of δ",
    "because of the student",
    "because of the teacher",
)
TRUST_HEADER = (
    "round",
    "rows with the teacher's answer",
    "teacher's IoU",
    "of these passed the gate",
    "better than the student",
    "teacher's IoU on the selected",
)


def selection_tables(run: Run) -> SelectionTables | None:
    """Returns what is known of the selections; None if the folder has no scores and no selection."""
    rounds = [each for each in (run.rounds or (run,)) if each.scores or each.selection or each.selected]
    if not rounds:
        return None
    charts = [delta_chart(rounds), reliability_chart(rounds), *(teacher_histogram(each) for each in rounds)]
    return SelectionTables(
        who_header=("source", *(f"round {each.number}" if run.rounds else "selected" for each in rounds)),
        who=who_was_selected(rounds),
        drift_header=DRIFT_HEADER,
        drift=[row for before, now in pairwise(rounds) if (row := drift(before, now))],
        trust_header=TRUST_HEADER if run.rounds else TRUST_HEADER[1:],
        trust=[row if run.rounds else row[1:] for each in rounds if (row := trust(each))],
        examples=[examples(each) for each in rounds if each.selected],
        charts=[chart for chart in charts if chart is not None],
    )


def who_was_selected(rounds: Sequence[Run]) -> list[list[str]]:
    """Returns a row a source: ``"44 of 64 candidates"`` of each round, the largest sources first."""
    by_source = [(each.selection or {}).get("by_source") or {} for each in rounds]
    sizes: dict[str, int] = {}
    for sources in by_source:
        for source, counts in sources.items():
            sizes[source] = sizes.get(source, 0) + counts["candidates"]
    sources = sorted(sizes, key=lambda source: (-sizes[source], source))[:MOST_SOURCES]
    if len(sources) < 2:
        return []
    return [
        [
            source,
            *(
                f"{counts['selected']:,} of {counts['candidates']:,} candidates"
                if (counts := found.get(source))
                else "–"
                for found in by_source
            ),
        ]
        for source in sources
    ]


def examples(each: Run) -> Examples:
    """Returns the first and the last rows of a selection: with top-k, those with the largest and least δ."""
    rows = list(each.selected.values())
    ends = [*rows[:MOST_EXAMPLES], *rows[max(MOST_EXAMPLES, len(rows) - MOST_EXAMPLES) :]]
    place = f"round {each.number}: " if each.number else ""
    few = len(ends) < len(rows)
    return Examples(
        title=f"{place}{'the first and the last of ' if few else ''}{len(rows):,} selected rows",
        rows=[
            [
                row["query"],
                row["source"],
                "–" if row["delta"] is None else f"{row['delta']:+.2f}",
                *(
                    "–" if row[name] is None else f"{row[name]:.2f}"
                    for name in ("teacher_iou", "student_iou")
                ),
            ]
            for row in ends
        ],
    )


def drift(before: Run, now: Run) -> list[str] | None:
    """Returns how δ changed on the rows that were scored in both rounds; its change is Δτ − Δσ."""
    earlier = {row["id"]: row for row in before.scores if _delta(row) is not None}
    pairs = [
        (earlier[row["id"]], row) for row in now.scores if row["id"] in earlier and _delta(row) is not None
    ]
    if not pairs:
        return None
    rose = {
        name: fmean(later[name] - first[name] for first, later in pairs)
        for name in ("teacher_iou", "student_iou")
    }
    first, last = (fmean(_delta(pair[i]) or 0.0 for pair in pairs) for i in (0, 1))
    return [
        str(now.number),
        f"{len(pairs):,}",
        f"{first:+.3f}",
        f"{last:+.3f}",
        f"{last - first:+.3f}",
        f"{-rose['student_iou']:+.3f}",
        f"{rose['teacher_iou']:+.3f}",
    ]


def trust(each: Run) -> list[str] | None:
    """Returns how well the teacher answered the rows of a round that it was asked about."""
    asked = [row for row in each.scores if row["teacher_iou"] is not None]
    if not asked:
        return None
    both = [d for row in asked if (d := _delta(row)) is not None]
    passed = sum(row["teacher_iou"] >= _gate(each) for row in asked) if _gate(each) else None
    chosen = [row["teacher_iou"] for row in asked if row["id"] in each.selected]
    return [
        str(each.number),
        f"{len(asked):,}",
        f"{fmean(row['teacher_iou'] for row in asked):.2f}",
        "no gate" if passed is None else f"{passed / len(asked):.0%}",
        f"{sum(d > 0 for d in both) / len(both):.0%}" if both else "–",
        f"{fmean(chosen):.2f}" if chosen else "–",
    ]


def round_selections(run: Run) -> list[Chart]:
    """Draws δ before and after the selection of each round."""
    charts = [
        selection_chart(each.selection or {}, f"round {each.number}: δ before and after the selection")
        for each in run.rounds
    ]
    return [chart for chart in charts if chart is not None]


def selection_chart(
    selection: Mapping[str, Any], title: str = "δ before and after the selection"
) -> Chart | None:
    """Draws the distribution of δ, over all scored rows and over the selected."""
    return histogram(
        title,
        "Right of 0 the teacher answers better than the student: there is something to learn.",
        "δ = teacher IoU − student IoU",
        selection.get("delta_edges") or [],
        [
            ("all scored", "base", selection.get("delta_before") or []),
            ("selected", "student", selection.get("delta_after") or []),
        ],
    )


def delta_chart(rounds: Sequence[Run]) -> Chart | None:
    """Draws the mean δ of each round, of all rows and of the selected, with the middle half of each."""
    if len(rounds) < 2:
        return None
    groups: Mapping[str, tuple[str, Callable[[Run], list[float]]]] = {
        "all scored": ("base", lambda each: [d for row in each.scores if (d := _delta(row)) is not None]),
        "selected": ("student", lambda each: [d for row in _chosen(each) if (d := _delta(row)) is not None]),
    }
    series, bars = [], []
    for label, (colour, values) in groups.items():
        found = [(float(each.number), values(each)) for each in rounds if values(each)]
        xs, ys = [x for x, _ in found], [fmean(deltas) for _, deltas in found]
        series.append(Series(label=label, colour=colour, xs=xs, ys=ys))
        for x, deltas in found:
            if len(deltas) > 1:
                low, _, high = quantiles(deltas, n=4)
                bars.append(ErrorBar(x=x, low=low, high=high, colour=colour, what="middle half"))
    return line_chart(
        "δ over the rounds",
        "Mean of δ = teacher IoU − student IoU; the bars hold the middle half of the rows. It falls as the "
        "student learns and as the rows with the largest δ are used up.",
        series,
        zero=True,
        x_label="round",
        error_bars=bars,
    )


def reliability_chart(rounds: Sequence[Run]) -> Chart | None:
    """Draws the teacher's mean IoU and the share of rows that pass the gate over the rounds, in percent."""
    if len(rounds) < 2:
        return None
    parts: Mapping[str, tuple[str, Callable[[Run], float | None]]] = {
        "teacher's IoU": ("teacher", lambda each: _mean([r["teacher_iou"] for r in _asked(each)])),
        "passed the gate": (
            "other",
            lambda each: (
                _mean([float(r["teacher_iou"] >= _gate(each)) for r in _asked(each)]) if _gate(each) else None
            ),
        ),
        "teacher's IoU on the selected": (
            "student",
            lambda each: _mean([r["teacher_iou"] for r in _chosen(each) if r["teacher_iou"] is not None]),
        ),
    }
    series = []
    for label, (colour, value) in parts.items():
        found = [(float(each.number), 100 * v) for each in rounds if (v := value(each)) is not None]
        series.append(Series(label=label, colour=colour, xs=[x for x, _ in found], ys=[y for _, y in found]))
    return line_chart(
        "Teacher reliability over the rounds",
        "In percent, of the rows that the teacher was asked about. With lazy scores these are the rows that "
        "could be selected, so rounds with different pools are not alike.",
        series,
        zero=True,
        x_label="round",
    )


def teacher_histogram(each: Run) -> Chart | None:
    """Draws the distribution of the teacher's IoU, over all rows with one and over the selected."""
    edges = [i / BINS for i in range(BINS + 1)]
    asked = [row["teacher_iou"] for row in _asked(each)]
    chosen = [row["teacher_iou"] for row in _chosen(each) if row["teacher_iou"] is not None]
    gate = _gate(each)
    where = f"Only rows from {gate:g} on pass the gate." if gate else "There was no gate."
    return histogram(
        f"round {each.number}: how well the teacher answers"
        if each.number
        else "How well the teacher answers",
        f"The more lies to the right, the more the teacher can be relied on. {where}",
        "teacher IoU",
        edges,
        [("all asked", "base", _counts(asked)), ("selected", "student", _counts(chosen))],
    )


def _counts(values: Sequence[float]) -> list[int]:
    counts = [0] * BINS
    for value in values:
        counts[min(int(value * BINS + 1e-9), BINS - 1)] += 1
    return counts


def _asked(each: Run) -> list[Mapping[str, Any]]:
    return [row for row in each.scores if row["teacher_iou"] is not None]


def _chosen(each: Run) -> list[Mapping[str, Any]]:
    return [row for row in each.scores if row["id"] in each.selected]


def _delta(row: Mapping[str, Any]) -> float | None:
    tau, sigma = row["teacher_iou"], row["student_iou"]
    return None if tau is None or sigma is None else tau - sigma


def _gate(each: Run) -> float:
    gate = (each.selection or {}).get("min_teacher_iou")
    return gate if isinstance(gate, int | float) else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
