"""The records of data convert, data check and data stats, as lines for people. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from video_opd.convert.formats import FORMATS
from video_opd.terminal import bar

if TYPE_CHECKING:
    from video_opd.convert.outcome import Conversion

MOST_SHOWN = 10  # most problems that are shown of one reason; --json has all
MOST_NAMED = 3  # most names in a line
_BAR_WIDTH = 40


def format_lines() -> Iterator[str]:
    width = max(map(len, FORMATS))
    for name, format in FORMATS.items():
        yield f"{name:{width}}  {format.layout}"


def conversion_lines(result: Conversion) -> Iterator[str]:
    yield from _problems((p.reason, p.line()) for p in result.problems)
    yield (
        f"{result.out}: {result.written} of {counted(result.read, 'questions')} written, "
        f"on {counted(len(result.videos), 'videos')} ({result.format})"
    )
    notes = (
        (result.dropped, f"left out: {', '.join(f'{n} {reason}' for reason, n in result.reasons.items())}"),
        (len(result.problems) - result.dropped, "spans left out of questions that have others"),
        (len(result.cut), "spans past the end of the video, cut to it"),
        (result.unannotated, "questions without spans, as in the source"),
        (result.without_duration, "rows without a duration: give --durations FILE, or --probe"),
        (result.on_clips, "rows about a clip of a video" + _CLIPS),
        *((count, note) for note, count in result.notes.items()),
        (len(result.not_found), f"videos not found under the video root: {_first(sorted(result.not_found))}"),
        (len(result.of_two_lengths), "videos with more than one duration: files of clips share a name"),
    )
    for count, note in notes:
        if count:
            yield f"  {counted(count, note)}"
    if result.ends_early:
        yield (
            f"  all spans end within the first {result.latest_end:.1%} of their videos: "
            "are durations in milliseconds, or spans in minutes? Both must be seconds"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", …; --json lists all" if len(names) > MOST_NAMED else "")


_CLIPS = ": times count from its start, so the file must hold only that clip; or convert with --clips whole"


def counted(count: int, what: str) -> str:
    """``3 rows without spans``; the first word is in the singular if the count is 1."""
    noun, space, rest = what.partition(" ")
    if count == 1:
        noun = f"{noun[:-3]}y" if noun.endswith("ies") else noun.removesuffix("s")
    return f"{count:,} {noun}{space}{rest}"


def _problems(found: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lines of (reason, line) pairs, grouped by reason; the first few of each reason."""
    by_reason = sorted(found, key=lambda pair: pair[0])  # stable: within a reason, the order of the file
    for _, group in groupby(by_reason, key=lambda pair: pair[0]):
        lines = [line for _, line in group]
        yield from lines[:MOST_SHOWN]
        if len(lines) > MOST_SHOWN:
            yield f"  … and {len(lines) - MOST_SHOWN} more like this; --json lists all"


def check_lines(record: dict[str, Any]) -> Iterator[str]:
    """The record of ``data check``."""
    yield from _problems((problem["kinds"][0], _problem_line(problem)) for problem in record["problems"])
    kinds = ", ".join(f"{count} {kind}" for kind, count in record["by_kind"].items())
    if record["rows"]:
        yield (
            f"{counted(record['rows'], 'rows')}, {counted(record['videos'], 'videos')}: "
            + counted(len(record["problems"]), "rows with problems")
            + (f" ({kinds})" if kinds else "")
            + f", {counted(record['clamped'], 'spans cut to the duration')}, "
            f"{counted(record['unannotated'], 'rows without spans')}; tolerance {record['tolerance_s']:g} s"
        )
    if late := record["late"]:
        most = max(late, key=lambda video: video["late_s"])
        yield (
            f"{counted(len(late), 'videos')} with pictures that begin later than the file, up to "
            f"{most['late_s']:.2f} s ({most['video']}): a player shows them later by that, so spans "
            "annotated in one are late; --json lists all"
        )
    if record["good"]:
        yield f"{record['good']}: {counted(record['written'], 'rows without problems')}"


def _problem_line(problem: dict[str, Any]) -> str:
    if problem["video"] is None:
        return str(problem["problem"])  # names the file, the line and the row
    return f"{problem['id']}: {problem['problem']} ({problem['video']})"


def stats_lines(record: dict[str, Any]) -> Iterator[str]:
    """The record of :func:`video_opd.convert.describe.describe`."""
    if not record["rows"]:
        yield "no rows in it: there is nothing to describe; check the path"
        return
    yield f"{counted(record['rows'], 'rows')} on {counted(record['videos'], 'videos')}"
    notes = (
        ("unannotated", "rows without spans"),
        ("clamped", "rows with a span cut to the duration"),
        ("without_duration", "rows without a duration"),
        ("asked_twice", "queries repeated on the same video"),
    )
    for key, note in notes:
        if record[key]:
            yield f"  {counted(record[key], note)}"
    if record["duration_s"]:
        yield f"  {record['duration_s']['total'] / 3600:,.1f} hours of video"
    yield ""
    yield from _spread_table(record)
    for key, title in _HISTOGRAMS:
        if record[key]:
            yield ""
            yield from histogram_lines(title, record[key]["histogram"])
    if len(record["sources"]) > 1:
        yield ""
        width = max(map(len, record["sources"]))
        for source, rows in record["sources"].items():
            yield f"{source:{width}} {rows:8,} rows  {bar(rows / record['rows'], 24)}".rstrip()
    yield ""
    yield from _token_lines(record["tokens"])


_HISTOGRAMS = (
    ("duration_s", "duration of the videos, s"),
    ("span_s", "length of the spans, s"),
    ("span_share", "length of the spans, share of the duration"),
    ("start_share", "where spans begin, share of the duration"),
    ("end_share", "where spans end, share of the duration"),
)
_SPREADS = (
    ("duration_s", "duration of a video, s"),
    ("span_s", "length of a span, s"),
    ("span_share", "length of a span, share"),
    ("start_share", "begin of a span, share"),
    ("end_share", "end of a span, share"),
    ("spans_a_row", "spans a row"),
    ("annotation_iou", "IoU of a span with the true one"),
    ("queries_a_video", "queries a video"),
    ("words_a_query", "words a query"),
)
_COLUMNS = ("min", "p5", "median", "mean", "p95", "max")


def _spread_table(record: dict[str, Any]) -> Iterator[str]:
    shown = [(label, record[key]) for key, label in _SPREADS if record[key]]
    if record["tokens"]:
        shown.append(("tokens of a video", record["tokens"]["a_video"]))
        shown.append(("frames of a video", record["tokens"]["frames_a_video"]))
    width = max((len(label) for label, _ in shown), default=0)
    yield f"{'':{width}}" + "".join(f" {name:>9}" for name in _COLUMNS)
    for label, spread in shown:
        yield f"{label:{width}}" + "".join(f" {_short(spread[name]):>9}" for name in _COLUMNS)


def _token_lines(tokens: dict[str, Any] | None) -> Iterator[str]:
    if tokens is None:
        yield "tokens: not counted; give --size WxH, or open the videos with --probe"
        return
    budget = tokens["budget"]
    size = "their own size" if tokens["size"] is None else f"{tokens['size'][0]}x{tokens['size'][1]}"
    yield (
        f"tokens: {tokens['all_rows']:,} to prefill every row once, {tokens['all_videos']:,} if a video is "
        f"prefilled once for all its rows ({tokens['videos']:,} videos at {size})"
    )
    yield (
        f"  budget: {budget['fps']:g} fps, at most {budget['max_frames']} frames and "
        f"{budget['max_video_tokens']:,} tokens; {tokens['at_the_bound']:,} videos are within 5% of the bound"
    )
    yield from histogram_lines("tokens of a video", tokens["a_video"]["histogram"])


def histogram_lines(title: str, histogram: dict[str, Any]) -> Iterator[str]:
    """A line for each bin: its edges, its count, and a bar."""
    edges: Sequence[float] = histogram["edges"]
    counts: Sequence[int] = histogram["counts"]
    yield title
    labels = [f"{_short(a)}–{_short(b)}" for a, b in pairwise(edges)]
    if histogram["open_end"]:
        labels[-1] = f"{_short(edges[-2])}–"
    width = max(map(len, labels))
    for label, count in zip(labels, counts, strict=True):
        yield f"  {label:>{width}} {count:8,} {bar(count / max(counts), _BAR_WIDTH)}".rstrip()


def _short(value: float) -> str:
    if value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
