"""Protocols: what each fixes, how TimeLens reads a response, and deviations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from growth_cases import is_linear
from hypothesis import given
from hypothesis import strategies as st

from video_opd.cli.arguments import PROTOCOLS as CLI_PROTOCOLS
from video_opd.config import VideoConfig
from video_opd.data.budget import plan_frames
from video_opd.data.prompts import STYLES, build_messages
from video_opd.errors import UserError
from video_opd.evaluation.comparison import evaluate_file
from video_opd.evaluation.notes import deviation_lines, protocol_line
from video_opd.evaluation.predictions import file_deviations, read_model_predictions
from video_opd.evaluation.protocols import CURRENT, PARSERS, PROTOCOLS, deviations, get_protocol, protocol_of
from video_opd.evaluation.timelens import parse_timelens
from video_opd.models.inference import read_inference_config
from video_opd.temporal import is_proper
from video_opd.types import Sample

PAPER, TIMELENS = PROTOCOLS["paper"], PROTOCOLS["timelens-2026-02"]


def note(style: str = "paper", thinking: bool = False, **answers: Any) -> dict[str, Any]:
    """``P.jsonl.meta.json`` as ``predict`` writes it, by the settings of the style's newest protocol."""
    protocol = protocol_of(style) or PAPER
    video = {**protocol.to_json()["video"], "backend": "pyav"}
    settings = {"n": 1, "temperature": 0.0, "max_new_tokens": protocol.max_new_tokens, "seed": 0}
    return {
        "model": "abc",
        "dtype": "float32",
        "input": {"video": video, "prompt": {"style": style, "thinking": thinking}},
        "answers": settings | answers,
    }


def write_answers(path: Path, provenance: dict[str, Any] | None, **texts: str) -> Path:
    path.write_text("".join(json.dumps({"id": i, "response": text}) + "\n" for i, text in texts.items()))
    if provenance is not None:
        Path(f"{path}.meta.json").write_text(json.dumps(provenance) + "\n")
    return path


SAMPLES = [
    Sample(id=i, video=Path(f"{i}.mp4"), query=i, duration_s=30.0, spans=((5.0, 10.0),)) for i in "abc"
]


# --- what they fix


def test_the_papers_protocol_is_its_section_4_1_and_figure_7() -> None:
    record = PAPER.to_json()
    assert (record["prompt"], record["parser"], record["rounding"]) == ("paper", "paper", "none")
    assert {k: record["video"][k] for k in ("fps", "max_frames", "max_frame_tokens", "max_video_tokens")} == {
        "fps": 2.0,
        "max_frames": 768,
        "max_frame_tokens": 768,
        "max_video_tokens": 8192,
    }


TIMELENS_SENTENCE = (
    "Please find the visual event described by the sentence '{}', determining its starting and "
    "ending times. The format should be: 'The event happens in <start time> - <end time> seconds'."
)


@pytest.mark.parametrize(("name", "side_px"), [("timelens-2026-02", 32), ("timelens-2025", 28)])
def test_timelens_protocols_are_its_scripts(name: str, side_px: int) -> None:
    """Defaults of scripts/eval_timelens_bench.sh: 64 and 14,336 tokens, until 2025 of 28 × 28 px."""
    protocol = PROTOCOLS[name]
    video = protocol.video
    assert video.min_frame_tokens * 32**2 == 64 * side_px**2
    assert video.max_video_tokens * 32**2 == 14_336 * side_px**2
    assert (video.fps, video.min_frames, video.max_frames, video.max_frame_tokens) == (2.0, 4, 768, 768)
    assert video.keep == "min_frame_tokens"  # it resizes by qwen-vl-utils
    assert (protocol.max_new_tokens, protocol.parser, protocol.whole_seconds) == (512, "timelens", True)
    (message,) = build_messages("  a  door opens. ", protocol.prompt_style)  # no system message
    assert message["content"][1]["text"] == TIMELENS_SENTENCE.format("a door opens")


def test_a_name_without_a_version_is_the_newest_and_is_recorded_with_it() -> None:
    assert get_protocol("timelens") is PROTOCOLS["timelens-2026-02"] is protocol_of("timelens")
    assert get_protocol("timelens").to_json()["name"] == "timelens-2026-02"
    assert {*CLI_PROTOCOLS} == {*PROTOCOLS, *CURRENT}
    with pytest.raises(UserError, match=r"'tl'.*paper.*timelens-2025.*timelens$"):
        get_protocol("tl")


def test_lmms_evals_protocol_is_its_task_and_the_defaults_of_its_model() -> None:
    """lmms-eval 0.7.3: tasks/timelens/_default_yaml_template and models/chat/qwen3_vl.py."""
    protocol = PROTOCOLS["lmms-eval-timelens"]
    assert (protocol.max_new_tokens, protocol.parser, protocol.whole_seconds) == (50, "timelens", False)
    system, user = build_messages("a door opens. ", protocol.prompt_style)
    assert "You are a helpful assistant." in str(system["content"])
    assert user["content"][1]["text"] == TIMELENS_SENTENCE.format("a door opens. ")
    video = protocol.video
    assert video.min_frame_tokens * 32**2 == 256 * 28**2
    # 32 frames of any video that has them, at whatever rate.
    assert {plan_frames(count, 30.0, video) for count in (40, 900, 200_000)} == {32}


def test_timelens_rounds_as_python_does() -> None:
    assert TIMELENS.prepare((0.5, 1.5)) == (0.0, 2.0)  # halves to even
    assert TIMELENS.prepare((2.49, 3.51)) == (2.0, 4.0)
    assert PAPER.prepare((0.5, 1.5)) == (0.5, 1.5)


def test_every_protocol_is_whole() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and get_protocol(name) is protocol
        assert protocol.prompt_style in STYLES and protocol.parser in PARSERS
        asked = protocol_of(protocol.prompt_style)
        assert asked is not None and asked.prompt_style == protocol.prompt_style
        answer = protocol.parse(STYLES[protocol.prompt_style].write_answer((12.54, 17.83)))
        assert answer.span == (12.54, 17.83)
    assert protocol_of("another") is None


# --- how TimeLens reads

A = (12.54, 17.83)


@pytest.mark.parametrize(
    ("text", "rule", "span"),
    [
        ("The event happens in 12.54 - 17.83 seconds.", "dash", A),
        ("12.54-17.83", "dash", A),
        ("12.54 to 17.83", "to", A),
        ("12.54 TO 17.83", "to", A),
        # clock times come first, the first two of them
        ("00:12 - 00:17", "clock", (12.0, 17.0)),
        ("1.0 - 2.0, that is 00:12 and 00:17", "clock", (12.0, 17.0)),
        ("1:02:03.5 - 1:02:10", "clock", (3723.5, 3730.0)),
        ("at 00:12, 00:17 and 00:20", "clock", (12.0, 17.0)),
        # the first pair, not the last; a dash before a "to"
        ("1.0 - 2.0, then 12.54 - 17.83", "dash", (1.0, 2.0)),
        ("1 to 2, or 12.54 - 17.83", "dash", A),
        ("1 to 2 and 12.54 to 17.83", "to", (1.0, 2.0)),
        # any two numbers
        ("Starting time: 0.8 seconds. Ending time: 1.1 seconds", "numbers", (0.8, 1.1)),
        ("12.54s to 17.83s", "numbers", (12.0, 17.0)),  # glued to a letter, a fraction is lost
        ("[12.54, 17.83]", "numbers", A),
        ("12.54–17.83", "numbers", A),  # an en dash is no dash of its
        ("the 3 men, 12.54 and 17.83", "numbers", (3.0, 12.54)),
        ("at 00:12 only", "numbers", (0.0, 12.0)),
        # digits of any script, and as many as a division gives
        ("１２ to １７", "to", (12.0, 17.0)),
        ("12.333333333333334 to 17.666666666666668", "to", (12.333333333333334, 17.666666666666668)),
        # nothing, or no span
        ("", "none", None),
        ("12.54", "none", None),
        ("17.83 - 12.54", "dash", None),
        ("9" * 400 + " - " + "9" * 401, "dash", None),
    ],
)
def test_timelens_reading(text: str, rule: str, span: tuple[float, float] | None) -> None:
    parsed = parse_timelens(text)
    assert (parsed.rule, parsed.span) == (rule, span)


def test_timelens_reads_behind_a_thought() -> None:
    assert parse_timelens("<think>1 - 2</think>12.54 - 17.83", thinking=True).span == A
    assert parse_timelens("<think>12.54 - 17.83", thinking=True).rule == "none"


PIECES = "1 12.54 00:12 1:02:03 - to – , s 17.83 :5 . and </think> ½"
WORDS = st.sampled_from([*PIECES.split(), " ", "\n"])


@given(st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=12).map("".join)), st.booleans())
def test_timelens_reading_never_raises(text: str, thinking: bool) -> None:
    parsed = parse_timelens(text, thinking=thinking)
    assert parsed.span is None or is_proper(parsed.span)
    assert parsed.rule in {"clock", "dash", "to", "numbers", "none"}


@pytest.mark.parametrize("piece", ["1", "1 ", "1.", "1:", "1.1 ", "00:1", "1" + " " * 50, "1 to ", "-"])
def test_timelens_reading_takes_linear_time(piece: str) -> None:
    assert is_linear(lambda n: piece * (n // len(piece)), parse_timelens, 20_000)


# --- deviations


def test_deviations_name_what_differs() -> None:
    assert deviations(PAPER, note()) == {}
    assert deviations(TIMELENS, note("timelens")) == {}
    assert deviations(PAPER, None) is None
    made = note(max_new_tokens=16, temperature=1.0, thinking=True)
    made["input"]["video"]["max_video_tokens"] = 64
    assert deviations(PAPER, made) == {
        "prompt.thinking": True,
        "video.max_video_tokens": 64,
        "max_new_tokens": 16,
        "temperature": 1.0,
    }
    assert deviations(TIMELENS, note())["prompt.style"] == "paper"  # type: ignore[index]
    # a note of something else, or of a half of it
    for odd in ({}, {"input": 5}, {"input": {"video": None, "prompt": []}, "answers": "x"}):
        assert deviations(PAPER, odd) == {}


def test_the_hard_bound_of_a_model_is_a_deviation_from_timelens(tmp_path: Path) -> None:
    """So is the bound of an output that was made before the bound could be chosen."""
    made = note("timelens")
    for keep in ({"keep": "max_video_tokens"}, {}):
        made["input"]["video"].pop("keep", None)
        made["input"]["video"].update(keep)
        path = write_answers(tmp_path / "p.jsonl", made, a="5.00 - 10.00")
        record = evaluate_file(SAMPLES, path, "timelens")
        assert record["protocol"]["deviations"] == {"video.keep": "max_video_tokens"}
        (line,) = deviation_lines(record["protocol"])
        assert "video.keep max_video_tokens (protocol: min_frame_tokens)" in line
        assert "14336 video tokens (or 64 a frame pair)" in protocol_line(record["protocol"])
    # The older budget of the same prompt is no other protocol, but told.
    older = evaluate_file(SAMPLES, path, "timelens-2025")["protocol"]
    assert older["deviations"] == {
        "video.min_frame_tokens": 64,
        "video.max_video_tokens": 14_336,
        "video.keep": "max_video_tokens",
    }


def test_deviations_stand_in_the_result(tmp_path: Path) -> None:
    made = note(max_new_tokens=16)
    record = evaluate_file(SAMPLES, write_answers(tmp_path / "p.jsonl", made, a="5.00 to 10.00"))
    assert record["protocol"]["deviations"] == {"max_new_tokens": 16}
    assert "max_new_tokens 16 (protocol: 64)" in deviation_lines(record["protocol"])[0]
    record = evaluate_file(SAMPLES, write_answers(tmp_path / "q.jsonl", None, a="5.00 to 10.00"))
    assert record["protocol"]["deviations"] is None
    assert "not known" in deviation_lines(record["protocol"])[0]
    record = evaluate_file(SAMPLES, write_answers(tmp_path / "r.jsonl", note(), a="5.00 to 10.00"))
    assert deviation_lines(record["protocol"]) == []
    for said in ("protocol paper", "8192 video tokens", "64 new tokens", "parser paper", "rounding none"):
        assert said in protocol_line(record["protocol"])


def test_answers_of_another_protocol_are_refused_without_the_flag(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "p.jsonl", note("timelens"), a="The event happens in 5 - 10 seconds.")
    with pytest.raises(
        UserError,
        match=r"p\.jsonl.*protocol timelens-2026-02.*--protocol timelens-2026-02.*--any-protocol",
    ):
        read_model_predictions([path], PAPER, name="m")
    predictions = read_model_predictions([path], PAPER, name="m", any_protocol=True)
    assert file_deviations(predictions.files, PAPER) == {
        "prompt.style": "timelens",
        "video.min_frame_tokens": 64,
        "video.max_video_tokens": 14_336,
        "video.keep": "min_frame_tokens",
        "max_new_tokens": 512,
    }
    assert read_model_predictions([path], TIMELENS, name="m").files[0].predictions["a"].spans == (
        (5.0, 10.0),
    )
    # nobody knows: not refused, but told
    assert read_model_predictions([write_answers(tmp_path / "q.jsonl", None, a="1 to 2")], TIMELENS, name="m")


def test_a_protocol_reads_the_text_with_its_own_parser(tmp_path: Path) -> None:
    """The spans in a file were read by the paper's rules; under TimeLens' the text counts."""
    row = {"id": "a", "responses": ["1 - 2, or 5.4 - 9.6"], "spans": [[5.4, 9.6]], "rules": ["dash"]}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"id": "b", "span": [5.4, 9.6]}) + "\n")
    spans = {
        p.name: read_model_predictions([path], p, name="m").files[0].predictions["a"].spans
        for p in (PAPER, TIMELENS)
    }
    assert spans == {"paper": ((5.4, 9.6),), "timelens-2026-02": ((1.0, 2.0),)}
    record = evaluate_file(SAMPLES, path, "timelens")
    assert record["rules"] == {"dash": 1, "given": 1}
    assert record["mIoU"] == pytest.approx(100 * (0 + 1.0 + 0) / 3)  # b is rounded to 5–10, c missing


def test_a_note_says_that_the_model_thought(tmp_path: Path) -> None:
    text = "<think>1.00 to 2.00</think>5.00 to 10.00 and 3 to 4"
    path = write_answers(tmp_path / "p.jsonl", note(thinking=True), a=text, b="5.00 to 10.00")
    found = read_model_predictions([path], PAPER, name="m").files[0].predictions
    assert found["a"].spans == ((3.0, 4.0),) and found["b"].spans == (None,)
    foreign = write_answers(tmp_path / "q.jsonl", None, b="<think>5.00 to 10.00")
    assert read_model_predictions([foreign], PAPER, name="m").files[0].predictions["b"].spans == (
        (5.0, 10.0),
    )
    thought = read_model_predictions([foreign], PAPER, name="m", thinking=True)
    assert thought.files[0].predictions["b"].rules == ("none",)


def test_rules_are_counted(tmp_path: Path) -> None:
    texts = {"a": "5.00 to 10.00", "b": "10.00 to 5.00"}
    record = evaluate_file(SAMPLES, write_answers(tmp_path / "p.jsonl", note(), **texts))
    assert record["rules"] == {"exact": 2}
    assert (record["unparsed"], record["missing"]) == (1, 1)  # a reversed span keeps its rule
    sources = [Sample(**{**vars(sample), "source": sample.id}) for sample in SAMPLES]
    by_source = evaluate_file(sources, tmp_path / "p.jsonl")["by_source"]
    assert [by_source[i]["rules"] for i in "abc"] == [{"exact": 1}, {"exact": 1}, {}]


# --- the protocol of a model that answers


def test_a_protocol_decides_the_prompt_and_fills_in_the_budget(tmp_path: Path) -> None:
    stock = read_inference_config(str(tmp_path), [], TIMELENS)
    assert stock.prompt.style == "timelens" and stock.video == TIMELENS.video
    assert read_inference_config(str(tmp_path), [], PAPER).video == VideoConfig()
    assert read_inference_config(str(tmp_path), []).prompt.style == "paper"
    assert read_inference_config(str(tmp_path), ["--video.fps", "1"], TIMELENS).video.fps == 1.0
    (tmp_path / "video_opd.json").write_text(
        json.dumps({"video": {"max_video_tokens": 64, "min_frame_tokens": 4}, "prompt": {"thinking": True}})
    )
    trained = read_inference_config(str(tmp_path), [], TIMELENS)
    assert (trained.prompt.style, trained.prompt.thinking) == ("timelens", True)
    assert trained.video.max_video_tokens == 64  # what it was trained with
    with pytest.raises(UserError, match=r"prompt\.style paper.*timelens"):
        read_inference_config(str(tmp_path), ["--prompt.style", "paper"], TIMELENS)


@pytest.mark.parametrize("text", ["[1]", "{", '{"prompt": 5}', '{"video": []}', "[" * 100_000])
def test_a_broken_note_of_a_model_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "video_opd.json").write_text(text)
    with pytest.raises(UserError) as told:
        read_inference_config(str(tmp_path), [], TIMELENS)
    assert re.search(r"video_opd\.json|prompt|video", str(told.value))


def test_the_precision_is_the_training_s_or_the_device_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype(*overrides: str, device: str | None = None) -> str:
        return read_inference_config(str(tmp_path), overrides, device=device).model.dtype

    assert (dtype(), dtype(device="cpu"), dtype(device="cuda:1")) == ("float32", "float32", "bfloat16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (dtype(), dtype(device="cpu")) == ("bfloat16", "float32")
    assert dtype("--model.dtype", "float32") == "float32"
    (tmp_path / "video_opd.json").write_text('{"dtype": "float32"}')  # as it was trained
    assert (dtype(), dtype("--model.dtype", "bfloat16")) == ("float32", "bfloat16")
