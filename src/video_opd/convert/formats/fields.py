"""Reading the fields of an entry. What cannot be read raises Unusable with a reason.

A list or an object may also lie in a field as text: so it is in a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from video_opd.convert.formats import values, video_names
from video_opd.convert.formats.format import Entry, Question, Unusable


def record(value: Any, *keys: str) -> Mapping[str, Any]:
    """``value`` as an object that has all of ``keys``. Raises Unusable."""
    value = values.structure(value)
    if not isinstance(value, Mapping):
        raise Unusable("not an object", f"a {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise Unusable("missing key", ", ".join(missing))
    return value


def listed(value: Any, name: str) -> Sequence[Any]:
    """``value`` as a list. Raises Unusable.

    ``datasets`` stores a list of objects as an object of lists, one for each key: it is turned back.
    """
    value = values.structure(value)
    if isinstance(value, Mapping) and value:
        columns = [column for column in value.values() if isinstance(column, list | tuple)]
        if len(columns) == len(value) and len(set(map(len, columns))) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list | tuple):
        raise Unusable("not a list", f"{name} is a {type(value).__name__}")
    return value


def mapping_or_empty(value: Any) -> Mapping[str, Any]:
    """``value``, or an object without keys if it is something else: each key is then missing."""
    value = values.structure(value)
    return value if isinstance(value, Mapping) else {}


def is_true(value: Any) -> bool:
    """A truth value, also written as text."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "false", "no", "none", "null")
    return bool(value)


def given(spans: Any) -> Any:
    """``spans``; a missing one becomes an empty list, which is a fault and not an unanswered question."""
    return () if values.is_absent(spans) else spans


def name_of(value: Any, what: str) -> str:
    """Text, or a whole number as text. Raises Unusable."""
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of a column with gaps
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable("no name", f"{what} is a {type(value).__name__}")
    try:
        return str(value)
    except ValueError:  # thousands of digits
        raise Unusable("no name", f"{what} has too many digits") from None


def stem_of(video: Any) -> str:
    """The name of a file without folders and ending. Raises Unusable for what names no file."""
    return video_names.stem_of(video_names.video_path(name_of(video, "the video")))


def kept(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of ``keys`` whose value is text or a number."""
    return {key: value[key] for key in keys if isinstance(value.get(key), str | int | float)}


def row_question(
    entry: Entry, value: Mapping[str, Any], *, key: str, query: str, spans: Any, **others: Any
) -> Question:
    """The question of a row that asks one thing: its query lies under ``query``, its duration under
    ``duration``. ``others`` are further fields of :class:`Question`."""
    return Question(
        where=entry.where,
        key=key,
        query=value[query],
        spans=spans,
        duration_s=value.get("duration"),
        **others,
    )


def paired_questions(
    entry: Entry, spans: Any, queries: Any, names: str, *, video: Any, duration_s: Any = None
) -> Iterator[Question]:
    """A question for each pair of two lists of one length, spans and queries. Raises Unusable."""
    a, b = listed(spans, names), listed(queries, names)
    if len(a) != len(b):
        raise Unusable("unequal lists", f"{names}: {len(a)} and {len(b)}")
    for i, (span, query) in enumerate(zip(a, b, strict=True)):
        yield Question(
            where=f"{entry.where} no. {i}",
            key=f"{video}:{i}",
            video=video,
            query=query,
            spans=given(span),
            duration_s=duration_s,
        )
