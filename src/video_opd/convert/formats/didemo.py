"""DiDeMo: times are numbers of 5-second segments, from several annotators.

``{"annotation_id", "description", "video", "times": [[i, j], …], …}``. ``[i, j]`` is from 5i to 5(j+1)
seconds, or to the end of a video that is shorter; the files state no duration (github.com/LisaAnne/
LocalizingMoments, ``README.md``). Annotators disagree: the segments that they marked become the row's spans,
each once, the most marked first; ``times`` stays in the row. DiDeMo's own score averages the three best
annotations (``utils/eval.py``); here the best one counts. Queries are cleaned as in VideoMind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from video_opd.convert.formats import fields, values
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Question, Unusable, row_format

SEGMENT_S = 5
_KEYS = ("video", "description", "times")


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, *_KEYS)
    times = [_segments(pair) for pair in fields.listed(value["times"], "times")]
    # most_common keeps the order of first appearance if counts are equal
    ranked = Counter(times).most_common()
    spans = [[SEGMENT_S * i, SEGMENT_S * (j + 1)] if i <= j else [i, j] for (i, j), _ in ranked]
    yield Question(
        where=entry.where,
        key=fields.name_of(value.get("annotation_id", value["video"]), "annotation_id"),
        video=value["video"],
        query=value["description"],
        spans=spans,
        ends_with_video=True,
        extra=fields.kept(value, "annotation_id") | {"times": [list(pair) for pair in times]},
    )


def _segments(pair: Any) -> tuple[int, int]:
    """The first and the last segment. Raises Unusable for other numbers, which are not seconds either."""
    pair = values.structure(pair)
    numbers = [values.number(item) for item in pair] if isinstance(pair, list | tuple) else []
    if len(numbers) != 2 or any(number is None or not number.is_integer() for number in numbers):
        raise Unusable("not segments", values.shown(pair))
    first, last = (int(number) for number in numbers if number is not None)
    return first, last


DIDEMO = row_format(
    "didemo",
    'rows {"annotation_id", "description", "video", "times": [[i, j], …]}, i and j of 5 seconds',
    _KEYS,
    read,
    timelens_query,
)
