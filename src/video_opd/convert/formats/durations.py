"""Durations of videos, from a file beside the annotations.

JSON ``{vid: seconds}`` or ``{vid: {"duration": seconds}}``, or a table with one of the columns ``id``,
``vid``, ``video``, ``video_id`` and one of ``length``, ``duration`` (Charades' own CSV has ``id`` and
``length``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from video_opd.convert.formats import fields, values
from video_opd.convert.formats.format import Unusable
from video_opd.convert.formats.sources import Entry, open_source
from video_opd.convert.formats.video_names import bare_name, stem_of
from video_opd.errors import UserError

SAME_S = 1.0  # two durations of one video that differ by less are one

_NAMES = ("id", "vid", "video", "video_id")
_LENGTHS = ("length", "duration")


class Durations:
    """Seconds by the name of a video: its path, its file name, or its file name without the ending."""

    def __init__(self, seconds: Mapping[str, float]) -> None:
        self._seconds = {_composed(name): length for name, length in seconds.items()}
        # A name without its folders and endings stands for a video if it stands for one only.
        self._bare: dict[str, float | None] = {}
        for name, length in self._seconds.items():
            bare = bare_name(name)
            before = self._bare.setdefault(bare, length)
            if before is None or abs(before - length) > SAME_S:
                self._bare[bare] = None

    def __bool__(self) -> bool:
        return bool(self._seconds)

    def of(self, video: str) -> float | None:
        video = _composed(video)
        for key in (video, PurePosixPath(video).name, stem_of(video)):
            if key in self._seconds:
                return self._seconds[key]
        return self._bare.get(bare_name(video))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def read_durations(paths: Iterable[str | Path]) -> Durations:
    """The durations in ``paths``.

    Raises UserError for a file without durations, for an entry that holds none, and for a video that has two
    of them; the last two name the line.
    """
    seconds: dict[str, float] = {}
    for path in paths:
        count = 0
        for count, entry in enumerate(open_source(path).entries(), start=1):  # noqa: B007
            name, length = _name_and_length(entry)
            if abs(seconds.setdefault(name, length) - length) > SAME_S:
                raise UserError(
                    f"{entry.where}: {name!r} lasts {length:g} s here, {seconds[name]:g} s before; keep one"
                )
        if count == 0:
            raise UserError(f"{path}: holds no durations; write {{vid: seconds}}")
    return Durations(seconds)


def _name_and_length(entry: Entry) -> tuple[str, float]:
    name: Any = entry.key
    value = entry.value
    if isinstance(value, Mapping):
        name = _first(value, _NAMES) if name is None else name
        value = _first(value, _LENGTHS)
    length = values.seconds(value)
    try:
        name = fields.name_of(name, "the video")
    except Unusable:
        length = None
    if length is None or length <= 0:
        raise UserError(f"{entry.where}: no duration of a video; write {{vid: seconds}}")
    return name, length


def _first(value: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first of ``keys`` that is there and not empty."""
    return next((value[key] for key in keys if not values.is_absent(value.get(key))), None)
