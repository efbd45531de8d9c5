"""VideoMind's flat rows, ``{"vid", "duration", "query", "span": [s, e]}``.

InternVid-VTime, CosMo-Cap and others come so, from its loaders (github.com/yeliudev/VideoMind,
``videomind/dataset/sub_classes/cosmo_cap.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    all_records,
    given,
    name_of,
    record,
    timelens_query,
)


def read(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "vid", "query", "span")
    yield Raw(
        where=entry.where,
        key=name_of(value["vid"], "vid"),
        video_id=value["vid"],
        query=value["query"],
        spans=given(value["span"]),
        duration_s=value.get("duration"),
        source=value.get("source"),
    )


VIDEOMIND = Format(
    name="videomind",
    looks_like='rows {"vid", "duration", "query", "span": [s, e]}',
    kinds=("records",),
    matches=lambda head: all_records(head, "vid", "query", "span"),
    read=read,
    clean=timelens_query,
)
