"""A selection on a terminal. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from video_opd.curriculum.tvdf import Summary, ThresholdRow, histogram_edges
from video_opd.terminal import bar, print_lines

if TYPE_CHECKING:
    from rich.console import Console

_BAR_WIDTH = 30


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Prints the counts of a selection and δ's histogram before and after it, to stdout by default."""
    print_lines(summary_lines(summary), console)


def print_explanation(rows: Sequence[ThresholdRow], k: int, console: Console | None = None) -> None:
    """Prints what each gate would leave: a table by which to choose the threshold and k."""
    print_lines(explanation_lines(rows, k), console)


def summary_lines(summary: Summary) -> Iterator[str]:
    gate = f"teacher IoU ≥ {summary.min_teacher_iou:g}" if summary.min_teacher_iou > 0 else "no gate"
    yield f"{summary.rows} rows → {summary.candidates} candidates ({gate}) → {summary.selected} selected"
    for reason in _exclusions(summary):
        yield f"  {reason}"
    if summary.unknown_scores:
        yield f"  {summary.unknown_scores} scores belong to no row of the data"
    if summary.judged_again:
        yield (
            f"  {summary.judged_again} scored rows have another annotation now: their responses are compared "
            "with that one"
        )
    if summary.annotation_iou is not None:
        found = summary.annotation_iou
        shown = ((found.rows, "rows"), (found.candidates, "candidates"), (found.selected, "selected"))
        means = ", ".join(f"{value:.2f} {name}" for value, name in shown if value is not None)
        yield f"mean IoU of the annotations with the true spans: {means}"
    yield f"strategy {summary.strategy}, ranked by {summary.rank_by}"
    if summary.filled:
        yield f"  {summary.filled} made up for buckets with too few members"
    if summary.shortfall > 0:
        yield f"  {summary.shortfall} fewer than the {summary.k} asked for"
    yield from _histogram_lines(summary)
    if len(summary.by_source) > 1:
        width = max(map(len, summary.by_source))
        for source, counted in summary.by_source.items():
            counts = f"{counted.rows} rows, {counted.candidates} candidates, {counted.selected} selected"
            yield f"{source:{width}}  {counts}"


def warning_lines(summary: Summary, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What a user should know of a selection that may not be worth training on.

    ``rows`` are the selected rows, each with its ``"tvdf"`` block.
    """
    if not summary.selected:
        reasons = ", ".join(_exclusions(summary)) or "the pool is empty"
        yield f"nothing is selected: of {summary.rows} rows of the pool, {reasons}"
    if summary.strategy == "topk" and summary.rank_by == "iou_gap":
        mastered = sum(row["tvdf"]["delta"] <= 0 for row in rows)
        if mastered:
            yield (
                f"{mastered} of {len(rows)} selected rows have δ ≤ 0: the student is already as good there; "
                "lower --k"
            )


def _exclusions(summary: Summary) -> list[str]:
    """Why rows of the pool are no candidates, with their numbers; reasons that no row has are left out."""
    counts = (
        ("used before", summary.used_before),
        ("without annotation", summary.unannotated),
        ("without a score", summary.unscored),
        ("that the teacher was not asked about: they cannot be selected (lazy scores)", summary.not_asked),
        ("with a score that is missing or not finite", summary.unmeasured),
        ("where the teacher failed the gate", summary.failed_gate),
    )
    return [f"{count} {what}" for what, count in counts if count]


def _histogram_lines(summary: Summary) -> Iterator[str]:
    edges = histogram_edges()
    shown = [i for i, count in enumerate(summary.delta_before) if count]
    if not shown:
        return
    yield f"{'δ = τ − σ':13}  {'before':>7} {'after':>7}"
    most = max(summary.delta_before)
    for i in range(shown[-1], shown[0] - 1, -1):  # descending, as they are ranked
        before, after = summary.delta_before[i], summary.delta_after[i]
        bin_bar = bar(before / most, _BAR_WIDTH)
        yield f"{edges[i]:+.1f} to {edges[i + 1]:+.1f}  {before:7d} {after:7d}  {bin_bar}".rstrip()


def explanation_lines(rows: Sequence[ThresholdRow], k: int) -> Iterator[str]:
    yield f"{'gate':>5} {'passed':>8} {'δ > 0':>8} {'mean δ':>8} {f'δ of no. {k}':>14}"
    for row in rows:
        kth = f"{row.kth_delta:+.3f}" if row.passed >= k else "too few"
        mean = f"{row.mean_delta:+.3f}" if row.passed else "–"
        yield f"{row.min_teacher_iou:5.1f} {row.passed:8d} {row.positive:8d} {mean:>8} {kth:>14}"
    yield "choose the highest gate that still leaves k rows whose δ is well above 0"
