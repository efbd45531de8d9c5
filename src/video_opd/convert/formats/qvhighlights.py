"""QVHighlights: several windows a query.

``{"qid", "query", "duration", "vid", "relevant_windows": [[s, e], …], …}`` a line, from its own repository
(github.com/jayleicn/moment_detr, ``data/README.md``), which asks the query as it is. The test split has no
windows: its rows are questions without spans.
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    all_records,
    kept,
    name_of,
    plain_query,
    record,
)


def read(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "qid", "query", "vid")
    yield Raw(
        where=entry.where,
        key=name_of(value["qid"], "qid"),
        video_id=value["vid"],
        query=value["query"],
        spans=value.get("relevant_windows"),
        duration_s=value.get("duration"),
        extra=kept(value, "qid", "vid"),
    )


QVHIGHLIGHTS = Format(
    name="qvhighlights",
    looks_like='rows {"qid", "query", "duration", "vid", "relevant_windows": [[s, e], …], …}',
    kinds=("records",),
    matches=lambda head: all_records(head, "qid", "query", "vid", without=("span",)),
    read=read,
    clean=plain_query,
)
