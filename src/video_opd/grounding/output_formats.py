"""Writes the answers for one video as text for people, JSON, SubRip or CSV. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from video_opd.grounding.ground import GroundedAnswer
from video_opd.temporal import Interval
from video_opd.terminal import visible

COLUMNS = (
    "query",
    "start",
    "end",
    "text",
    "rule",
    "clamped",
    "truncated",
    "logprob",
    "agreement",
    "window_start",
    "window_end",
    "frames",
    "thinned",
)


def as_text(video: Path, answers: Sequence[GroundedAnswer]) -> str:
    """One line for each answer, with the query before it if there are several, and its samples below it."""
    lines = []
    for answer in answers:
        lines.append(answer.line() if len(answers) == 1 else f"{answer.query}: {answer.line()}")
        shown = "the window" if len(answer.windows) > 1 else "the video"
        counts = Counter(response.line(shown) for response in answer.samples)
        lines += [f"  {count} × {line}" for line, count in counts.most_common()]
    return "\n".join(map(visible, lines))


def as_json(video: Path, answers: Sequence[GroundedAnswer]) -> str:
    record = {"video": str(video), "answers": [answer.to_json() for answer in answers]}
    return json.dumps(record, indent=2, ensure_ascii=False)


def as_srt(video: Path, answers: Sequence[GroundedAnswer]) -> str:
    """One cue for each answer with a span, in the order of time; its text is the query."""
    spans = sorted((answer.span, answer.query) for answer in answers if answer.span is not None)
    return "\n".join(_cue(number, span, query) for number, (span, query) in enumerate(spans, start=1))


def _cue(number: int, span: Interval, query: str) -> str:
    start_ms, end_ms = (round(time_s * 1000) for time_s in span)
    end_ms = max(end_ms, start_ms + 1)  # players do not show a cue of length 0
    text = visible(" ".join(query.split())).replace("-->", "→")  # an arrow would begin another cue
    # Players read <b> and {\\an8} as marks of style; other brackets are shown as they are.
    text = re.sub(r"<(?=[A-Za-z/!])", "‹", text).replace("{\\", "{ \\")
    return f"{number}\n{time_code(start_ms)} --> {time_code(end_ms)}\n{text}\n"


def time_code(time_ms: int) -> str:
    """A time as SubRip writes it: ``00:00:12,540``."""
    seconds, milliseconds = divmod(time_ms, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d},{milliseconds:03d}"


def cell(text: str) -> str:
    """Text as a field of a CSV file: a spreadsheet shows it, and does not run it as a formula.

    An apostrophe before ``=``, ``+``, ``-`` or ``@`` says that text follows. Control characters, carriage
    returns among them, are written as escapes.
    """
    text = visible(text, keep="\n\t")
    return f"'{text}" if text.lstrip()[:1] in _FORMULA else text


_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def as_csv(video: Path, answers: Sequence[GroundedAnswer]) -> str:
    """A header, and one row for each answer; a missing value is an empty field."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for answer in answers:
        start_s, end_s = ("", "") if answer.span is None else (f"{x:.3f}" for x in answer.span)
        writer.writerow(
            [
                cell(answer.query),
                start_s,
                end_s,
                cell(answer.text),
                cell(answer.rule),
                json.dumps(answer.clamped),
                json.dumps(answer.truncated),
                f"{answer.logprob:.4f}",
                "" if answer.agreement is None else f"{answer.agreement:.4f}",
                *(f"{x:.3f}" for x in answer.best.window),
                answer.frames,
                json.dumps(answer.thinned),
            ]
        )
    return file.getvalue().rstrip("\n")


FORMATS: Mapping[str, Callable[[Path, Sequence[GroundedAnswer]], str]] = {
    "text": as_text,
    "json": as_json,
    "srt": as_srt,
    "csv": as_csv,
}
