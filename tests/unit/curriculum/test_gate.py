from __future__ import annotations

import math

from video_opd.curriculum.gate import passes
from video_opd.types import MIN_TEACHER_IOU, Score


def score(identity: str, teacher_iou: float) -> Score:
    return Score(id=identity, teacher_iou=teacher_iou, student_iou=0.0)


SCORES = [
    score("low", 0.49),
    score("at", 0.5),
    score("high", 0.9),
    score("unknown", math.nan),
    score("zero", 0.0),
]


def ids(min_teacher_iou: float = MIN_TEACHER_IOU) -> list[str]:
    return [s.id for s in passes(SCORES, min_teacher_iou)]


def test_the_default_is_a_half_and_includes_it() -> None:
    assert ids() == ["at", "high"]


def test_thresholds() -> None:
    assert ids(0.9) == ["high"]
    assert ids(1.0) == []
    assert ids(0.01) == ["low", "at", "high"]


def test_zero_is_no_gate_even_for_what_was_not_measured() -> None:
    assert ids(0.0) == [s.id for s in SCORES]
