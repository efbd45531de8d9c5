"""The general suite without lmms-eval: letters, names, rows, sums, and what is said where it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from video_opd.cli import main, suite
from video_opd.cli.commands import parse_words
from video_opd.errors import UserError
from video_opd.evaluation.bootstrap import interval95
from video_opd.suites import hooks, requirements, responder
from video_opd.suites.accuracy import MISSING, ScoredRow, accuracy, benchmark_scores
from video_opd.suites.benchmarks import BENCHMARKS, LMMS_EVAL, check_row, choose_tasks
from video_opd.suites.letters import UNREAD, Choice, read_choice, read_yes_no
from video_opd.suites.responder import Responder
from video_opd.suites.suite import SuiteSettings, default_out
from video_opd.types import Rollout, Sample

OPTIONS = {"A": "left", "B": "to the right", "C": "a man walks", "D": "up"}

# --- letters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "option", "rule"),
    [
        ("B", "B", "alone"),
        (" b.\n", "B", "alone"),
        ("(B)", "B", "alone"),
        ("**B**", "B", "alone"),
        ("$\\boxed{\\text{B}}$", "B", "alone"),
        ("B. to the right", "B", "leading"),
        ("(B) to the right", "B", "leading"),
        ("B: it goes there", "B", "leading"),
        ("B - to the right", "B", "leading"),
        ("B\nbecause it does", "B", "leading"),
        ("Option B", "B", "leading"),
        ("The best option is (B).", "B", "leading"),
        ("Answer: **D**", "D", "leading"),
        ("To the right.", "B", "wording"),
        ("a man walks", "C", "wording"),
        ("The answer, as one sees, is clear: the correct option is (C)", "C", "stated"),
        ("First option A, no: the answer is D because it rises", "D", "stated"),
        ("The best answer is B, as option C shows the start.", "B", "stated"),
        ("The answer is B, not option A.", "B", "stated"),
        ("The correct option is B; choice D shows the start.", "B", "stated"),
        ("Answer: B, because option A comes first", "B", "stated"),
        ("The answer is A, no: the answer is D because it rises", "D", "stated"),
        ("It is not option A, so I take option B here", "B", "stated"),
        ("I think it is B because it goes there", "B", "single"),
        ("It's D.", "D", "single"),
        ("<think>A. or B.</think>\n\nD", "D", "alone"),
        # Not letters.
        ("A man walks in", None, UNREAD),
        ("it is a man", None, UNREAD),
        ("The answer is A man", None, UNREAD),
        ("Apple", None, UNREAD),
        ("A.M.", None, UNREAD),
        ("E", None, UNREAD),
        ("", None, UNREAD),
        # Not one letter.
        ("Both A and B", None, UNREAD),
        ("A, B", None, UNREAD),
        ("<think>It is surely B", None, UNREAD),
    ],
)
def test_letters(text: str, option: str | None, rule: str) -> None:
    found = read_choice(text, OPTIONS)
    assert (found.option, found.rule) == (option, rule)


def test_digits_are_labels_of_options_not_numbers() -> None:
    options = {"1": "a cup falls", "2": "a cup stands"}
    for text in ("2", "Option 2", "Option 2: a cup stands", "(2)", "the answer is 2", "a cup stands"):
        assert read_choice(text, options).option == "2", text
    assert read_choice("2 cups fall", options).option is None
    assert read_choice("2", {}).option is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes", "yes"), ("no.", "no"), ("**Yes**, it does", "yes"), ("Answer: no", "no"),
        ("The answer is yes", "yes"), ("<think>no</think>yes", "yes"),
        ("not sure", None), ("nothing", None), ("yesterday", None), ("maybe", None), ("", None),
    ],
)  # fmt: skip
def test_yes_or_no(text: str, word: str | None) -> None:
    assert read_yes_no(text).option == word


@given(st.text(alphabet="ABCDEab12 .():*\n-<>/think", max_size=30), st.booleans())
def test_reading_never_raises_and_makes_nothing_up(text: str, digits: bool) -> None:
    options = {"1": "x", "2": "y"} if digits else OPTIONS
    found = read_choice(text, options)
    assert found.option is None or found.option in options
    assert (found.option is None) == (found.rule == UNREAD)
    if found.option is not None and found.rule != "wording":
        assert found.option in text.upper()
    read_yes_no(text)


def test_a_model_that_thinks_is_read_behind_its_thinking_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template opens <think>, so a response that was cut off holds neither mark."""
    texts = {"cut": "The ball is seen in option B, hmm", "whole": "Option B, hmm</think>\n\nD", "none": ""}
    thinking, lengths = True, []

    def config(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(prompt=SimpleNamespace(thinking=thinking))

    def predict(
        _: Any, samples: Any, __: Any, out: Path, *, make_row: Any, settings: Any, **___: Any
    ) -> None:
        lengths.append(settings.max_new_tokens)
        rows = [
            make_row(s, [Rollout(token_ids=(), logprobs=(), text=texts[s.id], truncated=True)], settings)
            for s in samples
        ]
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(responder, "read_inference_config", config)
    monkeypatch.setattr(responder, "predict", predict)
    samples = [Sample(id=name, video=Path("v.mp4"), query="q") for name in texts]

    def answers(**options: Any) -> dict[str, str]:
        model: Any = SimpleNamespace(policy=None, prompts=None, provenance=dict)
        return Responder(model="m", out=tmp_path / "a.jsonl", loaded=model, **options).respond(samples)

    with pytest.raises(UserError, match="--max-new-tokens"):
        answers()
    assert lengths == []
    found = answers(max_new_tokens=900)
    assert {name: read_choice(text, OPTIONS).option for name, text in found.items()} == {
        "cut": None,
        "whole": "D",
        "none": None,
    }
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {row["id"]: row["responses"] for row in kept} == {name: [text] for name, text in texts.items()}
    thinking = False
    assert answers() == texts and lengths == [900, 64]


def test_a_judge_is_shown_what_follows_the_thinking_and_not_asked_about_nothing() -> None:
    asked: list[str] = []

    def stock(_: Any, texts: list[str]) -> dict[str, Any]:
        asked.extend(texts)
        return {"avg_accuracy": {"rating": 1, "match_success": True}}

    doc, unread = {"video_id": "v", "dim": "action"}, Choice(option=None, rule=UNREAD)
    for text, score in (("B or C?</think> it rises", 1.0), ("<think>it rises", 0.0), (" ", 0.0)):
        found = hooks._tempcompass(stock, doc, text, unread, None, judge=True)
        assert found[hooks.ROW_KEY]["score"] == score
    assert asked == ["it rises"]


# --- names and rows ----------------------------------------------------------------------------------


def test_tasks_are_chosen_by_benchmark_or_name() -> None:
    names = [task.name for task in choose_tasks()]
    assert len(names) == 3 + 20 + 1 and "tempcompass_captioning" not in names
    assert len(choose_tasks(judge=True)) == 25
    chosen = choose_tasks(["videomme", "tempcompass"], ["tempcompass_yes_no"])
    assert [task.name for task in chosen] == [
        "tempcompass_multi_choice",
        "tempcompass_caption_matching",
        "videomme",
    ]
    assert {task.benchmark for task in choose_tasks(skip=["mvbench"])} == {"tempcompass", "videomme"}
    for only, skip, says in (
        (["mvbench_action_cuont"], [], "mvbench_action_count"),
        (None, ["videome"], "videomme"),
        (["videomme"], ["videomme"], "no task is left"),
        (["tempcompass_captioning"], [], "--judge"),
    ):
        with pytest.raises(UserError, match=says):
            choose_tasks(only, skip)


def test_rows_are_held_to_their_schema() -> None:
    keys = BENCHMARKS["mvbench"].keys
    row = {"video": "v.mp4", "question": "q", "candidates": ["x", "y"], "answer": "x", "start": 3}
    check_row(row, keys, "f:1")
    for change, says in (
        ({"candidates": "x"}, "f:1: \"candidates\" is 'x'; it must be a list of strings"),
        ({"candidates": ["x", 1]}, '"candidates"'),
        ({"answer": 1}, '"answer" is 1; it must be a string'),
    ):
        with pytest.raises(UserError, match=says.replace("(", "\\(")):
            check_row({**row, **change}, keys, "f:1")
    del row["video"]
    with pytest.raises(UserError, match='"video" is missing'):
        check_row(row, keys, "f:1")


# --- sums --------------------------------------------------------------------------------------------


def row(task: str, video: str, score: float, rule: str = "alone", group: str | None = None) -> ScoredRow:
    return ScoredRow(task=task, video=video, score=score, rule=rule, group=group)


def test_the_two_means() -> None:
    rows = [row("a", "v", 1), row("a", "w", 1), row("a", "w", 0, UNREAD), row("b", "v", 0, MISSING)]
    questions, subtasks = accuracy(rows), accuracy(rows, "subtasks")
    assert questions.accuracy == pytest.approx(50) and subtasks.accuracy == pytest.approx(100 / 3)
    assert (subtasks.n, subtasks.videos, subtasks.unparsed, subtasks.missing) == (4, 2, 1, 1)


ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("uvwxyz"), st.sampled_from([0.0, 1.0])),
    min_size=1,
    max_size=30,
)


@given(ROWS)
def test_intervals_are_over_videos(values: list[tuple[str, str, float]]) -> None:
    rows = [row(*value) for value in values]
    plain = accuracy(rows)
    scores_N1 = np.array([[100 * r.score] for r in rows])
    if len({r.video for r in rows}) == 1:
        assert plain.ci95 is None
        return
    assert plain.ci95 == pytest.approx(interval95(scores_N1, [r.video for r in rows])[0])
    one = accuracy([row("a", video, score) for _, video, score in values], "subtasks")
    assert one.accuracy == pytest.approx(plain.accuracy) and one.ci95 == pytest.approx(plain.ci95)
    # Every row once in each of two subtasks: both means are the same, in every draw.
    twice = [row(task, video, score) for _, video, score in values for task in "ab"]
    assert accuracy(twice, "subtasks").ci95 == pytest.approx(accuracy(twice).ci95)
    both = accuracy(rows, "subtasks").ci95
    assert both is not None and -1e-9 <= both[0] <= both[1] <= 100 + 1e-9


def test_benchmarks_are_summed_up_apart() -> None:
    tasks = {task.name: task for task in choose_tasks()}
    rows = {
        tasks["videomme"]: [
            row("videomme", "v", 1, group="short"),
            row("videomme", "v", 0, group="long"),
            row("videomme", "w", 1, group="short"),
        ],
        tasks["tempcompass_yes_no"]: [row("tempcompass_yes_no", "v", 1)],
        tasks["tempcompass_multi_choice"]: [row("tempcompass_multi_choice", "v", s) for s in (0, 0, 1)],
    }
    tempcompass, videomme = benchmark_scores(rows)
    assert tempcompass.overall.accuracy == pytest.approx((100 + 100 / 3) / 2)
    assert tempcompass.left_out == ("tempcompass_caption_matching", "tempcompass_captioning")
    assert videomme.overall.accuracy == pytest.approx(200 / 3) and videomme.left_out == ()
    assert {name: part.accuracy for name, part in videomme.groups.items()} == {"short": 100.0, "long": 0.0}


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed_version", lambda: None)


@pytest.mark.usefixtures("without_package")
def test_without_lmms_eval_the_way_to_get_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suite", "--check"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[:2] == [f"lmms-eval {LMMS_EVAL}: not installed", f"    {requirements.INSTALL}"]
    assert err == ""
    for words in (["no/such/model"], ["--download"]):
        assert main(["suite", *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "not installed" in err and "make bench" in err


def test_another_release_is_not_taken_for_the_pinned_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "installed_version", lambda: "0.9.9")
    monkeypatch.setattr(requirements, "stock_folder", lambda: Path("."))
    with pytest.raises(UserError, match=r"0\.9\.9 is installed"):
        requirements.require_package()
    monkeypatch.setattr(requirements, "installed_version", lambda: LMMS_EVAL)
    requirements.require_package()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["suite"], "suite needs a MODEL"),
        (["suite", "m", "--data", "d.jsonl"], "--data d.jsonl"),
        (["suite", "m", "--video-root", "v"], "--video-root"),
        (["suite", "m", "--tasks", "mvbenhc"], "'mvbench'"),
        (["suite", "m", "--skpi", "mvbench"], "did you mean --skip?); see video-opd suite --help"),
        (["suite", "m", "--dtype", "bfloat16"], "did you mean --model.dtype?"),
        (["evaluate", "--suite", "other", "m"], "--suite other: there is one suite; write video-opd suite"),
        (["evaluate", "--suite"], "there is one suite"),
        (["evaluate", "--data", "d.jsonl", "--predictions", "p.jsonl", "--check"], "arguments: --check"),
        (["evaluate", "m", "--data", "d.jsonl"], "--model"),
        (["evaluate", "--data", "d.jsonl"], "--predictions"),
        (["evaluate", "--predictions", "p.jsonl"], "--data"),
    ],
)
def test_wrong_arguments(
    words: list[str],
    names: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and names in err
    assert list(tmp_path.iterdir()) == []


def test_one_process_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["suite", "m"]) == 2
    assert "one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "evaluate --suite general m --tasks mvbench --video.fps 1 --json - --batch-size 2",
        "evaluate m --tasks mvbench --video.fps 1 --suite=general --json - --batch-size 2",
        "--debug evaluate m --tasks mvbench --json - --video.fps 1 --batch-size 2 --suite general",
    ],
)
def test_the_older_spelling_is_the_same_command(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    new = "suite m --tasks mvbench --video.fps 1 --json - --batch-size 2"
    expected = parse_words(new.split())
    assert capsys.readouterr() == ("", "") and expected.command is suite
    found = parse_words(words.split())
    assert {**vars(found), "debug": False} == {**vars(expected), "debug": False}
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "video-opd suite" in err


def test_the_older_spelling_shows_the_help_of_the_new(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["evaluate", "--suite", "general", "--help"])
    assert leave.value.code == 0 and "--allow-missing" in capsys.readouterr().out


def test_every_flag_reaches_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def run(model: str, settings: SuiteSettings, **options: Any) -> Any:
        calls.append((model, settings, options))
        return SimpleNamespace(to_json=dict)

    monkeypatch.setattr("video_opd.suites.suite.run", run)
    words = (
        f"suite m --out {tmp_path} --data-root d --tasks mvbench,videomme --skip videomme --limit 3 --judge "
        "--allow-missing --device cpu --max-new-tokens 9 --seed 4 --overwrite --batch-size 2 --workers 5 "
        "--video.fps 1 --json -"
    )
    assert main(words.split()) == 0
    [(model, settings, options)] = calls
    assert model == "m" and settings == SuiteSettings(
        out=tmp_path,
        data_root=Path("d"),
        only=("mvbench", "videomme"),
        skip=("videomme",),
        limit=3,
        judge=True,
        allow_missing=True,
    )
    assert options == {
        "overrides": ["--video.fps", "1"],
        "batch_size": 2,
        "workers": 5,
        "device": "cpu",
        "max_new_tokens": 9,
        "seed": 4,
        "overwrite": True,
    }


def test_results_of_a_run_have_a_place_of_their_own() -> None:
    assert default_out("runs/a/model") == Path("runs/general/a-model")
    assert default_out("runs/b/model") != default_out("runs/a/model")


def test_the_entry_point_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nvideo_opd = "video_opd.suites.entry:manifest"' in text
