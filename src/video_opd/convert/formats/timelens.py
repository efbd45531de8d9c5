"""TimeLens-Bench and TimeLens-100K.

Shapes and cleaning from TimeLens' own loader (github.com/TencentARC/TimeLens, ``timelens/dataset/
timelens_data.py``, and ``_normalize_spans`` of ``training/data/grounding.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    all_records,
    given,
    listed,
    paired,
    record,
    stem_of,
    timelens_query,
)


def read_bench(entry: Entry) -> Iterator[Raw]:
    """``{vid: {"duration", "spans": [[s, e], …], "queries": [str, …]}}``, one span a query."""
    value = record(entry.value, "duration", "spans", "queries")
    for i, (span, query) in enumerate(paired(value["spans"], value["queries"], "spans and queries")):
        yield Raw(
            where=f"{entry.where} no. {i}",
            key=f"{entry.key}:{i}",
            video_id=entry.key,
            query=query,
            spans=given(span),
            duration_s=value["duration"],
        )


def read_100k(entry: Entry) -> Iterator[Raw]:
    """``{"source", "video_path", "duration", "events": [{"query", "span"}]}``; a span is flat or a list."""
    value = record(entry.value, "video_path", "duration", "events")
    for i, event in enumerate(listed(value["events"], "events")):
        fields = event if isinstance(event, dict) else {}
        yield Raw(
            where=f"{entry.where} event {i}",
            key=f"{stem_of(value['video_path'])}:{i}",
            video=value["video_path"],
            query=fields.get("query"),
            spans=given(fields.get("span")),
            duration_s=value["duration"],
            source=value.get("source"),
        )


BENCH = Format(
    name="timelens-bench",
    looks_like='JSON {vid: {"duration", "spans": [[s, e], …], "queries": […]}}',
    kinds=("mapping",),
    matches=lambda head: all_records(head, "duration", "spans", "queries"),
    read=read_bench,
    clean=timelens_query,
)
HUNDRED_K = Format(
    name="timelens-100k",
    looks_like='rows {"source", "video_path", "duration", "events": [{"query", "span"}]}',
    kinds=("records",),
    matches=lambda head: all_records(head, "video_path", "duration", "events"),
    read=read_100k,
    clean=timelens_query,
)
