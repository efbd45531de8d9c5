"""VideoMind's flat rows, ``{"vid", "duration", "query", "span": [s, e]}``.

InternVid-VTime, CosMo-Cap and other sets have this form (github.com/yeliudev/VideoMind,
``videomind/dataset/sub_classes/cosmo_cap.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Question, row_format

_KEYS = ("vid", "query", "span")


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, *_KEYS)
    name = fields.name_of(value["vid"], "vid")
    spans, source = fields.given(value["span"]), value.get("source")
    yield fields.row_question(
        entry, value, key=name, query="query", spans=spans, video=value["vid"], source=source
    )


VIDEOMIND = row_format(
    "videomind", 'rows {"vid", "duration", "query", "span": [s, e]}', _KEYS, read, timelens_query
)
