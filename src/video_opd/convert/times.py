"""The times of a question: its spans, its duration and its clip, in seconds.

A value that cannot be a time raises Unusable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from video_opd.convert.formats.format import Unusable

Clip = tuple[float, float | None]

_DIGITS = 6  # decimals of a time that was moved by a clip's start: the rest is rounding error


def read_duration(value: Any) -> float:
    """Raises Unusable for anything but a number above 0."""
    duration_s = _number(value)
    if duration_s is None or duration_s <= 0:
        raise Unusable("impossible duration", shown(value))
    return duration_s


def read_clip(value: Any) -> Clip | None:
    """(start_s, end_s) of a clip in the whole video; the end may be missing. None if there is no clip."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Unusable("impossible clip", shown(value))
    start_s, end_s = _number(value[0]), None if value[1] is None else _number(value[1])
    if start_s is None or start_s < 0 or (value[1] is not None and (end_s is None or end_s <= start_s)):
        raise Unusable("impossible clip", shown(value))
    return start_s, end_s


def listed_spans(spans: Any) -> Sequence[Any]:
    """A list of spans; a single flat one becomes a list that holds it."""
    if not isinstance(spans, list | tuple):
        raise Unusable("not a span", shown(spans))
    if spans and all(not isinstance(item, list | tuple | Mapping) for item in spans):
        return [spans]
    return spans


def read_span(pair: Any, shift_s: float, duration_s: float | None) -> tuple[float, float]:
    """(start_s, end_s), moved by ``shift_s``. The end may lie past the duration; the start may not."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise Unusable("not a span", shown(pair))
    start_s, end_s = _number(pair[0]), _number(pair[1])
    if start_s is None or end_s is None:
        raise Unusable("not numbers", shown(pair))
    stated = f"{start_s:g} to {end_s:g}"
    if end_s <= start_s:
        raise Unusable("reversed span" if end_s < start_s else "empty span", stated)
    if start_s < 0:
        raise Unusable("starts before 0", stated)
    if shift_s:
        start_s, end_s = round(start_s + shift_s, _DIGITS), round(end_s + shift_s, _DIGITS)
    if duration_s is not None and start_s >= duration_s:
        raise Unusable("past the end", f"{stated}, the video lasts {duration_s:g}")
    if end_s <= start_s:  # closer than numbers of that size can tell apart
        raise Unusable("empty span", stated)
    return start_s, end_s


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def shown(value: Any) -> str:
    """``value`` as text for people, cut if it is long."""
    plain = (str, int, float, type(None))
    if isinstance(value, list | tuple):
        value = [item if isinstance(item, plain) else type(item).__name__ for item in value[:3]]
    elif not isinstance(value, plain):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # an integer too long to be written
        return "a number of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
