"""Public annotations become a data file: every question is checked, and what cannot be used is listed.

A span that ends past the video is cut to it and counted. A span that cannot be (reversed, empty, before the
start, wholly past the end, no numbers) is left out and listed; so is a question that has none left. Ids are
made of the source's own names, so that the same file gives the same ids on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from video_opd.convert import times
from video_opd.convert.formats import get_format, recognise, values, video_names
from video_opd.convert.formats.durations import SAME_S, Durations
from video_opd.convert.formats.fields import name_of
from video_opd.convert.formats.format import Format, Question, Unusable
from video_opd.convert.formats.sources import Source, open_source
from video_opd.convert.outcome import Conversion, Cut, Problem
from video_opd.convert.times import Clip
from video_opd.convert.videos import Videos, probed_duration_s
from video_opd.errors import UserError
from video_opd.files import need_another_file
from video_opd.jsonl import write_jsonl
from video_opd.progress import track

Clips = Literal["cut", "whole"]


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """How a source is converted.

    ``video_root`` is the folder of the videos. ``name`` replaces the source's name, in ids and rows.
    ``durations`` win over those of the annotations. ``probe`` asks the videos for durations that are still
    unknown, ``workers`` videos at a time. ``clips`` says what the files of rows about a clip hold: only that
    clip ("cut": times stay) or the whole video ("whole": times are moved by where the clip starts).
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
    """Writes ``out`` from ``input``; the format is recognised if it is not named.

    Raises UserError, and leaves ``out`` untouched, if the source is broken as a whole, if its format is
    unknown or ambiguous, if nothing in it can be used, or if ``out`` is the source itself.
    """
    settings = settings or ConvertSettings()
    source = open_source(input, settings.split)
    need_another_file("out", out, [("the input", source.path)])
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
    """One conversion: it turns entries into rows, and records what it noticed in ``result``."""

    def __init__(self, source: Source, format: Format, out: Path, settings: ConvertSettings) -> None:
        self.source, self.format, self.settings = source, format, settings
        self.result = Conversion(format=format.name, input=str(source.path), out=str(out))
        self.videos = Videos(settings.video_root, out.parent)
        self._ids: set[str] = set()
        self._keys: Counter[str] = Counter()
        self._lengths: dict[str, float] = {}
        self._probed: dict[str, float | None] = {}

    def rows(self) -> Iterator[dict[str, Any]]:
        if self.settings.probe:
            self._probe()
        for question in self._questions():
            try:
                row = self._row(question)
            except Unusable as problem:
                self._problem(question.where, "question", problem)
                continue
            self.result.written += 1
            yield row
        if self.result.written == 0:
            first = next((p.line() for p in self.result.problems if p.what == "question"), "it is empty")
            raise UserError(
                f"{self.source.path}: nothing in it can be used as {self.format.name} (first: {first}); "
                "name another format, or mend the file"
            )

    def _questions(self, *, count: bool = True) -> Iterator[Question]:
        entries = self.format.entries(self.source) if self.format.entries else self.source.entries()
        for entry in entries:
            questions = self.format.read(entry)
            while True:
                try:
                    question = next(questions)
                except StopIteration:
                    break
                except Unusable as problem:
                    if count:
                        self.result.read += 1
                        self._problem(entry.where, "question", problem)
                    break
                self.result.read += count
                yield question

    def _problem(self, where: str, what: Literal["question", "span"], problem: Unusable) -> None:
        self.result.problems.append(
            Problem(where=where, what=what, reason=problem.reason, detail=problem.detail)
        )

    # --- one row -------------------------------------------------------------------------------------

    def _row(self, question: Question) -> dict[str, Any]:
        identity = self._id(question)  # first: a question that is left out does not change the others' ids
        query = self._query(question)
        name = _video_name(question)
        video = self.videos.find(name)
        clip = times.read_clip(question.clip)
        duration_s = self._duration(question, name, video, clip)
        shift_s = clip[0] if clip and self.settings.clips == "whole" else 0.0
        spans = self._spans(question, identity, shift_s, duration_s)
        self._count(question, video, clip, duration_s, spans)
        row: dict[str, Any] = dict(question.extra)
        if clip:
            row["clip"] = list(clip)
        row = {"id": identity, "video": video, "query": query, "duration": duration_s, "spans": spans, **row}
        source = self.settings.name or (question.source if isinstance(question.source, str) else None)
        return row | {"source": source or self.format.name}

    def _id(self, question: Question) -> str:
        """``<source>:<key>``; a repeated key is numbered, in the order of the file."""
        prefix = "" if self.format.name == "video-opd" else f"{self.settings.name or self.format.name}:"
        repeat = self._keys[question.key]
        self._keys[question.key] += 1
        identity = f"{prefix}{question.key}" if repeat == 0 else f"{prefix}{question.key}#{repeat}"
        while identity in self._ids:
            identity += "'"
        self._ids.add(identity)
        if not identity.strip():
            raise Unusable("no name", "the id is empty")
        return _whole_text(identity)

    def _query(self, question: Question) -> str:
        if not isinstance(question.query, str):
            raise Unusable("no query", f"a {type(question.query).__name__}")
        query = self.format.clean(question.query)
        if not query:
            raise Unusable("no query", repr(question.query))
        return _whole_text(query)

    def _duration(self, question: Question, name: str, video: str, clip: Clip | None) -> float | None:
        whole = clip is not None and self.settings.clips == "whole"
        if (known := self.settings.durations.of(name)) is not None and (whole or clip is None):
            return known
        if not (whole or values.is_absent(question.duration_s)):
            return times.read_duration(question.duration_s)
        return self._probed.get(video)

    def _spans(
        self, question: Question, identity: str, shift_s: float, duration_s: float | None
    ) -> list[list[float]]:
        if values.is_absent(question.spans):
            return []
        spans = []
        last: Unusable | None = None
        pairs = times.listed_spans(question.spans)
        for pair in pairs:
            try:
                start_s, end_s = times.read_span(pair, shift_s, duration_s)
            except Unusable as problem:
                last = problem
                if len(pairs) > 1:
                    self._problem(question.where, "span", problem)
                continue
            if duration_s is not None and end_s > duration_s:
                if not question.ends_with_video:
                    cut = Cut(where=question.where, id=identity, from_s=end_s, to_s=duration_s)
                    self.result.cut.append(cut)
                end_s = duration_s
            spans.append([start_s, end_s])
        if not spans:
            raise last if last is not None else Unusable("no span")
        return spans

    def _count(
        self,
        question: Question,
        video: str,
        clip: Clip | None,
        duration_s: float | None,
        spans: list[list[float]],
    ) -> None:
        result = self.result
        result.videos.add(video)
        result.unannotated += values.is_absent(question.spans)
        result.without_duration += duration_s is None
        result.on_clips += clip is not None and clip[0] > 0
        if question.note:
            result.notes[question.note] += 1
        if video in self.videos.missing:
            result.not_found.add(video)
        if duration_s is not None:
            first_s = self._lengths.setdefault(video, duration_s)
            if abs(first_s - duration_s) > SAME_S:
                result.of_two_lengths.add(video)
            for _, end_s in spans:
                result.latest_end = max(result.latest_end or 0.0, end_s / duration_s)

    # --- videos --------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Asks the videos for the durations that are stated nowhere."""
        wanted = {}
        for question in self._questions(count=False):
            try:
                name = _video_name(question)
                video = self.videos.find(name)
                if self._duration(question, name, video, times.read_clip(question.clip)) is None:
                    wanted[video] = self.videos.folder / video
            except Unusable:
                continue  # it is listed when its row is made
        with ThreadPoolExecutor(self.settings.workers) as pool:
            lengths = pool.map(probed_duration_s, wanted.values())
            lengths = track(lengths, "reading durations", len(wanted))
            self._probed = dict(zip(wanted, lengths, strict=True))


def _whole_text(text: str) -> str:
    """``text``. Raises Unusable if it holds half of a surrogate pair: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("broken text", repr(text)) from None
    return text


def _video_name(question: Question) -> str:
    name = question.video
    if isinstance(name, int | float) and not isinstance(name, bool):
        name = name_of(name, "the video")
    if not isinstance(name, str):
        raise Unusable("no video", values.shown(name))
    return video_names.video_path(name)
