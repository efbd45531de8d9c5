"""Sorts predictions by how they failed, and chooses the failures that are shown. No torch.

A prediction is right if its IoU is at least 0.5. Otherwise it has no span, or it names another event, or the
right event with loose boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from video_opd.temporal import Interval, best_iou
from video_opd.types import Prediction, Sample

Outcome: TypeAlias = Literal["no span", "another event", "loose boundaries", "right"]
FAILURES: tuple[Outcome, ...] = ("no span", "another event", "loose boundaries")
RIGHT_IOU = 0.5
SHOWN = 4  # failures of a kind that are shown of a test set


def outcome(span: Interval | None, annotated: Sequence[Interval]) -> Outcome:
    """Returns how a prediction did.

    With an IoU below 0.5, the prediction means the annotated event if one of the two spans holds the middle
    of the other; their boundaries are then loose. If neither does, it means another event.
    """
    if span is None:
        return "no span"
    if best_iou(span, annotated) >= RIGHT_IOU:
        return "right"
    met = any(_holds_middle(span, true) or _holds_middle(true, span) for true in annotated)
    return "loose boundaries" if met else "another event"


def _holds_middle(span: Interval, other: Interval) -> bool:
    return span[0] <= (other[0] + other[1]) / 2 <= span[1]


def other_event(span: Interval, sample: Sample, samples: Iterable[Sample]) -> Sample | None:
    """Returns the row whose event a prediction meets instead of that of ``sample``.

    It is another query on the same video, and the prediction overlaps its event by an IoU of at least 0.5;
    None if the annotations know no such event.
    """
    near = [
        (best_iou(span, other.spans), -i, other)
        for i, other in enumerate(samples)
        if other.video == sample.video and other.id != sample.id and other.spans
    ]
    best = max(near, default=None)
    return best[2] if best is not None and best[0] >= RIGHT_IOU else None


def choose_failures(
    samples: Sequence[Sample], predictions: Mapping[str, Prediction], count: int = SHOWN
) -> list[Sample]:
    """Returns the rows that are shown, by kind and then as they stand in the data.

    They are at most ``count`` of a kind, each from another video as far as possible, spread over the data. A
    row without a prediction is not shown: its video could not be read, as a rule.
    """
    found: dict[Outcome, list[Sample]] = {kind: [] for kind in FAILURES}
    for sample in samples:
        prediction = predictions.get(sample.id)
        if prediction is None or not sample.spans:
            continue
        kind = outcome(prediction.spans[0] if prediction.spans else None, sample.spans)
        if kind in found:
            found[kind].append(sample)
    return [sample for kind in FAILURES for sample in _spread(found[kind], count)]


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    first_of_video = {sample.video: sample for sample in reversed(samples)}
    once = [sample for sample in samples if first_of_video[sample.video] is sample]
    chosen = [once[i * len(once) // count] for i in range(count)] if len(once) > count else once
    ids = {sample.id for sample in chosen}
    rest = [sample.id for sample in samples if sample.id not in ids]
    ids |= {*rest[: count - len(chosen)]}
    return [sample for sample in samples if sample.id in ids]
