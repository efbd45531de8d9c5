"""TimeLens-Bench and TimeLens-100K.

Shapes and cleaning are those of TimeLens' own loader (github.com/TencentARC/TimeLens, ``timelens/dataset/
timelens_data.py``, and ``_normalize_spans`` of ``training/data/grounding.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Format, Question, all_records, row_format

_BENCH_KEYS = ("duration", "spans", "queries")
_ROW_KEYS = ("video_path", "duration", "events")


def read_bench(entry: Entry) -> Iterator[Question]:
    """``{vid: {"duration", "spans": [[s, e], …], "queries": [str, …]}}``, one span a query."""
    value = fields.record(entry.value, *_BENCH_KEYS)
    spans, queries = value["spans"], value["queries"]
    yield from fields.paired_questions(
        entry, spans, queries, "spans and queries", video=entry.key, duration_s=value["duration"]
    )


def read_100k(entry: Entry) -> Iterator[Question]:
    """``{"source", "video_path", "duration", "events": [{"query", "span"}]}``; a span is flat or a list."""
    value = fields.record(entry.value, *_ROW_KEYS)
    video = value["video_path"]
    for i, event in enumerate(fields.listed(value["events"], "events")):
        stated = fields.mapping_or_empty(event)
        yield Question(
            where=f"{entry.where} event {i}",
            key=f"{fields.stem_of(video)}:{i}",
            video=video,
            query=stated.get("query"),
            spans=fields.given(stated.get("span")),
            duration_s=value["duration"],
            source=value.get("source"),
        )


BENCH = Format(
    name="timelens-bench",
    layout='JSON {vid: {"duration", "spans": [[s, e], …], "queries": […]}}',
    kinds=("mapping",),
    matches=lambda head: all_records(head, *_BENCH_KEYS),
    read=read_bench,
    clean=timelens_query,
)
HUNDRED_K = row_format(
    "timelens-100k",
    'rows {"source", "video_path", "duration", "events": [{"query", "span"}]}',
    _ROW_KEYS,
    read_100k,
    timelens_query,
)
