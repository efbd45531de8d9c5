"""Our own rows in another container: a list in JSON, Parquet, a ``datasets`` folder, or a file to clean.

``{"id", "video", "query", "duration", "spans", "source"}`` as ``data/annotations.py`` reads them: an empty
list of spans is a question without an annotation. The id stays, other keys are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.convert.formats import fields, values
from video_opd.convert.formats.cleaning import plain_query
from video_opd.convert.formats.format import Entry, Question, row_format
from video_opd.data.annotations import KNOWN_KEYS, REQUIRED_KEYS


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, *REQUIRED_KEYS)
    identity = fields.name_of(value["id"], "id")
    stated = {"video": value["video"], "source": value.get("source")}
    others = {key: item for key, item in values.as_json(value).items() if key not in KNOWN_KEYS}
    spans = value.get("spans")
    spans = None if values.structure(spans) in ([], ()) else spans
    yield fields.row_question(entry, value, key=identity, query="query", spans=spans, **stated, extra=others)


OWN = row_format(
    "video-opd",
    'rows {"id", "video", "query", "duration", "spans": [[s, e], …], "source"}',
    REQUIRED_KEYS,
    read,
    plain_query,
)
