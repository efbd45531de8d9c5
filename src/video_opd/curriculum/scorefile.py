"""Scores files: what was measured of each candidate. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.temporal import Interval
from video_opd.types import Score


def read_scores(path: str | Path) -> dict[str, Score]:
    """The scores of a file by sample id; a value that is null or missing is NaN (reverse KL: None).

    Raises :class:`UserError` with file and line for a row without id, a value that is no number or out of
    range, and for an id that comes twice.
    """
    scores: dict[str, Score] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        identity = row.get("id")
        if not isinstance(identity, str):
            raise UserError(f'{where}: a score needs an "id" that is a string')
        if identity in scores:
            raise UserError(f"{where}: a second score for id {identity!r}; keep one row for each id")
        reverse_kl = _number(row, "reverse_kl", where)
        scores[identity] = Score(
            id=identity,
            teacher_iou=_iou(row, "teacher_iou", where),
            student_iou=_iou(row, "student_iou", where),
            reverse_kl=None if math.isnan(reverse_kl) else reverse_kl,
            teacher_spans=_spans(row.get("teacher_spans")),
            student_spans=_spans(row.get("student_spans")),
        )
    return scores


def _number(row: Mapping[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f'{where}: "{key}" must be a number or null, not {value!r}')
    return float(value) if math.isfinite(value) else math.nan


def _iou(row: Mapping[str, Any], key: str, where: str) -> float:
    value = _number(row, key, where)
    if value < 0 or value > 1:
        raise UserError(f'{where}: "{key}" is {value:g}, but an IoU lies between 0 and 1 (not in percent)')
    return value


def _spans(value: Any) -> tuple[Interval | None, ...]:
    return tuple(None if span is None else (float(span[0]), float(span[1])) for span in value or ())
