"""``video-opd ground``: what it reads, prints and writes. The answers are made up."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from video_cases import numbers_and_times, write_sound, write_video

from video_opd.cli import main
from video_opd.cli.commands import parse_words
from video_opd.errors import UserError
from video_opd.grounding.ground import GroundedAnswer, Response, WindowAnswer
from video_opd.grounding.query_files import read_queries
from video_opd.locks import locked_file
from video_opd.models.inference import InferenceConfig
from video_opd.temporal import Interval, clamp, parse_answer

TEXTS = {"the cup falls": "1.00 to 2.50", "late": "3.50 to 9.00", "unclear": "I cannot say"}


def made_up(query: str, *, thinned: bool = False) -> GroundedAnswer:
    text = TEXTS.get(query, "0.50 to 1.50")
    parsed = parse_answer(text)
    span: Interval | None = None if parsed.span is None else clamp(parsed.span, 4.0)
    response = Response(
        text=text, span=span, rule=parsed.rule, clamped=span != parsed.span, truncated=False, logprob=-0.1
    )
    window = WindowAnswer(
        window=(0.0, 4.0),
        response=response,
        samples=(),
        agreement=None,
        frames=8,
        video_tokens=32,
        thinned=thinned,
    )
    return GroundedAnswer(query=query, duration_s=4.0, windows=(window,))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("cli") / "v.mp4", 40, fps=10.0)  # 4 s


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No model is loaded: what the command asks of it is kept, and answered from ``TEXTS``."""
    calls: list[dict[str, Any]] = []

    def ground(policy: Any, encoder: Any, budget: Any, path: Path, queries: list[str], **options: Any) -> Any:
        calls.append({"video": path, "queries": queries, **options})
        return [made_up(query, thinned=query == "a long one") for query in queries]

    def load_inference_model(config: InferenceConfig, device: str | None) -> Any:
        return SimpleNamespace(config=config, policy=None, encoder=None, budget=None)

    monkeypatch.setattr("video_opd.grounding.ground.ground", ground)
    monkeypatch.setattr("video_opd.models.inference.load_inference_model", load_inference_model)
    return calls


def run(*words: object) -> int:
    return main(["ground", "some/model", *map(str, words)])


# --- what is asked


def test_queries_come_from_words_and_files(video: Path, asked: list, tmp_path: Path, capsys: Any) -> None:
    lines = tmp_path / "q.txt"
    lines.write_text("\ufeff the cup falls \n\n{not json\n", encoding="utf-8")
    assert run(video, "first", "--queries", lines) == 0
    assert asked[0]["queries"] == ["first", "the cup falls", "{not json"]
    rows = tmp_path / "d.jsonl"
    rows.write_text(
        '{"query": "anywhere"}\n'
        '{"id": "a", "video": "some/where/v.mp4", "query": "here", "spans": [[1, 2]]}\n'
        '{"id": "b", "video": "some/where/w.mp4", "query": "elsewhere"}\n'
    )
    assert run(video, "--queries", rows) == 0
    assert asked[1]["queries"] == ["anywhere", "here"]
    assert "1 rows about other videos left out" in capsys.readouterr().err


def test_only_a_line_ends_a_query(tmp_path: Path) -> None:
    lines = tmp_path / "q.txt"
    lines.write_bytes("the cup\u2028falls\r\nhe opens\x0cthe door\n[he] leaves\n".encode())
    assert read_queries(lines, "v.mp4") == ["the cup\u2028falls", "he opens\x0cthe door", "[he] leaves"]
    lines.write_text("[he] leaves\n[she stays]\n")
    assert read_queries(lines, "v.mp4") == ["[he] leaves", "[she stays]"]


def test_words_may_stand_anywhere(video: Path, asked: list) -> None:
    assert run(video, "--json", "a", "--seed", "3", "b") == 0
    assert run("--json", video, "a", "b") == 0
    assert [call["queries"] for call in asked] == [["a", "b"], ["a", "b"]]
    with pytest.raises(UserError, match="--fsp"):
        parse_words(["ground", "m", "v", "--json", "a", "--fsp"])
    with pytest.raises(UserError, match="unrecognized arguments: b"):
        parse_words(["train", "a", "b"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"n": 1, "temperature": 0.0, "window_s": None, "overlap_s": None}),
        (["--samples", "8"], {"n": 8, "temperature": 1.0}),
        (["--samples", "4", "--temperature", "0.7", "--seed", "5"], {"n": 4, "temperature": 0.7, "seed": 5}),
        (["--window", "60"], {"window_s": 60.0, "overlap_s": None}),
        (["--window", "60", "--overlap", "0"], {"window_s": 60.0, "overlap_s": 0.0}),
        (["--batch-size", "3", "--max-new-tokens", "9"], {"batch_size": 3, "max_new_tokens": 9}),
    ],
)
def test_options_reach_the_model(
    video: Path, asked: list, words: list[str], expected: dict[str, Any]
) -> None:
    assert run(video, "a", *words) == 0
    call = {**asked[0], **vars(asked[0]["settings"])}
    assert {key: call[key] for key in expected} == expected


# --- what is printed


def test_a_terminal_is_shown_text_and_a_pipe_json(
    video: Path, asked: list, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(video, "the cup falls") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["video"] == str(video) and record["answers"][0]["span"] == [1.0, 2.5]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(video, "the cup falls") == 0
    assert capsys.readouterr().out == "00:01.00 → 00:02.50 (1.5 s)\n"
    assert run(video, "the cup falls", "late", "unclear") == 0
    assert capsys.readouterr().out.splitlines() == [
        "the cup falls: 00:01.00 → 00:02.50 (1.5 s)",
        "late: 00:03.50 → 00:04.00 (0.5 s) [cut to the video]",
        "unclear: no answer: the model wrote 'I cannot say' (no time span in it)",
    ]
    assert run(video, "the cup falls", "--json") == 0
    assert json.loads(capsys.readouterr().out)


def test_subtitles_and_tables(video: Path, asked: list, capsys: Any) -> None:
    assert run(video, "late", "the cup falls", "unclear", "--format", "srt") == 0
    out, err = capsys.readouterr()
    assert out.startswith(
        "1\n00:00:01,000 --> 00:00:02,500\nthe cup falls\n\n2\n00:00:03,500 --> 00:00:04,000\nlate\n"
    )
    assert "no cue for 'unclear': no answer: the model wrote 'I cannot say'" in err
    assert run(video, "late", "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("late,3.500,4.000,3.50 to 9.00,exact,true,")


def test_a_thinned_video_is_said(video: Path, asked: list, capsys: Any) -> None:
    assert run(video, "a long one") == 0
    assert "more than the video budget holds, so the model was shown 8 frames" in capsys.readouterr().err
    assert run(video, "a long one", "--window", "2") == 0
    assert "budget" not in capsys.readouterr().err


# --- what is written


def test_one_answer_is_one_clip_and_several_are_numbered(
    video: Path, asked: list, tmp_path: Path, capsys: Any
) -> None:
    assert run(video, "the cup falls", "--cut", tmp_path / "a" / "clip.mp4") == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["clip.mp4"]
    assert numbers_and_times(tmp_path / "a" / "clip.mp4")[0] == list(range(10, 25))
    assert run(video, "the cup falls", "unclear", "late", "--cut", tmp_path / "b" / "clip.mp4") == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["clip-1.mp4", "clip-3.mp4"]
    assert numbers_and_times(tmp_path / "b" / "clip-3.mp4")[0] == list(range(35, 40))
    err = capsys.readouterr().err
    assert "clip-2.mp4 is not written: no answer: the model wrote 'I cannot say'" in err
    assert "clip-3.mp4: 3.50 to 4.00 s of v.mp4" in err


def test_each_of_several_clips_is_locked(video: Path, asked: list, tmp_path: Path, capsys: Any) -> None:
    words = (video, "the cup falls", "late", "--cut", tmp_path / "clip.mp4")
    with ThreadPoolExecutor(1) as other, locked_file(tmp_path / "clip-2.mp4"):
        assert other.submit(run, *words).result() == 2
    assert f"{tmp_path / 'clip-2.mp4'}: another thread" in capsys.readouterr().err
    assert asked == [] and not list(tmp_path.glob("clip*"))


def test_the_page_shows_the_answers(video: Path, asked: list, tmp_path: Path, capsys: Any) -> None:
    assert run(video, "the cup falls", "unclear", "--view", tmp_path / "a.html", "--format", "text") == 0
    assert "wrote " in capsys.readouterr().err
    page = (tmp_path / "a.html").read_text()
    assert (
        "2 queries, 1 with an answer" in page and "data:video/mp4;base64," in page and "I cannot say" in page
    )
    assert run(video, "the cup falls", "--view", tmp_path / "b.html", "--embed-mb", "0") == 0
    assert "data:video/mp4" not in (tmp_path / "b.html").read_text()


# --- what can be wrong


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["no/such.mp4", "a"], "no/such.mp4: no such file"),
        (["sound.m4a", "a"], "no video stream"),
        (["text.mp4", "a"], "text.mp4: cannot be opened as a video"),
        (["empty.mp4", "a"], "empty file"),
        ([".", "a"], "not a file"),
        (["v.mp4"], "nothing to look for"),
        (["v.mp4", ""], "empty query"),
        (["v.mp4", "a", "  "], "empty query"),
        (["v.mp4", "--queries", "none.txt"], "none.txt"),
        (["v.mp4", "--queries", "blank.txt"], "no query in it"),
        (["v.mp4", "--queries", "others.jsonl"], "no query in it for v.mp4"),
        (["v.mp4", "--queries", "bad.jsonl"], 'bad.jsonl:2: a row needs a "query"'),
        (["v.mp4", "--queries", "latin.txt"], "not UTF-8"),
        (["v.mp4", "--queries", "list.json"], "list.json: a JSON list; write one query a line"),
        (["v.mp4", "a", "--window", "0"], "longer than the overlap"),
        (["v.mp4", "a", "--window", "nan"], "longer than the overlap"),
        (["v.mp4", "a", "--window", "5", "--overlap", "5"], "longer than the overlap"),
        (["v.mp4", "a", "--window", "2", "--overlap", "1.9999999"], "has more than 100,000 of them"),
        (["v.mp4", "a", "--window", "1e-5"], "has more than 100,000 of them"),
        (["v.mp4", "a", "--overlap", "5"], "--window"),
        (["v.mp4", "a", "--samples", "2", "--temperature", "0"], "all be the same"),
        (["v.mp4", "a", "--temperature", "-1"], "temperature"),
        (["v.mp4", "a", "--cut", "clip.avi"], "ends in .mp4"),
        (["v.mp4", "a", "--cut", "v.mp4"], "--cut v.mp4 is also VIDEO"),
        (["v-2.mp4", "a", "b", "--cut", "v.mp4"], "v-2.mp4: this is the video itself"),
        (["v.mp4", "a", "b", "--cut", "d.mp4"], "d-1.mp4: this is a folder"),
        (["v.mp4", "a", "--view", "page"], "ends in .html"),
        (["v.mp4", "a", "--format", "xml"], "xml"),
        (["v.mp4", "a", "--video.fsp", "2"], "video.fps"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    video: Path,
    words: list[str],
    names: str,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("video_opd.models.inference.load_inference_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.mp4").write_bytes(video.read_bytes())
    (tmp_path / "v-2.mp4").write_bytes(video.read_bytes())
    (tmp_path / "d-1.mp4").mkdir()
    write_sound(tmp_path / "sound.m4a")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("die Tür".encode("latin-1"))
    (tmp_path / "others.jsonl").write_text('{"video": "w.mp4", "query": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"query": "a"}\n{"query": ""}\n')
    (tmp_path / "list.json").write_text(json.dumps([{"query": "a"}, {"query": "b"}], indent=1))
    before = sorted(tmp_path.iterdir())
    assert run(*words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "left out" not in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("video-opd: ") and names in lines[0]
    assert sorted(tmp_path.iterdir()) == before


def test_a_page_or_clip_that_cannot_be_written_comes_after_the_answer(
    video: Path, asked: list, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    for option, name in (("--cut", "c.mp4"), ("--view", "p.html")):
        assert run(video, "late", option, tmp_path / "file" / name) == 2
        out, err = capsys.readouterr()
        assert json.loads(out)["answers"] and "cannot be written" in err


def test_read_queries_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_queries(tmp_path, "v.mp4")
