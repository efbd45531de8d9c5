"""Rounds: what each chooses, what the next starts from, and kills in every stage that leave no trace.

On the shipped tiny models and three generated videos: the teacher is right about most rows, so the gate is
real.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from process_cases import die_after
from training_cases import fork, repeatable, rows_of, said_by_two

from video_opd.cli import main
from video_opd.config import Recipe, SelectionConfig, dump_recipe, load_recipe, recipe_from_dict
from video_opd.curriculum import pool
from video_opd.curriculum.scores import ScoreSettings
from video_opd.curriculum.tvdf import select_file
from video_opd.errors import UserError
from video_opd.jsonl import write_jsonl
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.policy import HFPolicy
from video_opd.processes import Processes
from video_opd.reports.html import write_report
from video_opd.reports.runs import read_run
from video_opd.training import components, run_plan
from video_opd.training import rounds as rounds_module
from video_opd.training.components import build_components
from video_opd.training.loop import train
from video_opd.training.rounds import run_rounds
from video_opd.training.run_folder import FolderInUse, RunFolder
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped

UNANNOTATED, WRONG = 2, 2
K = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of some fifteen rows, two of them without spans and two with wrong ones; two test videos."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, videos={"train": 3, "short": 2}, workers=1)
    rows = rows_of(folder / "train.jsonl")
    for row in rows[:UNANNOTATED]:
        row["spans"] = []
    for row in rows[UNANNOTATED : UNANNOTATED + WRONG]:
        row["spans"] = [[0.0, 0.01]]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_recipe(world: Path, run_dir: Path, **sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "model": {"path": str(shipped("tiny-base"))},
        "teacher": {"path": str(shipped("tiny-teacher"))},
        "data": {"train": str(world / "pool.jsonl"), "workers": 0, "cache_dir": str(world / "clips")},
        "video": {"min_frame_tokens": 4, "max_frame_tokens": 8},
        "sampling": {"max_new_tokens": 14},
        "optim": {"lr": 1e-3, "batch_size": 2},
        "run": {"dir": str(run_dir), "trackers": [], "save_every": 1, "check": False},
        "evaluate": {"data": [str(world / "short.jsonl")], "batch_size": 2},
        "tvdf": {"k": K, "teacher_k": 2, "student_k": 1, "min_teacher_iou": 0.3, "batch_size": 2},
        "rounds": {"count": 3},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return recipe_from_dict(tree)


class Asked:
    """Counts the prompts that each model responds to from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[str, int]] = []  # (who, n)
        generate = pool.score.__globals__["generate_responses"]

        def counted(policy: Any, prompts: Any, settings: Any, purpose: str, *prefix: Any) -> Any:
            self.rows += [(purpose.removeprefix("score "), settings.n)] * len(prompts)
            return generate(policy, prompts, settings, purpose, *prefix)

        monkeypatch.setitem(pool.score.__globals__, "generate_responses", counted)

    def count(self, who: str) -> int:
        return sum(name == who for name, _ in self.rows)


@pytest.fixture(scope="module")
def three(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Recipe, Asked]]:
    """Three rounds without a kill. They rank by the reverse KL, whose digits would betray other batches."""
    monkeypatch = pytest.MonkeyPatch()
    asked = Asked(monkeypatch)
    folder = tmp_path_factory.mktemp("three") / "run"
    recipe = make_recipe(world, folder, tvdf={"rank_by": "reverse_kl"})
    run_rounds(recipe)
    monkeypatch.undo()
    yield folder, recipe, asked


def ids(path: Path) -> list[str]:
    return [row["id"] for row in rows_of(path)]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# --------------------------------------------------------------------------------------- what a round does


def test_each_round_trains_the_last_student_on_rows_of_its_own(three: tuple[Path, Recipe, Asked]) -> None:
    folder, recipe, _ = three
    chosen = [ids(folder / f"round-{n}" / "selected.jsonl") for n in (1, 2, 3)]
    assert [len(rows) for rows in chosen] == [K, K, K]
    assert len({i for rows in chosen for i in rows}) == 3 * K
    start = recipe.model.path
    for n in (1, 2, 3):
        path = folder / f"round-{n}"
        settings = yaml.safe_load((path / "recipe.yaml").read_text())
        assert settings["model"]["path"] == start
        assert settings["run"]["seed"] == n - 1
        note = read(path / "scores.jsonl.meta.json")
        assert note["student"] == model_fingerprint(start)
        assert rows_of(path / "metrics.jsonl")[-1]["step"] == 2  # three rows in batches of two
        assert {row["id"] for row in rows_of(path / "rollouts.jsonl")} <= set(chosen[n - 1])
        start = str(path / "model")
    students = [model_fingerprint(folder / f"round-{n}" / "model") for n in (1, 2, 3)]
    assert len(set(students)) == 3


def test_a_selection_is_that_of_the_command(
    three: tuple[Path, Recipe, Asked], world: Path, tmp_path: Path
) -> None:
    folder, _, _ = three
    used: list[str] = []
    for n in (1, 2, 3):
        path = folder / f"round-{n}"
        shutil.copytree(path, tmp_path / f"round-{n}", ignore=lambda *_: ["model", "checkpoints"])
        out = folder / f"round-{n}" / "again.jsonl"  # in the same place: paths of videos are relative to it
        _, summary = select_file(
            world / "pool.jsonl",
            path / "scores.jsonl",
            SelectionConfig(k=K, rank_by="reverse_kl", min_teacher_iou=0.3),
            seed=n - 1,
            exclude=used,
            out=out,
        )
        assert out.read_bytes() == (path / "selected.jsonl").read_bytes()
        out.unlink()
        record = read(path / "select.json")
        # A later start knows by it whether the selection is still the one that was made.
        assert len(record.pop("digest")) == 64
        assert record.pop("sha256") == hashlib.sha256((path / "selected.jsonl").read_bytes()).hexdigest()
        assert record.pop("delta")["n"] == len(rows_of(path / "scores.jsonl"))
        assert record == json.loads(json.dumps(summary.to_json()))
        used += ids(path / "selected.jsonl")


def test_the_teacher_answers_once_and_the_student_each_round(
    three: tuple[Path, Recipe, Asked], world: Path
) -> None:
    folder, _, asked = three
    annotated = len(ids(world / "pool.jsonl")) - UNANNOTATED
    assert asked.count("teacher") == annotated
    assert asked.count("student") == annotated + (annotated - K) + (annotated - 2 * K)
    assert set(asked.rows) == {("teacher", 2), ("student", 1)}
    first, last = (
        {row["id"]: row for row in rows_of(folder / f"round-{n}" / "scores.jsonl")} for n in (1, 3)
    )
    assert set(last) < set(first)
    assert all(last[i]["teacher_responses"] == first[i]["teacher_responses"] for i in last)
    assert any(last[i]["reverse_kl"] != first[i]["reverse_kl"] for i in last)


def test_the_summary_counts_every_row(three: tuple[Path, Recipe, Asked], world: Path) -> None:
    folder, _, _ = three
    summary = read(folder / "rounds.json")
    assert summary["finished"] and summary["ended"] is None
    assert [record["used_before"] for record in summary["rounds"]] == [0, K, 2 * K]
    assert [record["used"] for record in summary["rounds"]] == [K, 2 * K, 3 * K]
    for record in summary["rounds"]:
        excluded = ("used_before", "unannotated", "unscored", "not_asked", "unmeasured", "failed_gate")
        assert (
            sum(record[key] for key in (*excluded, "candidates"))
            == record["rows"]
            == len(ids(world / "pool.jsonl"))
        )
        assert record["unannotated"] == UNANNOTATED
        assert record["unscored"] == record["unmeasured"] == record["shortfall"] == 0
        assert record["failed_gate"] >= WRONG
        path = folder / f"round-{record['round']}"
        scores = [row["teacher_iou"] - row["student_iou"] for row in rows_of(path / "scores.jsonl")]
        assert record["delta"]["scored"]["n"] == len(scores)
        assert record["delta"]["scored"]["mean"] == pytest.approx(sum(scores) / len(scores))
        chosen = [row["tvdf"]["delta"] for row in rows_of(path / "selected.jsonl")]
        assert record["delta"]["selected"]["max"] == pytest.approx(max(chosen))
        measured = read(path / "eval" / "student-short.json")
        assert record["evaluation"]["short"]["mIoU"] == measured["mIoU"]
        assert record["evaluation"]["short"]["ci95"] == measured["ci95"]
        failures = rows_of(path / "eval" / "failures-short.jsonl")  # for reports
        known = {row["id"] for row in rows_of(path / "eval" / "annotations-short.jsonl")}
        assert failures and {row["id"] for row in failures} <= known
        for row in failures:
            assert len(row["frames"]) == len(row["frame_times_s"]) > 1
            pairs = zip(row["teacher_logprobs"], row["student_logprobs"], strict=True)
            assert row["r"] == pytest.approx([teacher - student for teacher, student in pairs], abs=1e-5)
            assert [top[0][0] for top in row["student_top"]] == row["tokens"]  # greedy
    for name in ("base", "teacher"):
        assert summary[name]["short"]["mIoU"] == read(folder / "eval" / f"{name}-short.json")["mIoU"]


def test_what_is_evaluated_as_the_base_is_what_predict_answers(
    three: tuple[Path, Recipe, Asked], world: Path, tmp_path: Path
) -> None:
    folder, _, _ = three
    for name in ("base", "teacher"):
        out = tmp_path / f"{name}.jsonl"
        words = ["predict", str(shipped(f"tiny-{name}")), str(world / "short.jsonl"), "--out", str(out)]
        assert main([*words, "--max-new-tokens", "14", "--batch-size", "2"]) == 0
        responses = {row["id"]: row["responses"] for row in rows_of(out)}
        assert {
            row["id"]: row["responses"] for row in rows_of(folder / f"eval/{name}-short.jsonl")
        } == responses


def test_a_finished_folder_returns_at_once_and_refuses_another_recipe(
    three: tuple[Path, Recipe, Asked], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe, _ = three

    def nothing(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("finished rounds do nothing")

    for name in ("score_pool", "select_file", "train", "evaluate_base", "read_samples"):
        monkeypatch.setattr(rounds_module, name, nothing)
    reported: list[Path] = []
    result = run_rounds(recipe, nothing, reported.append)
    assert reported == [folder]
    assert result.model == folder / "round-3" / "model"
    assert result.summary == read(folder / "rounds.json")
    other = make_recipe(world, folder, tvdf={"rank_by": "reverse_kl", "k": 4})
    with pytest.raises(UserError, match=r"tvdf\.k = 3, now it is 4"):
        run_rounds(other)
    with pytest.raises(UserError, match="holds the rounds"):
        train(recipe, nothing)
    with pytest.raises(UserError, match="holds a run of video-opd train"):
        run_rounds(make_recipe(world, folder / "round-1"))


def test_the_report_shows_all_rounds(three: tuple[Path, Recipe, Asked], tmp_path: Path) -> None:
    folder, _, _ = three
    run = read_run(folder)
    assert run.models == ["base", "round 1", "round 2", "round 3", "teacher"]
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6]
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "6 steps of Video-OPD in 3 rounds" in page and "Round by round" in page
    for n, record in enumerate(read(folder / "rounds.json")["rounds"], start=1):
        figure = f"{record['evaluation']['short']['mIoU']:.1f}"
        row = page[page.index(f"</i>round {n}</th>") :].split("</tr>")[0]
        assert f'data-label="mIoU">{figure}</td>' in row
        assert f"round {n}: δ before and after" in page
        cells = page[page.index(f'data-label="round">{n}</th>') :].split("</tr>")[0]
        for label, cell in (
            ("stopped by the gate", record["failed_gate"]),
            ("candidates", record["candidates"]),
            ("δ of the selected", f"{record['delta']['selected']['mean']:+.2f}"),
        ):
            assert f'data-label="{label}">{cell}</td>' in cells
    chart = page[page.index(">mIoU on short</h3>") :].split("</svg>")[0]
    assert chart.count("95%: ") == 4  # the base and three rounds
    assert chart.count("<path") == 2  # the student, the teacher
    # A run that has no rounds looks as it did.
    assert "Round by round" not in write_report([folder / "round-1"], tmp_path / "one.html").read_text()


# -------------------------------------------------------------------------------------------------- kills


# What is there when a stage of round 2 is under way.
STAGES = {
    "opening": "scores.jsonl.meta.json",
    "scoring": "scores.jsonl",  # with its first batch
    "training": "environment.json",
    "evaluating": "model",
}


def kill_after(path: Path, recipe: Recipe, opened: int) -> None:
    """Makes rounds in a process that is killed some files after ``path``."""

    def work() -> None:
        die_after(path, opened)
        run_rounds(recipe)

    process = fork(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the rounds ended before they were killed after {path}"


def kill_in(stage: str, folder: Path, recipe: Recipe, opened: int) -> None:
    kill_after(folder / "round-2" / STAGES[stage], recipe, opened)


def die_between(recipe: Recipe, name: str) -> None:
    """Kills itself in the selection of round 2: before it, or when ``selected.jsonl`` is there."""
    real: Callable[..., Any] = rounds_module.select_file

    def deadly(data: Any, scores: Any, *arguments: Any, **settings: Any) -> Any:
        mine = "round-2" in str(scores)
        if mine and name == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(data, scores, *arguments, **settings)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    rounds_module.select_file = deadly  # in a fork
    run_rounds(recipe)


def contents(folder: Path) -> dict[str, Any]:
    """The content of all files by relative path, without times, machine, and files of torch.save."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name in ("environment.json", "training.pt", "state.json"):
            continue
        rows = path.name in ("metrics.jsonl", "rollouts.jsonl")
        found[name] = repeatable(rows_of(path)) if rows else path.read_bytes()
    return found


def test_kills_in_every_stage_leave_no_trace(
    three: tuple[Path, Recipe, Asked], world: Path, tmp_path: Path
) -> None:
    """The first round is copied from the run without a kill; the second is killed again and again."""
    whole, recipe, _ = three
    folder = whole.parent / "moved"
    shutil.copytree(whole, folder)
    # The same paths as the undisturbed run has: it is the one that is moved away.
    aside = whole.parent / "undisturbed"
    whole.rename(aside)
    folder.rename(whole)
    try:
        for name in ("round-2", "round-3"):
            shutil.rmtree(whole / name)
        (whole / "rounds.json").unlink()
        draws = random.Random(0)
        kill_in("opening", whole, recipe, draws.randrange(3))
        kill_in("scoring", whole, recipe, 0)
        assert not (whole / "round-2" / "select.json").exists()
        assert (
            2 <= len(ids(whole / "round-2" / "scores.jsonl")) < len(ids(aside / "round-2" / "scores.jsonl"))
        )
        for name in ("before", "after"):
            process = fork(die_between, recipe, name)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert (whole / "round-2" / "selected.jsonl").exists() == (name == "after")
            assert not (whole / "round-2" / "select.json").exists()
        for _ in range(2):
            kill_in("training", whole, recipe, draws.randrange(8))
        kill_in("evaluating", whole, recipe, draws.randrange(4))
        run_rounds(recipe)
        mine, theirs = contents(whole), contents(aside)
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name] != theirs[name]] == []
    finally:
        shutil.rmtree(whole)
        aside.rename(whole)


def test_damaged_files_of_rounds_are_made_again(
    three: tuple[Path, Recipe, Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, recipe, _ = three
    aside = whole.parent / "undisturbed"
    shutil.copytree(whole, aside)
    try:
        base = min(path for path in (whole / "eval").glob("base-*.json"))
        files = {
            whole / "rounds.json": b"null",
            whole / "round-1" / "select.json": bytes(100),
            base: b"[]",
        }
        for name in ("round-2/selected.jsonl", "round-1/model/model.safetensors"):
            content = bytearray((whole / name).read_bytes())
            content[-9] ^= 1  # one bit
            files[whole / name] = bytes(content)
        for path, damaged in files.items():
            path.write_bytes(damaged)
        # What was scored is summed up when its selection is made.
        scores = whole / "round-3" / "scores.jsonl"
        write_jsonl(scores, [row | {"student_iou": 0.987} for row in rows_of(scores)])
        run_rounds(recipe)
        shutil.copy(aside / "round-3" / "scores.jsonl", scores)
        told = "".join(capsys.readouterr().err.split())
        for path in files:
            assert f"{path.parent if path.parent.name == 'model' else path}isdamaged" in told
        shutil.rmtree(whole / "round-1" / "damaged-model")
        mine, theirs = contents(whole), contents(aside)
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name] != theirs[name]] == []
    finally:
        shutil.rmtree(whole)
        aside.rename(whole)


# -------------------------------------------------------------------------------------------- lazy scores


LAZY: dict[str, Any] = {
    "tvdf": {"k": 1, "teacher_k": 2, "student_k": 2, "min_teacher_iou": 0.3, "batch_size": 1},
    "optim": {"max_steps": 1, "batch_size": 1},
    "rounds": {"count": 2},
}


@pytest.fixture(scope="module")
def lazy(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Recipe]]:
    """Two rounds of top-k by δ, for which the scores are lazy, without a kill."""
    folder = tmp_path_factory.mktemp("lazy") / "run"
    recipe = make_recipe(world, folder, **LAZY)
    run_rounds(recipe)
    yield folder, recipe


def test_lazy_rounds_select_what_full_scores_select(
    lazy: tuple[Path, Recipe], world: Path, tmp_path: Path
) -> None:
    folder, recipe = lazy
    used: list[str] = []
    not_asked = 0
    for n in (1, 2):
        path = folder / f"round-{n}"
        rows = {row["id"]: row for row in rows_of(path / "scores.jsonl")}
        known = {i for i, row in rows.items() if "teacher_iou" in row}
        record = read(path / "select.json")
        assert record["not_asked"] == len(rows) - len(known)
        not_asked += record["not_asked"]
        settings = load_recipe(path / "recipe.yaml")
        out = tmp_path / f"{n}.jsonl"
        words = ["score", str(path / "recipe.yaml"), "--data.train", recipe.data.train, "--out", str(out)]
        # All rounds score with one seed; a round's own is that of its training.
        assert main([*words, "--k", "2", "--seed", "0", "--batch-size", "1"]) == 0
        full = {row["id"]: row for row in rows_of(out)}
        assert all(rows[i] == full[i] for i in known)
        assert all(row["student_iou"] == full[i]["student_iou"] for i, row in rows.items())
        chosen, _ = select_file(world / "pool.jsonl", out, settings.tvdf, exclude=used)
        assert [row["id"] for row in chosen] == ids(path / "selected.jsonl")
        assert [row["tvdf"] for row in chosen] == [row["tvdf"] for row in rows_of(path / "selected.jsonl")]
        used += ids(path / "selected.jsonl")
    assert not_asked > 0
    # Round 2 knows what round 1 was told.
    first, second = (
        {row["id"]: row for row in rows_of(folder / f"round-{n}" / "scores.jsonl")} for n in (1, 2)
    )
    told = {i for i, row in first.items() if "teacher_iou" in row} & second.keys()
    assert told and all(second[i]["teacher_responses"] == first[i]["teacher_responses"] for i in told)
    assert read(folder / "rounds.json")["rounds"][1]["not_asked"] == read(path / "select.json")["not_asked"]


def test_kills_in_lazy_scoring_leave_no_trace(lazy: tuple[Path, Recipe]) -> None:
    whole, recipe = lazy
    aside = whole.parent / "undisturbed"
    shutil.copytree(whole, aside)
    try:
        shutil.rmtree(whole / "round-2")
        shutil.rmtree(whole / "round-1" / "eval")
        for file in ("round-1/scores.jsonl", "round-1/select.json", "round-1/done.json", "rounds.json"):
            (whole / file).unlink()
        for path in (whole / "round-1" / "scores.jsonl.student", whole / "round-1" / "scores.jsonl.teacher"):
            kill_after(path, recipe, 0)
            assert path.exists()
            assert not (whole / "round-1" / "scores.jsonl").exists()
        run_rounds(recipe)
        mine, theirs = contents(whole), contents(aside)
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name] != theirs[name]] == []
    finally:
        shutil.rmtree(whole)
        aside.rename(whole)


def test_two_processes_score_and_evaluate_what_one_does(
    lazy: tuple[Path, Recipe], world: Path, tmp_path: Path
) -> None:
    whole, _ = lazy
    recipe = make_recipe(world, tmp_path / "run", **{**LAZY, "rounds": {"count": 1}})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    codes, said = said_by_two(["rounds", str(tmp_path / "recipe.yaml")], tmp_path)
    assert codes == [0, 0], said
    alone, two = whole, tmp_path / "run"
    names = [f"eval/{name}-short.{end}" for name in ("base", "teacher") for end in ("jsonl", "json")]
    names += [f"round-1/{name}.jsonl" for name in ("scores", "selected")]
    for name in names:
        assert (two / name).read_bytes() == (alone / name).read_bytes(), name
    responses = [rows_of(folder / "round-1" / "eval" / "student-short.jsonl") for folder in (alone, two)]
    assert (
        responses[0] == responses[1] and not list(two.rglob("*.part-*")) and not list(two.rglob("*.window*"))
    )


# ---------------------------------------------------------------------------------- other settings, refusals


@pytest.mark.parametrize(
    ("missing", "sections", "said"),
    [
        ("torchao", {"optim": {"moments": "int8"}}, r"optim\.moments int8 needs torchao"),
        (
            "vllm",
            {"sampling": {"engine": "vllm"}, "loss": {"max_importance_weight": 2.0}},
            "vLLM is not installed",
        ),
        ("memory", {}, "it cannot fit"),
    ],
)
def test_what_training_would_refuse_is_refused_before_the_pool_is_scored(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    sections: dict[str, Any],
    said: str,
) -> None:
    def nothing(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("hours are spent here")

    for name in ("score_pool", "evaluate_base", "evaluate_teacher", "train"):
        monkeypatch.setattr(rounds_module, name, nothing)
    if missing == "memory":
        monkeypatch.setattr(rounds_module, "chosen_device", lambda _: "cuda")
        for name in ("free_bytes", "total_bytes"):
            monkeypatch.setattr(run_plan, name, lambda _: 1 << 20)
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr(components, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        run_rounds(make_recipe(world, tmp_path / "run", **sections))


def test_rows_may_be_used_again_and_a_teacher_that_is_known_is_not_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    load_student, load_teacher = pool.load_inference_model, pool.load_teacher

    def student(config: Any, *arguments: Any) -> Any:
        opened.append(Path(config.model.path).name)
        return load_student(config, *arguments)

    def teacher(path: str, *settings: Any) -> Any:
        opened.append(Path(path).name)
        return load_teacher(path, *settings)

    monkeypatch.setattr(pool, "load_inference_model", student)
    monkeypatch.setattr(pool, "load_teacher", teacher)
    recipe = make_recipe(
        world,
        tmp_path / "run",
        rounds={"count": 2, "reuse": True},
        tvdf={"k": 50, "strategy": "random", "min_teacher_iou": 0.0, "teacher_k": 1},
        optim={"max_steps": 1},
        evaluate={"data": []},
    )
    seen: list[Path] = []
    run_rounds(recipe, after_round=seen.append)
    assert seen == [tmp_path / "run"] * 3  # at the end, too
    assert opened == ["tiny-base", "tiny-teacher", "model"]
    summary = read(tmp_path / "run" / "rounds.json")
    first, second = (set(ids(tmp_path / "run" / f"round-{n}" / "selected.jsonl")) for n in (1, 2))
    # All that have a score; those without spans have none. A shortfall is told, not an error.
    annotated = len(ids(world / "pool.jsonl")) - UNANNOTATED
    assert first == second and len(first) == annotated
    assert [record["shortfall"] for record in summary["rounds"]] == [50 - annotated] * 2
    assert [record["unscored"] for record in summary["rounds"]] == [UNANNOTATED] * 2
    assert [record["used"] for record in summary["rounds"]] == [annotated] * 2
    assert summary["base"] == summary["teacher"] == {}
    assert not (tmp_path / "run" / "eval").exists()


def test_a_pool_that_is_used_up_ends_the_rounds(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    recipe = make_recipe(
        world,
        tmp_path / "run",
        tvdf={"k": 50, "min_teacher_iou": 0.3},
        optim={"max_steps": 1},
        evaluate={"data": []},
    )
    path.write_text(dump_recipe(recipe))
    assert main(["rounds", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert len(record["rounds"]) == 1 and record["finished"]
    assert "round 2 has nothing to train on" in record["ended"] and "were used before" in record["ended"]
    assert "failed the gate" in record["ended"] and f"{UNANNOTATED} have no spans" in record["ended"]
    assert record["ended"] in err and "fewer than the 50 asked for" in err
    assert Path(record["report"]).exists() and Path(record["model"]).is_dir()
    assert main(["rounds", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "finished: nothing to do" in err and "round 2 has nothing" in out and "report: " in out
    assert main(["rounds", str(path), "--rounds.count", "4"]) == 2


@pytest.mark.parametrize("left", ["nothing", "the teacher's evaluation", "the last selection"])
def test_servers_are_asked_where_a_part_that_is_left_needs_them(
    three: tuple[Path, Recipe, Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Training by a method that learns from annotations asks no teacher."""
    folder, recipe, _ = three
    asked: list[Any] = []
    monkeypatch.setattr(rounds_module, "check_served_teacher", lambda *_: asked.append(1))
    shutil.copytree(folder, tmp_path / "run", ignore=lambda *_: ["model", "checkpoints"])
    tree = yaml.safe_load(dump_recipe(recipe))
    run = {**tree["run"], "dir": str(tmp_path / "run")}
    for method in ("video-opd", "sft"):
        keys = {key: value for key, value in tree.items() if key not in ("sampling", "loss")}
        teacher = {"path": tree["teacher"]["path"], "urls": ["http://a"]}
        changed = recipe_from_dict({**keys, "run": run, "teacher": teacher, "method": method})
        rounds = rounds_module.Rounds(changed, build_components, Processes())
        if left == "the teacher's evaluation":
            (tmp_path / "run" / "eval" / "teacher-short.json").unlink(missing_ok=True)
        if left == "the last selection":
            (tmp_path / "run" / "round-3" / "select.json").unlink(missing_ok=True)
        rounds._check()
        assert bool(asked) is (method == "video-opd" or left != "nothing")
        asked.clear()


def test_a_first_round_without_a_single_row_is_an_error(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare.jsonl").write_text(
        "".join(json.dumps({**row, "spans": []}) + "\n" for row in rows_of(world / "pool.jsonl")[:3])
    )
    path = tmp_path / "r.yaml"
    path.write_text(dump_recipe(make_recipe(world, tmp_path / "run", evaluate={"data": []})))
    assert main(["rounds", str(path), "--data.train", str(tmp_path / "bare.jsonl")]) == 2
    assert "of the pool's 3 rows, 3 have no spans" in capsys.readouterr().err
    assert not (tmp_path / "run" / "round-1" / "recipe.yaml").exists()


def test_videos_that_are_away_for_a_while_do_not_decide_a_selection(world: Path, tmp_path: Path) -> None:
    """A selection is final; the rows that could not be scored are scored when the rounds are repeated."""
    videos = tmp_path / "videos"
    shutil.copytree(world / "videos", videos)
    rows = [{**row, "video": str(videos / Path(row["video"]).name)} for row in rows_of(world / "pool.jsonl")]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    sections: dict[str, Any] = {
        "data": {"train": str(tmp_path / "pool.jsonl"), "cache_dir": None},
        "evaluate": {"data": []},
        "tvdf": {"min_teacher_iou": 0},
        "rounds": {"count": 1},
    }
    recipe = make_recipe(world, tmp_path / "run", **sections)
    gone = Path(rows[0]["video"])
    gone.rename(tmp_path / gone.name)
    with pytest.raises(UserError, match=r"videos of \d+ of the \d+ rows .* cannot be read, more than 5%"):
        run_rounds(recipe)
    assert not (tmp_path / "run" / "round-1" / "select.json").exists()
    begun = load_recipe(tmp_path / "run" / "recipe.yaml")
    RunFolder(recipe.run.dir).claim_for_rounds(begun.changed(**{"data.max_failed_share": 0.9}))  # as it says
    (tmp_path / gone.name).rename(gone)
    run_rounds(recipe)
    assert read(tmp_path / "run" / "round-1" / "select.json")["unscored"] == UNANNOTATED


def test_gaussian_needs_no_teacher(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO's choice by difficulty, round by round."""
    tree = yaml.safe_load(dump_recipe(make_recipe(world, tmp_path / "run", evaluate={"data": []})))
    tree |= {"method": "grpo", "teacher": {}, "rounds": {"count": 1}}
    tree["tvdf"] = {"strategy": "gaussian", "k": 2, "teacher_k": 1, "batch_size": 4}
    tree["sampling"]["rollouts"] = 2
    tree["optim"]["max_steps"] = 1
    asked = Asked(monkeypatch)
    run_rounds(recipe_from_dict(tree))
    assert asked.count("teacher") == 0 and asked.count("student") > 0
    chosen = rows_of(tmp_path / "run" / "round-1" / "selected.jsonl")
    assert len(chosen) == 2 and all(row["tvdf"]["teacher_iou"] is None for row in chosen)


SECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"rounds": {"count": 0}}, r"rounds\.count must be at least 1"),
    ({"tvdf": {"k": 0}}, r"tvdf\.k must be at least 1"),
    ({"tvdf": {"strategy": "gaussian", "student_k": 0}}, "gaussian reads the student's responses"),
    ({"tvdf": {"strategy": "gaussian", "rank_by": "reverse_kl"}}, r"tvdf\.rank_by means nothing to strategy"),
    ({"tvdf": {"buckets": 3}}, r"tvdf\.buckets means nothing to strategy topk \(only to bbds\)"),
    ({"tvdf": {"center": 0.5}}, r"tvdf\.center means nothing"),
    ({"tvdf": {"strategy": "gwds", "sigma": 0.0}}, r"tvdf\.sigma must be at least 1e-06"),
    ({"tvdf": {"temperature": 0.0}}, "makes all responses the same"),
    ({"tvdf": {"min_teacher_iou": 50}}, "at most 1"),
    ({"tvdf": {"strategy": "top"}}, "did you mean topk"),
    ({"tvdf": {"kk": 3}}, r"did you mean tvdf\.k\b"),
]


@pytest.mark.parametrize(("sections", "expected"), SECTIONS)
def test_impossible_settings_are_refused_with_the_recipe(sections: dict[str, Any], expected: str) -> None:
    tree = {"teacher": {"path": "t"}, "data": {"train": "d"}, **sections}
    with pytest.raises(UserError, match=expected):
        recipe_from_dict(tree)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"method": "grpo"}, "tvdf.strategy topk asks a teacher"),
        ({"method": "grpo", "tvdf": {"strategy": "gaussian", "min_teacher_iou": 0.5}}, "asks a teacher"),
        ({"teacher": {"path": "t", "by_source": {"web": "w"}}}, "one teacher about the whole pool"),
        ({"teacher": {"path": "t"}, "run": {"seed": 2**32 - 2}}, "the last of them would train with seed"),
    ],
)
def test_what_only_rounds_need_is_not_asked_of_train(sections: dict[str, Any], expected: str) -> None:
    recipe = recipe_from_dict({"data": {"train": "d"}, **sections})
    with pytest.raises(UserError, match=expected):
        recipe.check_rounds()


def test_the_defaults_are_the_papers() -> None:
    recipe = recipe_from_dict({"teacher": {"path": "t"}, "data": {"train": "d"}})
    assert (recipe.tvdf.k, recipe.rounds.count, recipe.rounds.reuse) == (2500, 3, False)
    assert (recipe.tvdf.strategy, recipe.tvdf.rank_by, recipe.tvdf.min_teacher_iou) == (
        "topk",
        "iou_gap",
        0.5,
    )
    assert recipe.tvdf.teacher_k == recipe.tvdf.responses_of_student == ScoreSettings().k
    ungated = recipe_from_dict(
        {"teacher": {"path": "t"}, "data": {"train": "d"}, "tvdf": {"strategy": "random"}}
    )
    assert ungated.tvdf.min_teacher_iou == 0.0


@pytest.mark.parametrize("name", ["base", "teacher"])
def test_answers_of_another_models_are_not_taken_for_these(world: Path, tmp_path: Path, name: str) -> None:
    """Base and teacher answer before the first round begins: their answers belong to the recipe, too."""
    folder = RunFolder(tmp_path / "run")
    recipe = make_recipe(world, folder.path)
    folder.claim_for_rounds(recipe)
    other = recipe.changed(**{"optim.lr": 0.5})
    folder.claim_for_rounds(other)  # nothing was answered yet
    folder.evaluations.mkdir()
    (folder.evaluations / f"{name}-short.jsonl").write_text("")
    folder.claim_for_rounds(other.changed(**{"teacher.placement": "whole"}))  # changes no answer
    with pytest.raises(FolderInUse, match=r"optim\.lr = 0\.5"):
        folder.claim_for_rounds(recipe)


@pytest.mark.parametrize("fault", ["another recipe", "no pool"])
def test_an_error_of_the_first_process_ends_all_with_one_message(
    world: Path, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "run"
    recipe = make_recipe(world, folder, data={"train": str(world / "pool.jsonl")})
    changes, named = ["--data.train", "nowhere.jsonl"], "nowhere.jsonl"
    if fault == "another recipe":
        RunFolder(folder).claim_for_rounds(recipe)
        (folder / "round-1").mkdir()
        changes, named = ["--optim.lr", "0.5"], "optim.lr"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    codes, said = said_by_two(["rounds", str(tmp_path / "recipe.yaml"), *changes], tmp_path)
    errors = [line for line in said if line.startswith("video-opd: ")]
    assert codes == [2, 2] and len(errors) == 1 and named in errors[0], (codes, said)


def test_train_ignores_the_two_sections(world: Path, tmp_path: Path) -> None:
    """Also those of a folder that was made before there were any."""
    sections: dict[str, Any] = {"optim": {"max_steps": 1}, "evaluate": {"data": []}}
    train(make_recipe(world, tmp_path / "run", **sections))
    path = tmp_path / "run" / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    del tree["tvdf"], tree["rounds"]
    path.write_text(yaml.safe_dump(tree))
    (tmp_path / "run" / "done.json").unlink()
    train(make_recipe(world, tmp_path / "run", tvdf={"k": 9}, **sections))
    assert (tmp_path / "run" / "done.json").exists()


def test_a_lazy_policy_answers_as_the_one_that_it_loads() -> None:
    class Policy:
        def prefill(self, prompts: Any) -> Any:
            return ("prefix", prompts)

        sample = logprobs = prefill

    loads: list[int] = []

    def load() -> Any:
        loads.append(1)
        return Policy()

    later = pool.LazyPolicy(load)
    assert not loads
    assert [later.prefill("p"), later.sample("q"), later.logprobs("r")] == [("prefix", p) for p in "pqr"]
    assert loads == [1]
    for name in ("prefill", "sample", "logprobs"):
        assert hasattr(HFPolicy, name)
