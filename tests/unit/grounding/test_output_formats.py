"""Answers about one video as text, JSON, SubRip and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from video_opd.grounding.ground import GroundedAnswer, Response, WindowAnswer
from video_opd.grounding.output_formats import COLUMNS, FORMATS, as_csv, as_json, as_srt, as_text, time_code
from video_opd.temporal import Interval

VIDEO = Path("v.mp4")


def response(span: Interval | None, text: str = "", **changes: object) -> Response:
    facts = {"rule": "exact" if span else "none", "clamped": False, "truncated": False, "logprob": -0.25}
    return Response(text=text or f"{span}", span=span, **{**facts, **changes})  # type: ignore[arg-type]


def answer(
    query: str,
    span: Interval | None,
    *,
    samples: tuple[Response, ...] = (),
    agreement: float | None = None,
    windows: int = 1,
    duration_s: float = 60.0,
    **changes: object,
) -> GroundedAnswer:
    shown = [
        WindowAnswer(
            window=(i * duration_s / windows, (i + 1) * duration_s / windows),
            response=response(span, **changes),  # type: ignore[arg-type]
            samples=samples,
            agreement=agreement,
            frames=120,
            video_tokens=960,
            thinned=False,
        )
        for i in range(windows)
    ]
    return GroundedAnswer(query=query, duration_s=duration_s, windows=tuple(shown))


def test_text_by_hand() -> None:
    samples = (response((12.54, 17.83)), response((12.54, 17.83)), response(None, "hm"))
    one = answer("the cup falls", (12.54, 17.83), samples=samples, agreement=1 / 3)
    assert as_text(VIDEO, [one]).splitlines() == [
        "00:12.54 → 00:17.83 (5.3 s) [agreement of 3 samples 0.33]",
        "  2 × 00:12.54 → 00:17.83 (5.3 s)",
        "  1 × no answer: the model wrote 'hm' (no time span in it)",
    ]
    several = as_text(VIDEO, [answer("a", (3723.0, 3725.5), duration_s=4000.0), answer("b", None, text="7")])
    assert several.splitlines() == [
        "a: 1:02:03.00 → 1:02:05.50 (2.5 s)",
        "b: no answer: the model wrote '7' (no time span in it)",
    ]
    searched = answer("a", (1.0, 2.0), windows=3, clamped=True)
    assert searched.line() == (
        "00:01.00 → 00:02.00 (1.0 s) [cut to the window; best of 3 windows: 00:00.00 to 00:20.00]"
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"clamped": True, "rule": "exact"}, "outside the video"),
        ({"rule": "exact"}, "it does not end after it begins"),
        ({"truncated": True}, "no time span in it, and cut off at the length limit"),
    ],
)
def test_text_says_why_there_is_no_answer(changes: dict[str, object], why: str) -> None:
    line = answer("q", None, text="x", **changes).line()  # type: ignore[arg-type]
    assert line == f"no answer: the model wrote 'x' ({why})"


def test_text_quotes_a_long_answer_in_part_and_json_whole() -> None:
    said = "hm " * 100
    found = answer("q", None, text=said)
    assert found.line() == f"no answer: the model wrote {said[:119] + '…'!r} (no time span in it)"
    assert json.loads(as_json(VIDEO, [found]))["answers"][0]["text"] == said


def test_json_has_everything_whether_asked_for_or_not() -> None:
    plain, full = (
        json.loads(as_json(VIDEO, [a]))["answers"][0]
        for a in (
            answer("é", (1.0, 2.0)),
            answer("é", (1.0, 2.0), windows=2, samples=(response((1.0, 2.0)), response(None)), agreement=0.0),
        )
    )
    assert plain.keys() == full.keys()
    assert (plain["query"], plain["span"], plain["samples"], plain["windows"]) == ("é", [1.0, 2.0], [], [])
    assert (plain["agreement"], plain["window"]) == (None, [0.0, 60.0])
    assert [s["span"] for s in full["samples"]] == [[1.0, 2.0], None] and full["agreement"] == 0.0
    assert [w["window"] for w in full["windows"]] == [[0.0, 30.0], [30.0, 60.0]]


@pytest.mark.parametrize(
    ("time_ms", "code"),
    [
        (0, "00:00:00,000"),
        (12_540, "00:00:12,540"),
        (3_723_004, "01:02:03,004"),
        (360_000_000, "100:00:00,000"),
    ],
)
def test_time_codes_of_subrip(time_ms: int, code: str) -> None:
    assert time_code(time_ms) == code


def test_srt_by_hand() -> None:
    answers = [
        answer("second", (12.54, 17.8296)),
        answer("none", None),
        answer("first\n\nwith --> an arrow", (1.0, 1.0002)),
    ]
    assert as_srt(VIDEO, answers) == (
        "1\n00:00:01,000 --> 00:00:01,001\nfirst with → an arrow\n"
        "\n"
        "2\n00:00:12,540 --> 00:00:17,830\nsecond\n"
    )
    assert as_srt(VIDEO, [answer("none", None)]) == ""


def test_a_demuxer_reads_the_cues_back(tmp_path: Path) -> None:
    """FFmpeg's own reader of SubRip finds the times and texts."""
    import av

    spans = [(0.0, 0.5), (12.54, 17.83), (3723.004, 3724.0)]
    file = tmp_path / "a.srt"
    file.write_text(
        as_srt(VIDEO, [answer(f"query {i}", span) for i, span in enumerate(spans)]), encoding="utf-8"
    )
    with av.open(str(file)) as container:
        packets: list[Any] = [p for p in container.demux() if p.size]
    found = [
        (float(p.pts * p.time_base), float((p.pts + p.duration) * p.time_base), bytes(p)) for p in packets
    ]
    for i, ((start_s, end_s, text), span) in enumerate(zip(found, spans, strict=True)):
        assert (start_s, end_s) == pytest.approx(span, abs=1e-3) and text.decode() == f"query {i}"


def test_csv_is_read_back() -> None:
    rows = list(
        csv.DictReader(
            io.StringIO(
                as_csv(
                    VIDEO,
                    [answer('a "quoted", query', (1.0, 2.5), agreement=0.5), answer("b\nc", None, text="no")],
                )
            )
        )
    )
    assert tuple(rows[0]) == COLUMNS
    assert (rows[0]["query"], rows[0]["start"], rows[0]["end"]) == ('a "quoted", query', "1.000", "2.500")
    assert (rows[0]["agreement"], rows[0]["window_end"], rows[0]["clamped"]) == ("0.5000", "60.000", "false")
    assert (rows[1]["query"], rows[1]["start"], rows[1]["agreement"], rows[1]["text"]) == (
        "b\nc",
        "",
        "",
        "no",
    )


@pytest.mark.parametrize("text", ["=1+1", "+1", "-2", "@SUM(A1)", " =x", "\t=x", "＝1", "\r=x", "\x1b[31m"])
def test_a_spreadsheet_runs_no_field_of_csv(text: str) -> None:
    one = answer(text, (1.0, 2.0), text=text)
    (row,) = csv.DictReader(io.StringIO(as_csv(VIDEO, [one])))
    for key in ("query", "text"):
        assert row[key].lstrip()[:1] not in {"=", "+", "-", "@", "＝"}
        assert not set(row[key]) & {"\r", "\x1b"} and text.strip()[1:] in row[key]
    assert float(row["logprob"]) == -0.25  # a number stays one


def test_a_query_is_no_style_and_no_escape_sequence() -> None:
    odd = answer("<b>a < b</b> {\\an8}\x1b[31m\u202e", (1.0, 2.0), text="\x1b[2J")
    cue = as_srt(VIDEO, [odd])
    assert not re.search(r"<[a-z/]|\{\\|\x1b|\u202e", cue) and "a < b" in cue
    assert "\x1b" not in as_text(VIDEO, [odd, odd])


def test_every_format_that_the_command_offers_is_one() -> None:
    from video_opd.cli.commands import build_parser

    text = build_parser().parse_args(["ground", "m", "v", "q", "--format", "srt"])
    assert text.format == "srt" and set(FORMATS) == {"text", "json", "srt", "csv"}
    assert not any(
        re.search(r"[^\n]\n$", FORMATS[name](VIDEO, [answer("q", (0, 1))])) for name in ("text", "json")
    )
