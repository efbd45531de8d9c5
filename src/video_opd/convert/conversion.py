"""Public annotations become a data file: every question is checked, mended where that is clear, or listed.

A span that ends past the video is cut to it and counted. A span that cannot be (reversed, empty, before the
start, wholly past the end, no numbers) is left out and listed; so is a question that has none left. Ids are
made of the source's own names, so that the same file gives the same ids on every machine.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from video_opd.convert.formats import get_format, recognise
from video_opd.convert.formats.durations import Durations
from video_opd.convert.formats.records import Format, Raw, Unusable
from video_opd.convert.formats.sources import Source, open_source
from video_opd.errors import UserError
from video_opd.jsonl import write_jsonl
from video_opd.progress import track

Clips = Literal["cut", "whole"]

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_DIGITS = 6  # of a time that was moved by a clip's start: no more than rounding errors lie beyond
_SAME_S = 1.0  # two durations of one video that differ by less are one


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that was left out: a question (``what`` is "question") or one of its spans."""

    where: str
    what: Literal["question", "span"]
    reason: str
    detail: str

    def line(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A span whose end was moved to the end of the video."""

    where: str
    id: str
    from_s: float
    to_s: float


@dataclass(kw_only=True)
class Conversion:
    """What became of a source. ``read`` questions are ``written`` or have a problem."""

    format: str
    input: str
    out: str
    read: int = 0
    written: int = 0
    unannotated: int = 0  # written without spans, as they were
    without_duration: int = 0
    on_clips: int = 0  # whose times count from the start of a part of the video
    videos: set[str] = field(default_factory=set)
    not_found: set[str] = field(default_factory=set)  # videos that are not under the video root
    of_two_lengths: set[str] = field(default_factory=set)  # videos with more than one duration
    cut: list[Cut] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        return sum(problem.what == "question" for problem in self.problems)

    @property
    def reasons(self) -> dict[str, int]:
        """How many questions were left out, by reason; the most frequent first."""
        return dict(Counter(p.reason for p in self.problems if p.what == "question").most_common())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "input": self.input,
            "out": self.out,
            "read": self.read,
            "written": self.written,
            "dropped": self.dropped,
            "dropped_by_reason": self.reasons,
            "dropped_spans": len(self.problems) - self.dropped,
            "clamped": len(self.cut),
            "unannotated": self.unannotated,
            "without_duration": self.without_duration,
            "on_clips": self.on_clips,
            "videos": len(self.videos),
            "videos_not_found": sorted(self.not_found),
            "videos_of_two_lengths": sorted(self.of_two_lengths),
            "clamped_spans": [vars(cut) for cut in self.cut],
            "problems": [vars(problem) for problem in self.problems],
        }


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """``video_root``: where the videos are. ``name``: of the source, instead of the format's and the rows'.

    ``durations`` win over those of the annotations. ``probe`` asks the videos for those that are still not
    known, ``workers`` at a time. ``clips``: whether the files of rows about a part of a video hold only
    that part (times stay) or the whole video (times are moved by where the part starts).
    """

    video_root: str | Path | None = None
    name: str | None = None
    durations: Durations = field(default_factory=lambda: Durations({}))
    probe: bool = False
    workers: int = 4
    clips: Clips = "cut"
    split: str | None = None


def convert(
    input: str | Path, out: str | Path, format: str | None = None, settings: ConvertSettings | None = None
) -> Conversion:
    """Writes ``out`` from ``input``; the format is recognised where it is not named.

    Raises UserError for a source that is broken as a whole, of an unknown or ambiguous format, and when
    nothing of it can be used; ``out`` is untouched then.
    """
    settings = settings or ConvertSettings()
    source = open_source(input, settings.split)
    try:
        chosen = get_format(format) if format else recognise(source)
        if source.kind not in chosen.kinds:
            kinds = " or ".join(chosen.kinds)
            raise UserError(
                f"{source.path}: holds {source.kind}, {chosen.name} needs {kinds}; name another format"
            )
        work = _Work(source, chosen, Path(out), settings)
        write_jsonl(out, work.rows())
    except RecursionError:
        raise UserError(f"{source.path}: nested too deeply to be annotations; check the file") from None
    return work.result


class _Work:
    """One conversion: from entries to rows, and what was noticed on the way."""

    def __init__(self, source: Source, format: Format, out: Path, settings: ConvertSettings) -> None:
        self.source, self.format, self.settings = source, format, settings
        self.result = Conversion(format=format.name, input=str(source.path), out=str(out))
        self.videos = _Videos(settings.video_root, out.parent)
        self._ids: set[str] = set()
        self._keys: Counter[str] = Counter()
        self._lengths: dict[str, float] = {}
        self._probed: dict[str, float | None] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        if self.settings.probe:
            self._probe()
        for raw in self._questions():
            try:
                row = self._row(raw)
            except Unusable as problem:
                self._problem(raw.where, "question", problem)
                continue
            self.result.written += 1
            yield row
        if self.result.written == 0:
            first = next((p.line() for p in self.result.problems if p.what == "question"), "it is empty")
            raise UserError(
                f"{self.source.path}: nothing in it can be used as {self.format.name} (first: {first}); "
                "name another format, or mend the file"
            )

    def _questions(self, *, count: bool = True) -> Iterator[Raw]:
        entries = self.format.entries(self.source) if self.format.entries else self.source.entries()
        for entry in entries:
            questions = self.format.read(entry)
            while True:
                try:
                    raw = next(questions)
                except StopIteration:
                    break
                except Unusable as problem:
                    if count:
                        self.result.read += 1
                        self._problem(entry.where, "question", problem)
                    break
                self.result.read += count
                yield raw

    def _problem(self, where: str, what: Literal["question", "span"], problem: Unusable) -> None:
        self.result.problems.append(
            Problem(where=where, what=what, reason=problem.reason, detail=problem.detail)
        )

    # --- one row -------------------------------------------------------------------------------------

    def _row(self, raw: Raw) -> dict[str, Any]:
        identity = self._id(raw)  # first: a question that is left out does not change the others' ids
        query = self._query(raw)
        name = _video_name(raw)
        video = self.videos.find(name, is_id=raw.video_id is not None)
        clip = _clip(raw.clip)
        duration_s = self._duration(raw, name, video, clip)
        shift_s = clip[0] if clip and self.settings.clips == "whole" else 0.0
        spans = self._spans(raw, identity, shift_s, duration_s)
        self._count(raw, video, clip, duration_s, name)
        row: dict[str, Any] = dict(raw.extra)
        if clip:
            row["clip"] = list(clip)
        row = {"id": identity, "video": video, "query": query, "duration": duration_s, "spans": spans, **row}
        source = self.settings.name or (raw.source if isinstance(raw.source, str) else None)
        return row | {"source": source or self.format.name}

    def _id(self, raw: Raw) -> str:
        """``<source>:<key>``; a repeated key is numbered, in the order of the file."""
        prefix = "" if self.format.name == "video-opd" else f"{self.settings.name or self.format.name}:"
        repeat = self._keys[raw.key]
        self._keys[raw.key] += 1
        identity = f"{prefix}{raw.key}" if repeat == 0 else f"{prefix}{raw.key}#{repeat}"
        while identity in self._ids:
            identity += "'"
        self._ids.add(identity)
        return identity

    def _query(self, raw: Raw) -> str:
        if not isinstance(raw.query, str):
            raise Unusable("no query", f"a {type(raw.query).__name__}")
        query = self.format.clean(raw.query)
        if not query:
            raise Unusable("no query", repr(raw.query))
        try:
            query.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: no tokenizer takes it
            raise Unusable("broken text", repr(query)) from None
        return query

    def _duration(
        self, raw: Raw, name: str, video: str, clip: tuple[float, float | None] | None
    ) -> float | None:
        whole = clip is not None and self.settings.clips == "whole"
        if (known := self.settings.durations.of(name)) is not None and (whole or clip is None):
            return known
        if raw.duration_s is not None and not whole:
            duration_s = _number(raw.duration_s)
            if duration_s is None or duration_s <= 0:
                raise Unusable("impossible duration", _short(raw.duration_s))
            return duration_s
        return self._probed.get(video)

    def _spans(self, raw: Raw, identity: str, shift_s: float, duration_s: float | None) -> list[list[float]]:
        if raw.spans is None:
            return []
        spans = []
        last: Unusable | None = None
        pairs = _pairs(raw.spans)
        for pair in pairs:
            try:
                start_s, end_s = _span(pair, shift_s, duration_s)
            except Unusable as problem:
                last = problem
                if len(pairs) > 1:
                    self._problem(raw.where, "span", problem)
                continue
            if duration_s is not None and end_s > duration_s:
                if not raw.ends_with_video:
                    self.result.cut.append(Cut(where=raw.where, id=identity, from_s=end_s, to_s=duration_s))
                end_s = duration_s
            spans.append([start_s, end_s])
        if not spans:
            raise last if last is not None else Unusable("no span")
        return spans

    def _count(
        self,
        raw: Raw,
        video: str,
        clip: tuple[float, float | None] | None,
        duration_s: float | None,
        name: str,
    ) -> None:
        result = self.result
        result.videos.add(video)
        result.unannotated += raw.spans is None
        result.without_duration += duration_s is None
        result.on_clips += clip is not None and clip[0] > 0
        if video in self.videos.missing:
            result.not_found.add(video)
        if duration_s is not None:
            first_s = self._lengths.setdefault(video, duration_s)
            if abs(first_s - duration_s) > _SAME_S:
                result.of_two_lengths.add(video)

    # --- videos --------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Asks the videos whose duration is stated nowhere."""
        wanted = {}
        for raw in self._questions(count=False):
            try:
                name = _video_name(raw)
                video = self.videos.find(name, is_id=raw.video_id is not None)
                if self._duration(raw, name, video, _clip(raw.clip)) is None:
                    wanted[video] = self.videos.folder / video
            except Unusable:
                continue  # it is listed when its row is made
        with ThreadPoolExecutor(self.settings.workers) as pool:
            lengths = track(pool.map(_length, wanted.values()), "reading durations", len(wanted))
            self._probed = dict(zip(wanted, lengths, strict=True))


class _Videos:
    """Where videos are. Names come back relative to ``folder``, the new file's; under an absolute root,
    absolute. So the new file reads without a root."""

    def __init__(self, root: str | Path | None, folder: Path) -> None:
        self.root = None if root is None else Path(root)
        self.folder = folder
        self.missing: set[str] = set()
        self._known: dict[tuple[str, bool], str] = {}
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; --video-root names the folder of the videos")

    def find(self, name: str, *, is_id: bool) -> str:
        """The first that is there: the name as it is, with another ending, with leading folders left out.

        Without a root, or where none is there: the name, as .mp4 where it has no ending.
        """
        if (name, is_id) not in self._known:
            self._known[name, is_id] = self._find(name, is_id)
        return self._known[name, is_id]

    def _find(self, name: str, is_id: bool) -> str:
        plain = f"{name}{VIDEO_SUFFIXES[0]}" if is_id else PurePosixPath(name).as_posix()
        if self.root is None:
            return plain
        parts = PurePosixPath(plain).parts
        tails = [PurePosixPath(*parts[i:]) for i in range(len(parts))]
        stem = name if is_id else None
        for tail in tails:
            for candidate in _endings(tail, stem):
                if os.path.isfile(self.root / candidate):
                    return self._relative(candidate)
        found = self._relative(PurePosixPath(plain))
        self.missing.add(found)
        return found

    def _relative(self, path: PurePosixPath) -> str:
        assert self.root is not None
        if self.root.is_absolute():
            return (self.root / path).as_posix()
        return Path(os.path.relpath(self.root / path, self.folder)).as_posix()


def _endings(path: PurePosixPath, stem: str | None) -> Iterator[PurePosixPath]:
    """The path, then the same with each ending. ``stem``: the name without one, dots included."""
    yield path
    base = path.stem if stem is None else PurePosixPath(stem).name
    for suffix in VIDEO_SUFFIXES:
        yield path.with_name(f"{base}{suffix}")


def _video_name(raw: Raw) -> str:
    name = raw.video if raw.video_id is None else raw.video_id
    if not isinstance(name, str) or not name.strip() or "\0" in name or not PurePosixPath(name).name:
        raise Unusable("no video", _short(name))
    return name


def _length(path: Path) -> float | None:
    from video_opd.data.video import VideoError, probe

    try:
        return probe(path).duration_s
    except (VideoError, OSError):
        return None


# --- numbers -----------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _clip(value: Any) -> tuple[float, float | None] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise Unusable("impossible clip", _short(value))
    start_s, end_s = _number(value[0]), None if value[1] is None else _number(value[1])
    if start_s is None or start_s < 0 or (value[1] is not None and (end_s is None or end_s <= start_s)):
        raise Unusable("impossible clip", _short(value))
    return start_s, end_s


def _pairs(spans: Any) -> Sequence[Any]:
    """A list of spans; a single one, flat, is a list of it."""
    if not isinstance(spans, list | tuple):
        raise Unusable("not a span", _short(spans))
    if spans and all(not isinstance(item, list | tuple | Mapping) for item in spans):
        return [spans]
    return spans


def _span(pair: Any, shift_s: float, duration_s: float | None) -> tuple[float, float]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise Unusable("not a span", _short(pair))
    start_s, end_s = _number(pair[0]), _number(pair[1])
    if start_s is None or end_s is None:
        raise Unusable("not numbers", _short(pair))
    said = f"{start_s:g} to {end_s:g}"
    if end_s <= start_s:
        raise Unusable("reversed span" if end_s < start_s else "empty span", said)
    if start_s < 0:
        raise Unusable("starts before 0", said)
    if shift_s:
        start_s, end_s = round(start_s + shift_s, _DIGITS), round(end_s + shift_s, _DIGITS)
    if duration_s is not None and start_s >= duration_s:
        raise Unusable("past the end", f"{said}, the video lasts {duration_s:g}")
    if end_s <= start_s:  # closer than numbers of that size can tell apart
        raise Unusable("empty span", said)
    return start_s, end_s


def _short(value: Any) -> str:
    """For people: what is there, cut where it is long."""
    plain = (str, int, float, type(None))
    if isinstance(value, list | tuple):
        value = [item if isinstance(item, plain) else type(item).__name__ for item in value[:3]]
    elif not isinstance(value, plain):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # an integer too long to be written
        return "a number of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
