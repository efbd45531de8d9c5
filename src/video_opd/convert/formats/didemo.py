"""DiDeMo: times are numbers of 5-second segments, from several annotators.

``{"annotation_id", "description", "video", "times": [[i, j], …], …}``. ``[i, j]`` is from 5i to 5(j+1)
seconds, or to the video's end where that comes first; the files state no duration (github.com/LisaAnne/
LocalizingMoments, ``README.md``). Annotators disagree: what they marked becomes the row's spans, each once,
the most marked first; ``times`` stays in the row. DiDeMo's own score averages the three best of them
(``utils/eval.py``), here the best one counts. Queries are cleaned as VideoMind does it on this set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    all_records,
    kept,
    listed,
    name_of,
    record,
    timelens_query,
)

SEGMENT_S = 5


def read(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "video", "description", "times")
    times = listed(value["times"], "times")
    spans: Any = times
    extra = kept(value, "annotation_id")
    if all(_is_pair(pair) for pair in times):
        # most_common keeps the order of first appearance where the numbers are equal
        ranked = Counter((pair[0], pair[1]) for pair in times).most_common()
        spans = [[SEGMENT_S * i, SEGMENT_S * (j + 1)] if i <= j else [i, j] for (i, j), _ in ranked]
        extra["times"] = [list(pair) for pair in times]
    yield Raw(
        where=entry.where,
        key=name_of(value.get("annotation_id", value["video"]), "annotation_id"),
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


DIDEMO = Format(
    name="didemo",
    looks_like='rows {"annotation_id", "description", "video", "times": [[i, j], …]}, i and j of 5 seconds',
    kinds=("records",),
    matches=lambda head: all_records(head, "video", "description", "times"),
    read=read,
    clean=timelens_query,
)
