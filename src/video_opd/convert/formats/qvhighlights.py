"""QVHighlights: several windows a query.

``{"qid", "query", "duration", "vid", "relevant_windows": [[s, e], …], …}`` a line, from its own repository
(github.com/jayleicn/moment_detr, ``data/README.md``), which asks the query as it is. The test split has no
windows: its rows are questions without spans.
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import plain_query
from video_opd.convert.formats.format import Entry, Question, row_format

_KEYS = ("qid", "query", "vid")


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, *_KEYS)
    yield fields.row_question(
        entry,
        value,
        key=fields.name_of(value["qid"], "qid"),
        query="query",
        spans=value.get("relevant_windows"),
        video=value["vid"],
        extra=fields.kept(value, "qid", "vid"),
    )


QVHIGHLIGHTS = row_format(
    "qvhighlights",
    'rows {"qid", "query", "duration", "vid", "relevant_windows": [[s, e], …], …}',
    _KEYS,
    read,
    plain_query,
    without=("span",),
)
