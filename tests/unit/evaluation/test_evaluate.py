"""``video-opd evaluate`` and ``predict`` with protocols: on files, and with a tiny model that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from video_opd.cli import main
from video_opd.evaluation.prediction_cache import cached_predictions_path
from video_opd.evaluation.protocols import PROTOCOLS
from video_opd.evaluation.resume import read_provenance, write_provenance
from video_opd.types import Sample


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two data sets of three rows; predictions of a base (4 s off) and of a student (1 s off)."""
    monkeypatch.chdir(tmp_path)
    for name in ("charades-timelens", "other"):
        spans = {f"{name}-{i}": (float(10 + i), float(18 + i)) for i in range(3)}
        write_rows(
            tmp_path / f"{name}.jsonl",
            [
                {"id": i, "video": f"{i}.mp4", "query": i, "duration": 40, "spans": [s], "source": i[-1]}
                for i, s in spans.items()
            ],
        )
        for model, off in (("base", 4), ("student", 1)):
            write_rows(
                tmp_path / f"{model}-{name}.jsonl",
                [{"id": i, "response": f"{a + off:.2f} to {b + off:.2f}"} for i, (a, b) in spans.items()],
            )
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


BOTH = ("--data", "charades-timelens.jsonl", "other.jsonl")
STUDENT = ("--predictions", "s=student-charades-timelens.jsonl", "s=student-other.jsonl")
B_OTHER = ("--baseline", "base-other.jsonl")
BASE = ("--baseline", "b=base-charades-timelens.jsonl", "b=base-other.jsonl")


def test_a_baseline_of_one_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", "--data", "o=other.jsonl", "--predictions", "student-other.jsonl", *B_OTHER)
    record = json.loads(run(capsys, *words, "--json", "-"))
    assert record["mIoU"] == pytest.approx(100 * 7 / 9)
    assert record["rules"] == {"exact": 3}
    assert (record["data"], record["answers"]) == ("other.jsonl", "student-other.jsonl")
    assert record["protocol"]["deviations"] is None
    assert record["baseline"]["answers"] == "base-other.jsonl"
    assert record["baseline"]["mIoU"] == pytest.approx(100 * 4 / 12)
    assert record["baseline"]["difference"]["mIoU"]["value"] == pytest.approx(100 * (7 / 9 - 4 / 12))
    said = run(capsys, *words)
    assert "base-other: R@0.3 100.0" in said and "rise: R@0.3 +0.0" in said and "mIoU +44.4 [" in said
    assert "student-other.jsonl: parse rules exact 3" in said and "protocol paper: prompt paper" in said


def test_figures_alone_on_request(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", "--data", "other.jsonl", "--predictions", "student-other.jsonl", *B_OTHER)
    for more in ((), ("--format", "text", "--out", "t.txt")):
        said = run(capsys, *words, "--no-intervals", *more) or Path("t.txt").read_text()
        assert "mIoU 77.8" in said and "mIoU +44.4" in said and "[" not in said
    assert "mIoU +44.4 [" in run(capsys, *words)


def test_a_table_in_every_format(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", *BOTH, *STUDENT, *BASE, "--published")
    record = json.loads(run(capsys, *words, "--format", "json"))
    assert record == json.loads(run(capsys, *words, "--json", "-"))
    assert list(record["models"]) == ["b", "s"] and "published" in record
    starts = {"markdown": "| |", "latex": r"\begin{tabular}", "text": "b, charades-timelens: R@0.3"}
    for form, suffix in (("markdown", "md"), ("latex", "tex"), ("text", "txt"), ("json", "json")):
        said = run(capsys, *words, "--format", form)
        assert run(capsys, *words, "--out", f"t.{suffix}") == ""
        assert Path(f"t.{suffix}").read_text() == said
        assert said.startswith(starts.get(form, "{"))
    assert run(capsys, *words, "--out", "x.md", "--format", "latex", "--json", "deep/m.json") == ""
    assert Path("x.md").read_text().startswith(starts["latex"])
    assert json.loads(Path("deep/m.json").read_text()) == record


def test_the_record_on_stdout_leaves_out_no_table(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", *BOTH, *STUDENT, *BASE)
    record, table = run(capsys, *words, "--json", "-"), run(capsys, *words, "--format", "markdown")
    assert run(capsys, *words, "--json", "-", "--out", "t.md") == record
    assert Path("t.md").read_text() == table
    assert run(capsys, *words, "--json", "-", "--out", "t.json") == record == Path("t.json").read_text()


def test_sources_as_data_sets(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", "--data", "other.jsonl", "--predictions", "student-other.jsonl", "--by-source")
    record = json.loads(run(capsys, *words, "--format", "json"))
    assert list(record["data_sets"]) == ["0", "1", "2"]
    assert {found["n"] for found in record["models"]["student-other.jsonl"].values()} == {1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--published", "--data", "other.jsonl", "--predictions", "student-other.jsonl"),
            "Charades-TimeLens",
        ),
        (
            (*BOTH, *STUDENT, "--baseline", "b=base-other.jsonl", "c=base-charades-timelens.jsonl"),
            "two models",
        ),
        ((*BOTH, *STUDENT, "--baseline", "s=base-other.jsonl"), "'s'"),
        (("--data", "d=other.jsonl", "d=charades-timelens.jsonl", *STUDENT), "NAME="),
        (("--data", "a=other.jsonl", "b=other.jsonl", *STUDENT), "other-0"),
        ((*BOTH, *STUDENT, "--answers", "x.jsonl"), "--model"),
        ((*BOTH, *STUDENT, "--format", "html"), "html"),
        ((*BOTH, "--model", "m", "--answers", "x.jsonl"), "one data set"),
        ((*BOTH, "--model", "m", "--answers", "x.jsonl", "--out", "y.jsonl"), "leave out one"),
        ((*BOTH, *STUDENT, "--video.fps", "1"), "--video.fps"),
        ((*BOTH, *STUDENT, "--format", "latex", "--json", "-"), "give the table a file with --out"),
        (("--data", "other.jsonl", "--predictions", "other.jsonl"), "other.jsonl:1: a row of a data file"),
        (
            ("--data", "other.jsonl", "--predictions", "student-other.jsonl", "--baseline", "other.jsonl"),
            "data",
        ),
        ((*BOTH, *STUDENT, "--out", "x.pdf"), ".md, .tex, .json or .txt"),
        ((*BOTH, *STUDENT, "--out", "x.jsonl"), "--format"),
        ((*BOTH, "--model", "m", "--out", "x.html"), "x.html"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    files: Path, capsys: pytest.CaptureFixture[str], words, said
) -> None:
    before = sorted(files.iterdir())
    assert main(["evaluate", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert sorted(files.iterdir()) == before


def test_an_ending_is_known_or_the_format_is_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("evaluate", *BOTH, *STUDENT, "--out")
    text = run(capsys, *words[:-1], "--format", "text")
    for name, form in (("table", ()), ("T.TXT", ()), ("table.log", ("--format", "text"))):
        assert run(capsys, *words, name, *form) == ""
        assert Path(name).read_text() == text
    run(capsys, *words, "T.MD")
    assert Path("T.MD").read_text().startswith("| |")


def test_answers_of_another_protocol_need_the_flag(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = {"input": {"prompt": {"style": "timelens", "thinking": False}}}
    write_rows(files / "student-other.jsonl.meta.json", [note])
    words = ("evaluate", "--data", "other.jsonl", "--predictions", "student-other.jsonl")
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert "made under protocol timelens-2026-02" in err and "--any-protocol" in err
    record = json.loads(run(capsys, *words, "--any-protocol", "--json", "-"))
    assert record["protocol"]["name"] == "paper"
    assert record["protocol"]["deviations"] == {"prompt.style": "timelens"}
    assert "prompt.style timelens (protocol: paper)" in run(capsys, *words, "--any-protocol")
    record = json.loads(run(capsys, *words, "--protocol", "timelens", "--json", "-"))
    assert (record["protocol"]["name"], record["protocol"]["deviations"]) == ("timelens-2026-02", {})
    assert record["rules"] == {"to": 3}  # TimeLens' parser has no rule "exact"


# --- with a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random tiny model's folder, trained on small frames, and three questions about two videos."""
    from video_cases import write_video

    from video_opd.world.tiny import build_model, build_processor

    folder = tmp_path_factory.mktemp("evaluate")
    build_model("test", seed=0).save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    facts = {"video": {"max_video_tokens": 64, "min_frame_tokens": 4}, "prompt": {"style": "paper"}}
    (folder / "model" / "video_opd.json").write_text(json.dumps(facts))
    for name, frames in (("a", 16), ("b", 24)):
        write_video(folder / f"{name}.mp4", frames, fps=4.0, size=(64, 64))
    rows = [
        {"id": f"{v}{i}", "video": f"{v}.mp4", "query": f"the red circle {i}.", "spans": [[1, 3]]}
        for v, i in (("a", 0), ("b", 0), ("a", 1))
    ]
    return folder / "model", write_rows(folder / "data.jsonl", rows)


SHORT = ("--max-new-tokens", "6")


def test_predict_follows_the_protocol(model_and_data, tmp_path, capsys, monkeypatch) -> None:
    from video_opd.data.encode import PromptEncoder

    asked: list[str] = []
    original = PromptEncoder.encode_many

    def encode_many(self: PromptEncoder, *arguments: Any) -> Any:
        prompts = original(self, *arguments)
        asked.extend(prompt.text for prompt in prompts if prompt.clip_digest)  # an encoder's trial has none
        return prompts

    monkeypatch.setattr(PromptEncoder, "encode_many", encode_many)
    model, data = model_and_data
    notes, texts = {}, {}
    for protocol in (None, "paper", "timelens"):
        asked.clear()
        out = tmp_path / f"{protocol}.jsonl"
        words = ["predict", model, data, "--out", out, *(("--protocol", protocol) if protocol else ())]
        run(capsys, *words, *(SHORT if protocol == "timelens" else ()))
        notes[protocol] = json.loads(Path(f"{out}.meta.json").read_text())
        texts[protocol] = sorted(asked)  # two videos are encoded at a time
    assert notes[None] == notes["paper"] and texts[None] == texts["paper"]
    assert notes["paper"]["answers"]["max_new_tokens"] == PROTOCOLS["paper"].max_new_tokens
    assert notes["timelens"]["input"]["prompt"]["style"] == "timelens"
    assert all("You are a video analysis expert." in text for text in texts["paper"])
    assert all("by the sentence 'the red circle" in text for text in texts["timelens"])
    assert not any("analysis expert" in text or "circle 0.'" in text for text in texts["timelens"])
    words = ["evaluate", "--data", data, "--predictions", tmp_path / "timelens.jsonl", "--json", "-"]
    assert main([str(word) for word in words]) == 2
    assert "made under protocol timelens" in capsys.readouterr().err
    record = json.loads(run(capsys, *words, "--protocol", "timelens"))
    assert record["protocol"]["deviations"] == {
        "video.min_frame_tokens": 4,
        "video.max_video_tokens": 64,
        "video.keep": "max_video_tokens",
        "max_new_tokens": 6,
    }
    assert record["missing"] == 0 and sum(record["rules"].values()) == 3


def test_several_sampled_answers_a_row(model_and_data, tmp_path, capsys) -> None:
    """Draws are a function of seed, row and number: batches change nothing, another seed does."""
    model, data = model_and_data
    made = {}
    for name, options in (
        ("a", ("--batch-size", 1)),
        ("b", ("--batch-size", 3, "--workers", 1)),
        ("c", ("--seed", 1)),
    ):
        out = tmp_path / f"{name}.jsonl"
        words = ("predict", model, data, "--out", out, "--n", 3, "--temperature", 1.0, *SHORT, *options)
        run(capsys, *words)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        made[name] = {row["id"]: row["responses"] for row in rows}
        assert {(len(row["responses"]), len(row["spans"]), len(row["rules"])) for row in rows} == {(3, 3, 3)}
    assert made["a"] == made["b"] != made["c"]
    assert all(len(set(texts)) > 1 for texts in made["a"].values())
    record = json.loads(run(capsys, "evaluate", "--data", data, "--predictions", out, "--json", "-"))
    assert record["protocol"]["deviations"]["temperature"] == 1.0  # the first of them was not greedy
    assert main(["predict", str(model), str(data), "--out", str(tmp_path / "d.jsonl"), "--n", "2"]) == 2
    assert "greedy responses would all be the same" in capsys.readouterr().err


def test_a_thinking_model_needs_a_length(model_and_data, tmp_path, capsys) -> None:
    model, data = model_and_data
    words = [
        "predict",
        str(model),
        str(data),
        "--out",
        str(tmp_path / "p.jsonl"),
        "--prompt.thinking",
        "true",
    ]
    assert main(words) == 2
    assert "--max-new-tokens" in capsys.readouterr().err


def test_evaluating_a_model_continues_by_content(model_and_data, tmp_path, capsys, monkeypatch) -> None:
    """No file is named, yet no prediction is lost, and nobody else's predictions are taken."""
    from video_opd.models.policy import HFPolicy

    model, data = model_and_data
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answered: list[int] = []
    original = HFPolicy.sample

    def sample(self: HFPolicy, prompts: Any, **settings: Any) -> Any:
        answered.append(len(prompts))
        return original(self, prompts, **settings)

    monkeypatch.setattr(HFPolicy, "sample", sample)
    words = ("evaluate", "--data", data, "--model", model, *SHORT, "--json", "-")
    first = json.loads(run(capsys, *words))
    assert sum(answered) == 3
    (kept,) = (tmp_path / "cache" / "video-opd" / "answers").glob("*.jsonl")
    whole = kept.read_text()
    # Killed within the last row: it alone is answered again.
    kept.write_text(whole[: whole.rstrip("\n").rindex("\n") + 20])
    write_provenance(kept, read_provenance(kept), None)  # rows are sealed at the end
    assert json.loads(run(capsys, *words)) == first and sum(answered) == 4
    assert sorted(kept.read_text().splitlines()) == sorted(whole.splitlines())
    # Another length, another protocol: other responses.
    run(capsys, *words[:-4], "--max-new-tokens", "5", "--json", "-")
    run(capsys, *words, "--protocol", "timelens")
    assert sum(answered) == 10
    assert len(list(kept.parent.glob("*.jsonl"))) == 3
    # The older spelling, and a file of one's own.
    for option in ("--out", "--answers"):
        mine = tmp_path / f"mine{option}.jsonl"
        assert json.loads(run(capsys, *words, option, mine)) == first
        assert sorted(mine.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "a=other.jsonl", "b=other.jsonl"), "id 'other-0' is in a and in b"),
        (("--data", "a=other.jsonl", "b=other.jsonl", "--by-source"), "id 'other-0' is in a and in b"),
        (("--data", "plain.jsonl"), "plain: no row of the data is annotated"),
        (("--data", "other.jsonl", "plain.jsonl"), "plain: no row of the data is annotated"),
        (("--data", "other.jsonl", "--baseline", "M=base-other.jsonl"), "two models are called 'M'"),
        (("--data", "other.jsonl", "--baseline", "base-charades-timelens.jsonl"), "none of its ids"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_predicts(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words, said
) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is used")

    monkeypatch.setattr("video_opd.models.inference.read_inference_config", read)
    write_rows(files / "plain.jsonl", [{"id": "p", "video": "p.mp4", "query": "p", "duration": 40}])
    assert main(["evaluate", *words, "--model", "M"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_kept_answers_are_named_by_what_they_depend_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    provenance = {"model": "abc", "answers": {"max_new_tokens": 64}}
    rows = [Sample(id="a", video=Path("a.mp4"), query="q", spans=((1.0, 2.0),))]
    path = cached_predictions_path(provenance, rows)
    assert path.parent == tmp_path / "video-opd" / "answers"
    mended = [Sample(id="a", video=Path("a.mp4"), query="q", spans=((1.0, 3.0),))]
    assert cached_predictions_path(provenance, mended) == path  # a response does not depend on the annotation
    others = [
        cached_predictions_path({**provenance, "model": "abd"}, rows),
        cached_predictions_path(provenance, [Sample(id="a", video=Path("a.mp4"), query="r")]),
        cached_predictions_path(provenance, [Sample(id="a", video=Path("b/a.mp4"), query="q")]),
        cached_predictions_path(provenance, [*rows, Sample(id="b", video=Path("a.mp4"), query="q")]),
    ]
    assert len({path, *others}) == 5


def test_a_video_that_was_replaced_has_predictions_of_its_own(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    rows = [Sample(id="a", video=video, query="q")]
    found = [cached_predictions_path({}, rows)]
    for content in (b"pictures", b"other pictures"):
        video.write_bytes(content)
        found += [cached_predictions_path({}, rows) for _ in range(2)]
    assert found[1] == found[2] and found[3] == found[4] and len(set(found)) == 3
