"""Durations of videos, from a file beside the annotations.

JSON ``{vid: seconds}`` or ``{vid: {"duration": seconds}}``, or a table with one of the columns ``id``,
``vid``, ``video``, ``video_id`` and one of ``length``, ``duration`` (Charades' own CSV has ``id`` and
``length``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from video_opd.convert.formats.sources import open_source
from video_opd.errors import UserError

_NAMES = ("id", "vid", "video", "video_id")
_LENGTHS = ("length", "duration")


class Durations:
    """Seconds by the name of a video: its path, its file name, or its file name without the ending."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = dict(seconds)

    def __bool__(self) -> bool:
        return bool(self._seconds)

    def of(self, video: str) -> float | None:
        name = PurePosixPath(video).name
        for key in (video, name, PurePosixPath(name).stem, name.split(".")[0]):
            if key in self._seconds:
                return self._seconds[key]
        return None


def read_durations(paths: Iterable[str | Path]) -> Durations:
    """Raises UserError for a file without durations, and names the line of an entry that holds none."""
    seconds: dict[str, float] = {}
    for path in paths:
        before = len(seconds)
        for entry in open_source(path).entries():
            name, value = entry.key, entry.value
            if name is None and isinstance(value, Mapping):
                name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
                value = next((value[key] for key in _LENGTHS if key in value), None)
            elif isinstance(value, Mapping):
                value = next((value[key] for key in _LENGTHS if key in value), None)
            if name is None or (length := _seconds(value)) is None:
                raise UserError(f"{entry.where}: no duration of a video; write {{vid: seconds}}")
            seconds[name] = length
        if len(seconds) == before:
            raise UserError(f"{path}: holds no durations; write {{vid: seconds}}")
    return Durations(seconds)


def _seconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number > 0 else None
