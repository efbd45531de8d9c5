"""Reads and writes data files. Each line asks one question about one video; all lines are checked first.

``{"id": str, "video": path, "query": str, "duration": seconds, "spans": [[start_s, end_s], …],
"source": str?}``. :attr:`Sample.row` keeps the keys that are not known.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.files import relative_path
from video_opd.jsonl import read_lines, write_jsonl
from video_opd.temporal import MOST_SECONDS
from video_opd.types import Sample

logger = logging.getLogger(__name__)

REQUIRED_KEYS = ("id", "video", "query")
KNOWN_KEYS = (*REQUIRED_KEYS, "duration", "spans", "source")
# A key counts as a misspelling of a known one if difflib finds them this alike (0 to 1) and their lengths
# differ by at most this many letters.
_LIKENESS, _MOST_LETTERS = 0.8, 2


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A line that cannot be used as a row."""

    line: int
    id: str | None  # None where the line has none
    message: str  # names file and line


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The samples of a data file, and what reading it found."""

    samples: tuple[Sample, ...]
    clamped: tuple[tuple[int, str], ...]  # (line, id) of rows with a span cut to the video's duration
    unannotated: int  # rows without spans
    faults: tuple[Fault, ...] = ()  # lines that are wrong; filled only with ``keep_faults``


def read_samples(path: str | Path, video_root: str | Path | None = None) -> list[Sample]:
    """Returns the samples of a data file. A warning says how many spans were cut to the duration.

    Raises UserError as :func:`read_annotations` does.
    """
    annotations = read_annotations(path, video_root)
    if annotations.clamped:
        line, first = annotations.clamped[0]
        logger.warning(
            "%s: %d of %d rows have a span past the video's end, cut to it (first: line %d, id %s)",
            path, len(annotations.clamped), len(annotations.samples), line, first,
        )  # fmt: skip
    return list(annotations.samples)


def read_annotations(
    path: str | Path, video_root: str | Path | None = None, *, keep_faults: bool = False
) -> Annotations:
    """Reads and checks a data file.

    Video paths are relative to ``video_root``, or to the data file's folder. They are not opened here. A span
    that ends past ``duration`` is cut to it and counted. Anything else that is wrong raises UserError, which
    names the line: a broken line, a missing key, an id that was used before, a span that is reversed, empty,
    negative, not a number, or entirely past the end. With ``keep_faults`` such a line is left out and listed
    instead, and only a file that cannot be opened raises.
    """
    path = Path(path)
    root = Path(video_root) if video_root is not None else path.parent
    samples: list[Sample] = []
    clamped: list[tuple[int, str]] = []
    lines: dict[str, int] = {}
    faults: list[Fault] = []
    for line, row in read_lines(path):
        where = f"{path}:{line}"
        try:
            if isinstance(row, UserError):
                raise row
            sample, cut = _sample(row, where, root)
            if sample.id in lines:
                first = lines[sample.id]
                raise UserError(
                    f"{where}: id {sample.id!r} is already used on line {first}; ids must be unique"
                )
        except UserError as error:
            if not keep_faults:
                raise
            identity = None if isinstance(row, UserError) else row.get("id")
            known = identity if isinstance(identity, str) else None
            faults.append(Fault(line=line, id=known, message=str(error)))
            continue
        lines[sample.id] = line
        samples.append(sample)
        if cut:
            clamped.append((line, sample.id))
    return Annotations(
        samples=tuple(samples),
        clamped=tuple(clamped),
        unannotated=sum(not s.spans for s in samples),
        faults=tuple(faults),
    )


def misspelt_keys(row: Mapping[str, Any]) -> dict[str, str]:
    """Keys of the row that look like a misspelling of a known key which the row lacks: ``{"span": "spans"}``.

    Other unknown keys are allowed.
    """
    unknown = {key.lower(): key for key in row if key not in KNOWN_KEYS}
    found = {}
    for name in KNOWN_KEYS:
        if name not in row:
            near = [key for key in unknown if abs(len(key) - len(name)) <= _MOST_LETTERS]
            found.update({unknown[key]: name for key in difflib.get_close_matches(name, near, 1, _LIKENESS)})
    return found


def write_rows(path: str | Path, rows: Iterable[Sample | Mapping[str, Any]]) -> None:
    """Writes a data file atomically.

    A Sample is written with its unknown keys. Its video path is made relative to the folder of the new file,
    so that the file can be read without a video root. A mapping is written unchanged.
    """
    folder = Path(path).parent
    write_jsonl(path, (_row(row, folder) if isinstance(row, Sample) else row for row in rows))


def _row(sample: Sample, folder: Path) -> dict[str, Any]:
    row = dict(sample.row) | {
        "id": sample.id,
        "video": relative_path(sample.video, folder),
        "query": sample.query,
        "duration": sample.duration_s,
        "spans": [list(span) for span in sample.spans],
    }
    return row if sample.source is None else row | {"source": sample.source}


def _sample(row: dict[str, Any], where: str, root: Path) -> tuple[Sample, bool]:
    missing = [key for key in REQUIRED_KEYS if key not in row]
    if missing:
        hints = [f"; {key!r}: did you mean {name!r}?" for key, name in misspelt_keys(row).items()]
        raise UserError(
            f"{where}: no {', '.join(map(repr, missing))}; a row needs id, video and query{''.join(hints)}"
        )
    for key in REQUIRED_KEYS:
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{where}: {key!r} is {row[key]!r}; it must be a string that is not empty")
    for key in ("id", "query"):
        try:
            row[key].encode()
        except UnicodeEncodeError:  # no tokenizer takes it
            raise UserError(
                f"{where}: {key!r} is {row[key]!r}, which holds half a surrogate pair; mend the text"
            ) from None
    source = row.get("source")
    if source is not None and not isinstance(source, str):
        raise UserError(f"{where}: 'source' is {source!r}; it must be a string")
    duration_s = row.get("duration")
    if duration_s is not None:
        duration_s = _number(duration_s, f"{where}: 'duration'")
        if duration_s <= 0:
            raise UserError(f"{where}: 'duration' is {duration_s:g}; it must be more than 0 seconds")
    spans, cut = _spans(row.get("spans"), duration_s, where)
    sample = Sample(
        id=row["id"],
        video=root / row["video"],
        query=row["query"],
        duration_s=duration_s,
        spans=spans,
        source=source,
        row=row,
    )
    return sample, cut


def _spans(value: Any, duration_s: float | None, where: str) -> tuple[tuple[tuple[float, float], ...], bool]:
    if value is None:
        return (), False
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(f"{where}: 'spans' is {value!r}; write a list of pairs, as [[12.5, 17.8]]")
    spans: list[tuple[float, float]] = []
    cut = False
    for start, end in value:
        start_s, end_s = _number(start, f"{where}: a span's start"), _number(end, f"{where}: a span's end")
        if start_s < 0:
            raise UserError(f"{where}: span {[start, end]} starts before 0; times are seconds from the start")
        if end_s <= start_s:
            raise UserError(f"{where}: span {[start, end]} does not end after it starts; write [start, end]")
        if duration_s is not None and end_s > duration_s:
            if start_s >= duration_s:
                raise UserError(
                    f"{where}: span {[start, end]} lies past the duration, {duration_s:g} s; mend either"
                )
            end_s, cut = duration_s, True
        spans.append((start_s, end_s))
    return tuple(spans), cut


def _number(value: Any, what: str) -> float:
    # Python counts JSON's true as an int, its json module reads NaN and Infinity, and an integer of hundreds
    # of digits does not fit into a float. None of these is a time.
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if abs(number := float(value)) <= MOST_SECONDS:
                return number
    raise UserError(f"{what} is {reprlib.repr(value)}; it must be a number of seconds")
