"""TRPV: the student learns only where the teacher is right (section 3.2, step 1). No torch."""

from __future__ import annotations

from collections.abc import Iterable

from video_opd.types import MIN_TEACHER_IOU, Score


def passes(scores: Iterable[Score], min_teacher_iou: float = MIN_TEACHER_IOU) -> list[Score]:
    """The scores whose mean teacher IoU is at least the threshold. A score without one (NaN) does not pass.

    A threshold of 0 or less is no gate: every score passes, measured or not.
    """
    if min_teacher_iou <= 0:
        return list(scores)
    return [score for score in scores if score.teacher_iou >= min_teacher_iou]
