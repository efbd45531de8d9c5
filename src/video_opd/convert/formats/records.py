"""What a format is: a name, a look that it is known by, and a function from an entry to annotations.

A format only says where things lie. Everything that holds for all of them (types, spans, durations, ids,
where the video is) is checked once, in ``convert/conversion.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_opd.convert.formats.sources import Source


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a source: a row of a list, a key of a mapping, or a line of text.

    Example: ``Entry(where="charades.json: 'OHOFG'", key="OHOFG", value={"duration": 35.0, …})``.
    """

    where: str  # for people: the file, and the line, index or key
    value: Any
    key: str | None = None  # of a mapping


@dataclass(frozen=True, kw_only=True)
class Raw:
    """One question as a source states it; nothing of it has been checked yet.

    Example: ``Raw(where="t.json[0]", key="OHOFG:0", video_id="OHOFG", query="a dog barks.", spans=[1, 2])``.
    """

    where: str
    key: str  # names the question within its source, the same for every run
    query: Any
    spans: Any  # [[start_s, end_s], …] or [start_s, end_s]; None: a question without an answer
    video: Any = None  # a file name or path; or
    video_id: Any = None  # a name without an ending
    duration_s: Any = None
    source: Any = None  # the collection within the source
    ends_with_video: bool = False  # a span past the end is meant to be cut, as the format defines it
    clip: Any = None  # (start_s, end_s) of the whole video, where times count from the start of that part
    extra: Mapping[str, Any] = field(default_factory=dict)  # kept in the row


class Unusable(Exception):
    """An entry that holds no question: ``reason`` is one of a few, ``detail`` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class Format:
    """A public format of annotations.

    ``matches`` sees the first entries of a source of one of ``kinds``. ``read`` gets one entry; it yields a
    question for everything that the entry asks, or raises Unusable where the entry as a whole asks nothing.
    ``clean`` is what the source's own evaluation does to a query.
    """

    name: str
    looks_like: str  # for --list-formats
    kinds: tuple[str, ...]  # of sources: "records", "mapping", "lines"
    matches: Callable[[Sequence[Entry]], bool]
    read: Callable[[Entry], Iterator[Raw]]
    clean: Callable[[str], str]
    entries: Callable[[Source], Iterator[Entry]] | None = None  # where the source is more than one file


# --- queries -----------------------------------------------------------------------------------------


def timelens_query(query: str) -> str:
    """TimeLens' and VideoMind's ``parse_query``: white space is collapsed, full stops at the ends go."""
    return re.sub(r"\s+", " ", query).strip().strip(".").strip()


def lower_query(query: str) -> str:
    """Time-R1's training and VTimeLLM's evaluation: lower case, one full stop at the end goes."""
    return query.strip().lower().removesuffix(".")


def plain_query(query: str) -> str:
    """As it is, but for white space at its ends: QVHighlights, and Time-R1's evaluation of TVGBench."""
    return query.strip()


# --- reading entries ---------------------------------------------------------------------------------


def is_record(value: Any, *keys: str) -> bool:
    """Whether ``value`` is an object that has all of ``keys``."""
    return isinstance(value, Mapping) and all(key in value for key in keys)


def all_records(entries: Sequence[Entry], *keys: str, without: Sequence[str] = ()) -> bool:
    """Whether every entry is an object with ``keys`` and with none of ``without``."""
    return all(
        is_record(entry.value, *keys) and not any(key in entry.value for key in without) for entry in entries
    )


def record(value: Any, *keys: str) -> Mapping[str, Any]:
    """``value`` as an object with all of ``keys``. Raises Unusable."""
    if not isinstance(value, Mapping):
        raise Unusable("not an object", f"a {type(value).__name__}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise Unusable("missing key", ", ".join(missing))
    return value


def listed(value: Any, name: str) -> Sequence[Any]:
    """``value`` as a list. Raises Unusable."""
    if not isinstance(value, list | tuple):
        raise Unusable("not a list", f"{name} is a {type(value).__name__}")
    return value


def paired(first: Any, second: Any, names: str) -> Iterator[tuple[Any, Any]]:
    """Two lists of one length, side by side. Raises Unusable."""
    a, b = listed(first, names), listed(second, names)
    if len(a) != len(b):
        raise Unusable("unequal lists", f"{names}: {len(a)} and {len(b)}")
    return zip(a, b, strict=True)


def given(spans: Any) -> Any:
    """``spans``, where a missing one is a fault and no unanswered question."""
    return () if spans is None else spans


def name_of(value: Any, what: str) -> str:
    """Text or a whole number as text. Raises Unusable."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Unusable("no name", f"{what} is a {type(value).__name__}")
    try:
        return str(value)
    except ValueError:  # thousands of digits
        raise Unusable("no name", f"{what} has too many digits") from None


def stem_of(video: Any) -> str:
    """The name of a file without folders and ending. Raises Unusable for anything but text."""
    return PurePosixPath(name_of(video, "the video")).stem


def kept(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Those of ``keys`` whose value is text or a number."""
    return {key: value[key] for key in keys if isinstance(value.get(key), str | int | float)}
