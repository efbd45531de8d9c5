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

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Question, row_format

SEGMENT_S = 5
_KEYS = ("video", "description", "times")


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, *_KEYS)
    times = fields.listed(value["times"], "times")
    spans: Any = times
    extra = fields.kept(value, "annotation_id")
    if all(_is_pair(pair) for pair in times):
        # most_common keeps the order of first appearance if counts are equal
        ranked = Counter((pair[0], pair[1]) for pair in times).most_common()
        spans = [[SEGMENT_S * i, SEGMENT_S * (j + 1)] if i <= j else [i, j] for (i, j), _ in ranked]
        extra["times"] = [list(pair) for pair in times]
    yield Question(
        where=entry.where,
        key=fields.name_of(value.get("annotation_id", value["video"]), "annotation_id"),
        video=value["video"],
        query=value["description"],
        spans=spans,
        ends_with_video=True,
        extra=extra,
    )


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    )


DIDEMO = row_format(
    "didemo",
    'rows {"annotation_id", "description", "video", "times": [[i, j], …]}, i and j of 5 seconds',
    _KEYS,
    read,
    timelens_query,
)
