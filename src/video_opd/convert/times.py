"""The times of a question: its spans, its duration and its clip, in seconds.

A value that cannot be a time raises Unusable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from video_opd.convert.formats import values
from video_opd.convert.formats.format import Unusable
from video_opd.temporal import MOST_SECONDS

Clip = tuple[float, float | None]

_DIGITS = 6  # decimals of a time that was moved by a clip's start: the rest is rounding error


def read_duration(value: Any) -> float:
    """A duration. Raises Unusable for anything but a time above 0."""
    duration_s = values.seconds(value)
    if duration_s is None or not 0 < duration_s <= MOST_SECONDS:
        raise Unusable("impossible duration", values.shown(value))
    return duration_s


def read_clip(value: Any) -> Clip | None:
    """(start_s, end_s) of a clip in the whole video; the end may be missing. None if there is no clip."""
    if values.is_absent(value):
        return None
    value = values.structure(value)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Unusable("impossible clip", values.shown(value))
    start_s, open_end = values.seconds(value[0]), values.is_absent(value[1])
    end_s = None if open_end else values.seconds(value[1])
    if start_s is None or start_s < 0 or not (open_end or (end_s is not None and end_s > start_s)):
        raise Unusable("impossible clip", values.shown(value))
    return start_s, end_s


def listed_spans(spans: Any) -> Sequence[Any]:
    """A list of spans; a single flat one becomes a list that holds it."""
    spans = values.structure(spans)
    if not isinstance(spans, list | tuple):
        raise Unusable("not a span", values.shown(spans))
    spans = [values.structure(item) for item in spans]
    if spans and all(not isinstance(item, list | tuple | Mapping) for item in spans):
        return [spans]
    return spans


def read_span(pair: Any, shift_s: float, duration_s: float | None) -> tuple[float, float]:
    """(start_s, end_s), moved by ``shift_s``. The end may lie past the duration; the start may not."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise Unusable("not a span", values.shown(pair))
    start_s, end_s = values.seconds(pair[0]), values.seconds(pair[1])
    if start_s is None or end_s is None or max(abs(start_s), abs(end_s)) > MOST_SECONDS:
        raise Unusable("not numbers", values.shown(pair))
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
