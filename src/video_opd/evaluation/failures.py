"""Sorts predictions by how they failed, and chooses the failures that are shown. No torch.

A prediction is right if its IoU is at least 0.5, as R@0.5 counts it. Otherwise it has no span, or it names
another event, or the right event with loose boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from video_opd.evaluation.protocols import Protocol
from video_opd.evaluation.rows import ROUNDING, RowScore, score_rows
from video_opd.temporal import Interval, best_iou
from video_opd.types import Prediction, Sample

Outcome: TypeAlias = Literal["no span", "another event", "loose boundaries", "right"]
FAILURES: tuple[Outcome, ...] = ("no span", "another event", "loose boundaries")
RIGHT_IOU = 0.5
SHOWN = 4  # failures of a kind that are shown of a test set


def outcome(span: Interval | None, annotated: Sequence[Interval]) -> Outcome:
    """Returns how a prediction did, whose ``span`` is as the protocol compares it.

    With an IoU below 0.5, the prediction means the annotated event if one of the two spans holds the middle
    of the other; their boundaries are then loose. If neither does, it means another event.
    """
    if span is None:
        return "no span"
    if _is_right(best_iou(span, annotated)):
        return "right"
    met = any(_holds_middle(span, true) or _holds_middle(true, span) for true in annotated)
    return "loose boundaries" if met else "another event"


def _is_right(iou: float) -> bool:
    return iou >= RIGHT_IOU - ROUNDING


def _holds_middle(span: Interval, other: Interval) -> bool:
    return span[0] <= (other[0] + other[1]) / 2 <= span[1]


def other_event(span: Interval, sample: Sample, samples: Iterable[Sample]) -> Sample | None:
    """Returns the row whose event a prediction meets instead of that of ``sample``.

    ``span`` is as the protocol compares it. The row is another query on the same video, and the prediction
    overlaps its event by an IoU of at least 0.5; None if the annotations know no such event.
    """
    near = [
        (best_iou(span, other.spans), -i, other)
        for i, other in enumerate(samples)
        if other.video == sample.video and other.id != sample.id and other.spans
    ]
    best = max(near, default=None)
    return best[2] if best is not None and _is_right(best[0]) else None


def choose_failures(
    samples: Sequence[Sample],
    predictions: Mapping[str, Prediction],
    protocol: str | Protocol = "paper",
    *,
    count: int = SHOWN,
) -> list[RowScore]:
    """Returns the rows that are shown, by kind and then as they stand in the data.

    They are at most ``count`` of a kind, each from another video as far as possible, spread over the data. A
    row without a prediction is not shown: its video could not be read, as a rule.
    """
    found: dict[Outcome, list[RowScore]] = {kind: [] for kind in FAILURES}
    for row in score_rows(samples, predictions, protocol):
        kind = outcome(row.span, row.sample.spans)
        if kind in found and not row.missing:
            found[kind].append(row)
    return [row for kind in FAILURES for row in _spread(found[kind], count)]


def _spread(rows: Sequence[RowScore], count: int) -> list[RowScore]:
    first_of_video = {row.sample.video: row for row in reversed(rows)}
    once = [row for row in rows if first_of_video[row.sample.video] is row]
    chosen = [once[i * len(once) // count] for i in range(count)] if len(once) > count else once
    ids = {row.sample.id for row in chosen}
    rest = [row.sample.id for row in rows if row.sample.id not in ids]
    ids |= {*rest[: count - len(chosen)]}
    return [row for row in rows if row.sample.id in ids]
