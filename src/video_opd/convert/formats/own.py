"""Our own rows, from another container: a list in JSON, Parquet, a ``datasets`` folder, or a file to clean.

``{"id", "video", "query", "duration", "spans", "source"}`` as ``data/annotations.py`` reads them. The id
stays, other keys are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats.records import Entry, Format, Raw, all_records, name_of, plain_query, record

_OURS = ("id", "video", "query", "duration", "spans", "source")


def read(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "id", "video", "query")
    yield Raw(
        where=entry.where,
        key=name_of(value["id"], "id"),
        video=value["video"],
        query=value["query"],
        spans=value.get("spans"),
        duration_s=value.get("duration"),
        source=value.get("source"),
        extra={key: item for key, item in value.items() if key not in _OURS},
    )


OWN = Format(
    name="video-opd",
    looks_like='rows {"id", "video", "query", "duration", "spans": [[s, e], …], "source"}',
    kinds=("records",),
    matches=lambda head: all_records(head, "id", "video", "query"),
    read=read,
    clean=plain_query,
)
