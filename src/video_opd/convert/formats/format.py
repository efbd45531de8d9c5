"""A format of annotations: its name, how it is recognised, and how an entry of it becomes questions.

A format only says where things lie in an entry. ``convert/conversion.py`` checks what holds for all formats
(types, spans, durations, ids, videos) once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from video_opd.convert.formats.sources import Entry, Source

__all__ = ["Entry", "Format", "Question", "Source", "Unusable"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as a source states it; nothing in it has been checked yet.

    Example: ``Question(where="t.json[0]", key="OHOFG:0", video="OHOFG", query="a dog.", spans=[1, 2])``.
    """

    where: str
    key: str  # names the question within its source, the same for every run
    query: Any
    spans: Any  # [[start_s, end_s], …] or [start_s, end_s]; absent: a question without an annotation
    video: Any  # a path, a file name, or a name without an ending
    duration_s: Any = None
    source: Any = None  # the collection within the source
    ends_with_video: bool = False  # the format defines that a span past the end is cut
    clip: Any = None  # (start_s, end_s) of the whole video, if times count from the start of that clip
    extra: Mapping[str, Any] = field(default_factory=dict)  # kept in the row
    note: str = ""  # what a person should know about the row: "rows …", counted over all rows that say it


class Unusable(Exception):
    """An entry that holds no question: ``reason`` is one of a few, ``detail`` is about this entry."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class Format:
    """A public format of annotations.

    ``matches`` gets the first entries of a source of one of ``kinds``. ``read`` gets one entry; it yields a
    question for everything that the entry asks, or raises Unusable if the entry as a whole asks nothing.
    ``clean`` is what the source's own evaluation does to a query.
    """

    name: str
    layout: str  # what a file of the format contains, for --list-formats
    kinds: tuple[str, ...]  # kinds of source that it can be: "records", "mapping", "lines"
    matches: Callable[[Sequence[Entry]], bool]
    read: Callable[[Entry], Iterator[Question]]
    clean: Callable[[str], str]
    entries: Callable[[Source], Iterator[Entry]] | None = None  # for a source of more than one file


def row_format(
    name: str,
    layout: str,
    keys: Sequence[str],
    read: Callable[[Entry], Iterator[Question]],
    clean: Callable[[str], str],
    *,
    without: Sequence[str] = (),
) -> Format:
    """A format of rows: each is an object that has ``keys`` and none of ``without``."""

    def matches(head: Sequence[Entry]) -> bool:
        return all_records(head, *keys) and not any(key in entry.value for entry in head for key in without)

    return Format(name=name, layout=layout, kinds=("records",), matches=matches, read=read, clean=clean)


def is_record(value: Any, *keys: str) -> bool:
    """Whether ``value`` is an object that has all of ``keys``."""
    return isinstance(value, Mapping) and all(key in value for key in keys)


def all_records(entries: Sequence[Entry], *keys: str) -> bool:
    """Whether every entry is an object that has all of ``keys``."""
    return all(is_record(entry.value, *keys) for entry in entries)
