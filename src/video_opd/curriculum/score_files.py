"""Reads scores files, which hold the measurements of each row of a pool. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.temporal import Interval, best_iou, is_pair
from video_opd.types import ForTopK, Score

KEYS = ("teacher_iou", "student_iou", "reverse_kl")
ROUNDING = 1e-9  # of an IoU that is computed again


def read_scores(
    path: str | Path, judge: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: row
) -> dict[str, Score]:
    """The scores of a file by sample id. ``judge`` may replace a row that has an id: see :func:`judged`.

    A value that is null, missing or not finite becomes NaN, or None if it is the reverse KL. The spans that
    the scores were computed from stay in the file. Raises :class:`UserError` with file and line for a row
    without id, for an id that comes twice, for a value that is no number or out of range, and for a
    ``for_topk`` that names no selection; and without a line for a file in which no row has any score.
    """
    scores: dict[str, Score] = {}
    measured = False
    for number, row in read_jsonl(path):
        identity = row.get("id")
        if not isinstance(identity, str):
            raise UserError(f'{path}:{number}: a score needs an "id" that is a string')
        if identity in scores:
            raise UserError(f"{path}:{number}: a second score for id {identity!r}; keep one row for each id")
        known = judge(row)
        measured = measured or any(key in known for key in KEYS)
        try:
            reverse_kl = _number(known, "reverse_kl")
            scores[identity] = Score(
                id=identity,
                teacher_iou=_iou(known, "teacher_iou"),
                student_iou=_iou(known, "student_iou"),
                reverse_kl=None if math.isnan(reverse_kl) else reverse_kl,
                for_topk=_for_topk(known),
            )
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if scores and not measured:
        raise UserError(
            f"{path}: not a scores file: no row has {', '.join(KEYS[:-1])} or {KEYS[-1]}; "
            "name one that video-opd score made"
        )
    return scores


def judged(row: Mapping[str, Any], spans: Sequence[Interval]) -> dict[str, Any]:
    """A row of a scores file with the IoUs that its responses have with the annotation as it is now.

    A model's responses do not depend on the annotation, so rows whose ``spans`` were corrected after they
    were scored are compared again, without a model. A row is left as it is where its responses are not in the
    file (another tool may have made it, whose spans may be fewer), where it is not annotated, and where its
    IoUs are right.
    """
    new = dict(row)
    for role in ("teacher", "student"):
        found, stated = row.get(f"{role}_spans"), row.get(f"{role}_iou")
        responses = row.get(f"{role}_responses")
        if not (spans and isinstance(found, list) and found and isinstance(responses, list)):
            continue
        if len(found) != len(responses):
            continue
        if not all(span is None or is_pair(span) for span in found):
            continue
        iou = fsum(best_iou(span and tuple(span), spans) for span in found) / len(found)
        if not (isinstance(stated, int | float) and abs(stated - iou) < ROUNDING):
            new[f"{role}_iou"] = iou
    return new


def _for_topk(row: Mapping[str, Any]) -> ForTopK | None:
    found = row.get("for_topk")
    if found is None:
        return None
    k, gate = (found.get(key) for key in ("k", "min_teacher_iou")) if isinstance(found, Mapping) else (0, 0)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or not isinstance(gate, int | float):
        raise UserError(f'"for_topk" must be {{"k": rows, "min_teacher_iou": gate}}, not {found!r}')
    return ForTopK(k=k, min_teacher_iou=gate)


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f'"{key}" must be a number or null, not {value!r}')
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.nan


def _iou(row: Mapping[str, Any], key: str) -> float:
    value = _number(row, key)
    if value < 0 or value > 1:
        raise UserError(f'"{key}" is {value:g}, but an IoU lies between 0 and 1 (not in percent)')
    return value
