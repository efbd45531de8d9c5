"""Broken files of runs and of what is continued: outputs with their seals, scores, rounds, reports,
checkpoints (see ``fuzz_cases.py``).

Where a file has a digest or a seal, a case that is neither refused nor named must end with what an undamaged
folder gives.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fuzz_cases import (
    annotation_rows,
    broken_json,
    broken_rows,
    lines_of,
    mutate,
    odd_bytes,
    odd_number,
    odd_tree,
    outcome,
    run_command,
)

from video_opd.config import Recipe, dump_recipe, recipe_from_dict
from video_opd.evaluation.output import Output
from video_opd.evaluation.resume import known_rows
from video_opd.jsonl import append_jsonl, read_jsonl
from video_opd.reports.html import write_report
from video_opd.types import Sample

PROVENANCE = {
    "model": "abc",
    "input": {"prompt": {"style": "paper", "video_form": "release"}},
    "answers": {"n": 1},
}
WHOLE = os.environ.get("VIDEO_OPD_FUZZ", "") not in ("", "0")


def fresh(folder: Path, good: Path | None = None) -> Path:
    """An empty folder, or a copy of a good one."""
    path = folder / "broken"
    shutil.rmtree(path, ignore_errors=True)
    if good is None:
        path.mkdir()
    else:
        shutil.copytree(good, path)
    return path


def files_below(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files_below(path)}


def break_file(rng: random.Random, file: Path, *, pipes: bool = True) -> None:
    """Damage, or other values, as the kind of the file has them. Or the file is gone, or something else."""
    blob = file.read_bytes()
    if rng.random() < 0.1:
        file.unlink()
        others: list[Callable[[], object]] = [file.mkdir, lambda: file.symlink_to(file.name)]
        if pipes:
            others.append(lambda: os.mkfifo(file))
        if rng.random() < 0.5:
            rng.choice(others)()
    elif is_broken(file, blob) or rng.random() < 0.2 or file.suffix not in (".json", ".jsonl", ".yaml"):
        file.write_bytes(mutate(rng, blob))
    elif file.suffix == ".json" or file.name.endswith(".meta.json"):
        file.write_bytes(broken_json(rng, blob.decode()))
    elif file.suffix == ".jsonl":
        rows = [json.loads(line) for line in blob.splitlines()]
        if rng.random() < 0.5:
            file.write_bytes(broken_rows(rng, rows) if rows else odd_bytes(rng, ""))
        else:
            tree = odd_tree(rng, rows, odd_number)
            file.write_text(lines_of(tree if isinstance(tree, list) else [tree]))
    else:
        from fuzz_cases import broken_recipe

        file.write_bytes(broken_recipe(rng, blob.decode()))


def is_broken(file: Path, blob: bytes) -> bool:
    try:
        text = blob.decode()
        lines = text.splitlines() if file.suffix == ".jsonl" else [text] if file.suffix == ".json" else []
        return not all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return file.suffix in (".json", ".jsonl", ".yaml")


# --- outputs and their seals -------------------------------------------------------------------------


def output_case(rng: random.Random, folder: Path) -> str:
    """An output of one process or two, whose rows, seal, process files or ends of blocks are broken."""
    path, repeatable = fresh(folder), rng.random() < 0.5
    out = path / "p.jsonl"
    rows: list[dict[str, Any]] = [
        {"id": f"s{i}", "query": f"query {i}", "responses": ["1 to 2"], "spans": [[1, 2]]} for i in range(4)
    ]
    output = Output(out, PROVENANCE, repeatable=repeatable)
    output.append(rows)
    output.end_block()
    if rng.random() < 0.6:  # a run of two processes was killed
        for rank in (0, 1):
            part = [{**row, "id": f"{row['id']}/{rank}"} for row in rows[:2]]
            append_jsonl(f"{out}.part-{rank}", part)
            (path / f"p.jsonl.window-{rank}").write_text(str(len(lines_of(part[:1]))))
    file = rng.choice(files_below(path))
    if "window" in file.name and rng.random() < 0.8:
        words = ("", "x", "-1", "1e9", "9" * 5000, "10", "0", "nan", "\x00", "٣", " 5 ", "1_0")
        file.write_text(rng.choice(words))
        if rng.random() < 0.2:
            file.rename(
                file.with_name(rng.choice(("p.jsonl.window-x", "p.jsonl.window-", "p.jsonl.window-9")))
            )
    else:
        break_file(rng, file)
    kept = {name: blob for name, blob in contents(path).items() if name == "p.jsonl"}

    def go_on() -> None:
        again = Output(out, PROVENANCE, repeatable=repeatable)
        assert set(again.ids) == {row["id"] for _, row in read_jsonl(out)} if out.exists() else not again.ids
        missing = [row for row in rows if row["id"] not in again.ids]
        again.append(missing)
        again.end_block()
        samples = [Sample(id=row["id"], video=Path("v"), query=row["query"]) for row in rows]
        again.finish(samples)
        assert known_rows(out, PROVENANCE).keys() >= {row["id"] for row in rows}

    what = outcome(go_on)
    if what == "refused" and kept and file.name != "p.jsonl" and "part" not in file.name:
        assert out.read_bytes().startswith(kept["p.jsonl"]), "a refusal changed the rows"
    return what


def score_rows() -> list[dict[str, Any]]:
    return [
        {"id": f"s{i}", "query": f"query {i}", "teacher_iou": 0.9, "student_iou": 0.1 * i, "reverse_kl": 0.5}
        if i < 5
        else {"id": f"s{i}", "for_topk": {"k": 3, "min_teacher_iou": 0.5}, "student_iou": 0.95}
        for i in range(6)
    ]


def scores_case(rng: random.Random, folder: Path) -> str:
    path = fresh(folder)
    data, scores = path / "d.jsonl", path / "s.jsonl"
    data.write_text(lines_of(annotation_rows()))
    scores.write_text(lines_of(score_rows()))
    break_file(rng, rng.choice((data, scores, scores, scores)), pipes=False)  # a user may name one
    out = path / "out.jsonl"
    words: list[Any] = ["select", "--data", data, "--scores", scores, "--out", out]
    words += rng.choice(
        (
            ["--strategy", "topk", "--k", "2"],
            ["--strategy", "bbds", "--k", "3", "--min-teacher-iou", "0.2"],
            ["--strategy", "topk", "--k", "2", "--rank-by", "reverse_kl"],
            ["--strategy", "random", "--k", "2"],
            ["--strategy", "gaussian", "--k", "2"],
        )
    )
    what = run_command(*words)
    if what == "read":
        known = {row["id"] for _, row in read_jsonl(data)}
        assert {row["id"] for _, row in read_jsonl(out)} <= known
    return what


# --- rounds ------------------------------------------------------------------------------------------


def rounds_recipe(path: Path) -> Recipe:
    return recipe_from_dict(
        {
            "model": {"path": "base"},
            "teacher": {"path": "teacher"},
            "data": {"train": str(path.parent / "pool.jsonl"), "workers": 0},
            "run": {"dir": str(path), "trackers": [], "check": False},
            "tvdf": {"strategy": "topk", "k": 2, "min_teacher_iou": 0.1, "rank_by": "reverse_kl"},
            "rounds": {"count": 2},
        }
    )


def pretended_scores(student: Any, teacher: Any, wanted: Any, out: Path, **settings: Any) -> Any:
    """In place of models: the scores are a function of the row."""
    from video_opd.curriculum.scores import ScoreResult, known_teacher_scores

    output = Output(out, {**PROVENANCE, "teacher": "t"}, repeatable=True)
    todo = output.share(wanted)
    known_teacher_scores(settings["teacher_from"], {**PROVENANCE, "teacher": "t"}, todo)
    output.append(
        [
            {
                "id": sample.id,
                "query": sample.query,
                "teacher_iou": 0.9,
                "student_iou": int(sample.id[1:]) / 10,
                "reverse_kl": int(sample.id[1:]) / 7,
            }
            for sample in todo
        ]
    )
    output.end_block()
    output.finish(wanted)
    return ScoreResult(kept=0, scored=len(todo), failed=0, unannotated=0, reused=0)


def pretended_training(recipe: Recipe, build: Any) -> None:
    from video_opd.files import replacing_folder, write_text
    from video_opd.training.checkpoint import DIGESTS
    from video_opd.training.digests import write_list
    from video_opd.training.run_folder import RunFolder

    run = RunFolder(recipe.run.dir)
    run.claim(recipe)
    run.put_damage_aside()
    if not run.finished:
        run.rewind(0, {})
        run.metrics.write_text('{"step": 1, "loss": 0.5}\n')
        with replacing_folder(run.model) as made:
            ids = sorted(row["id"] for _, row in read_jsonl(recipe.data.train))
            (made / "weights").write_text(f"{recipe.model.path.rpartition('/')[2]} {ids}")
            write_list(made, DIGESTS, {})
        write_text(run.done, "{}\n")


def make_rounds(path: Path) -> None:
    from video_opd.training import rounds

    pretended: Any = rounds
    pretended.score_pool, pretended.train = pretended_scores, pretended_training
    rounds.run_rounds(rounds_recipe(path))


@functools.cache
def good_rounds(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """A folder of two finished rounds, moved away, and what its files hold."""
    (folder / "pool.jsonl").write_text(lines_of(annotation_rows()))
    path = fresh(folder)
    make_rounds(path)
    whole = contents(path)
    good = folder / "good-rounds"
    path.rename(good)
    return good, whole


RESULT: tuple[str, ...] = ("rounds.json", "round-2/model/weights")
MADE_AGAIN: tuple[str, ...] = (*RESULT, "round-1/model/weights")
MADE_AGAIN += tuple(
    f"round-{n}/{name}" for n in (1, 2) for name in ("scores.jsonl", "selected.jsonl", "select.json")
)


def same_content(name: str, mine: bytes | None, theirs: bytes) -> bool:
    if mine is None or not name.endswith(".json"):
        return mine == theirs
    found, wanted = json.loads(mine), json.loads(theirs)
    return found == wanted or "digest" not in found  # without it, it is an earlier version's


def rounds_case(rng: random.Random, folder: Path) -> str:
    good, whole = good_rounds(folder)
    path = fresh(folder, good)
    killed = rng.random() < 0.7
    if killed:
        (path / "rounds.json").unlink()
        if rng.random() < 0.7:
            shutil.rmtree(path / "round-2" / "model")
            (path / "round-2" / "done.json").unlink()
    files = [file for file in files_below(path) if file.name != "environment.json"]
    file = rng.choice(files)
    break_file(rng, file)
    what = outcome(lambda: make_rounds(path))
    if what == "read":
        found = contents(path)
        for name in MADE_AGAIN if killed else RESULT:
            if name == "rounds.json" and file.name == "metrics.jsonl":
                continue  # it names the steps
            if path / name == file and file.name == "scores.jsonl":
                continue  # its selection is made
            if not same_content(name, found.get(name), whole[name]):
                return f"wrong: {file.relative_to(path)} was broken, and {name} is another"
    return what


# --- reports -----------------------------------------------------------------------------------------


@functools.cache
def good_run(folder: Path) -> Path:
    path = folder / "good-run"
    (path / "eval").mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump_recipe(rounds_recipe(path)))
    figures = {"n": 12, "mIoU": 40.0, "R@0.5": 50.0, "ci95": {"mIoU": [38, 42]}, "unparsed": 1, "missing": 0}
    controls = {"best_constant": {"mIoU": 21.0}, "query_swap": {"share": 91.0}}
    edges = [-1.0, -0.5, 0.0, 0.5, 1.0]
    counts = {"delta_edges": edges, "delta_before": [1, 2, 3, 4], "delta_after": [0, 0, 0, 4]}
    records: dict[str, Any] = {
        "environment.json": {"python": "3.11", "packages": {"torch": "2"}, "command": ["video-opd", "train"]},
        "select.json": {"strategy": "topk", "rows": 40, "selected": 10, **counts},
        "rounds.json": {"rounds": [{"round": 1, "delta": {"scored": {"mean": 0.1}}}], "base": {"s": figures}},
        "eval/base-short.json": {"model": "base", "testset": "short", **figures, **controls},
        "eval/student-short.json": {
            "model": "student",
            "testset": "short",
            **figures,
            "protocol": {"name": "paper"},
        },
    }
    for name, record in records.items():
        (path / name).write_text(json.dumps(record))
    steps = [
        {"step": i, "reverse_kl/sampled": 1 / i, "reward/mean": None, "time/step_s": 3.0} for i in (1, 2, 3)
    ]
    top = {f"{model}_top": [[["1", -0.5], ["2", -1.0]]] * 3 for model in ("student", "teacher")}
    signal = {"tokens": ["1", " to", "2"], "r": [-3.0, 0.5, None], **top, "student_logprobs": [-0.5] * 3}
    tokens = {**signal, "advantage": [1.0] * 3, "iou": 0.25}
    rollouts = [{"step": i, "id": "a", "query": "the cat", **tokens, "truncated": False} for i in (1, 2, 3)]
    frames = {"frames": ["data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="], "frame_times_s": [1.0]}
    answers = {"truth": [[2, 4]], "answers": {"base": None, "student": [3, 5]}}
    timelines = [{"id": "a", "query": "the cat", "duration": 10.0, **answers, **frames}] * 2
    spans = {"query": "the cat", "video": "a.mp4", "duration": 20.0, "spans": [[0, 10]], "source": "s"}
    files: dict[str, list[dict[str, Any]]] = {
        "metrics": steps,
        "rollouts": rollouts,
        "eval/timelines": timelines,
        "eval/annotations-short": [{"id": i, **spans} for i in "ab"],
        "eval/base-short": [{"id": i, "responses": ["0 to 4"]} for i in "ab"],  # IoU 0.4, as the records say
        "eval/student-short": [{"id": i, "span": [0, 4]} for i in "ab"],
        "eval/failures-short": [{"id": i, **frames, **signal} for i in "ab"],
        "scores": [{"id": i, "teacher_iou": 0.75, "student_iou": 0.5} for i in "abc"],
        "selected": [{"id": "a"}],
    }
    for name, rows in files.items():
        (path / f"{name}.jsonl").write_text(lines_of(rows))
    first = path / "round-1"
    shutil.copytree(path, folder / "first")
    (folder / "first").rename(first)
    return path


def report_case(rng: random.Random, folder: Path) -> str:
    """A page is written whatever is broken. What is read is what a whole run would give, or it is named."""
    path = fresh(folder, good_run(folder))
    for _ in range(rng.choice((1, 1, 3))):
        files = files_below(path)
        break_file(rng, rng.choice(files))
    said = io.StringIO()

    def report() -> None:
        with contextlib.redirect_stderr(said):
            page = write_report([path], folder / "r.html").read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>") and len(page) < 5_000_000

    what = outcome(report)
    return "refused" if what == "read" and "left out" in said.getvalue() else what


# --- checkpoints -------------------------------------------------------------------------------------


def net() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def adamw(of: torch.nn.Module) -> torch.optim.Optimizer:
    from video_opd.config import OptimConfig
    from video_opd.training.optimizers import make_optimizer

    return make_optimizer(list(of.parameters()), OptimConfig())


def make_step(of: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    of(torch.ones(3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def good_checkpoints(folder: Path) -> Path:
    from model_cases import model, processor

    from video_opd.seals import Sealer
    from video_opd.training.checkpoint import random_state, save_checkpoint
    from video_opd.training.run_folder import RunFolder
    from video_opd.training.sharding import optimizer_state

    path = folder / "good-checkpoints"
    path.mkdir()
    run, trained = RunFolder(path), net()
    recipe = rounds_recipe(path)
    optimizer = adamw(trained)
    for step in (1, 2, 3, 4):
        make_step(trained, optimizer)
        append_jsonl(run.rollouts, [{"step": step, "tokens": ["a"]}])
        append_jsonl(run.metrics, [{"step": step, "loss": 0.5}])
        if step % 2 == 0:
            save_checkpoint(
                run.checkpoints,
                step,
                model=model(),
                processor=processor(),
                training={"optimizer": optimizer_state(trained, optimizer), "random": [random_state()]},
                recipe=recipe,
                rows={file.name: Sealer(file).seal() for file in run.rows},
            )
    return path


def broken_training_state(rng: random.Random, file: Path) -> None:
    """Another value somewhere, in a file that torch reads."""
    state = torch.load(file, weights_only=True)

    def wrong(rng: random.Random) -> Any:
        return rng.choice(
            (
                lambda: odd_number(rng),
                lambda: torch.zeros(rng.choice(((), (0,), (3,), (4, 3), (2, 2, 2)))),
                lambda: torch.full((4, 3), float("nan")),
                lambda: torch.zeros(4, 3, dtype=rng.choice((torch.int64, torch.bool, torch.complex64))),
                lambda: torch.zeros(5000, dtype=torch.uint8),
            )
        )()

    torch.save(odd_tree(rng, state, wrong), file)


def resume_from(path: Path) -> str | None:
    """Goes back to a checkpoint, and makes a step from its training state. Returns its name."""
    from video_opd.training import loop
    from video_opd.training.run_folder import RunFolder

    run = RunFolder(path)
    run.claim(rounds_recipe(path.parent / "good-checkpoints"))
    found = loop._checkpoint_to_continue(run)
    run.rewind(found.step if found else 0, found.rows if found else {})
    if found is None:
        return None
    trained = net()
    accelerator: Any = SimpleNamespace(process_index=0)
    components: Any = SimpleNamespace(model=trained, optimizer=adamw(trained), masters=None)
    loop._resume(found, components, accelerator)
    make_step(trained, components.optimizer)
    assert all(bool(torch.isfinite(weight).all()) for weight in trained.parameters())
    return found.path.name


def checkpoint_case(rng: random.Random, folder: Path) -> str:
    """Damage to a checkpoint, or wrong values with a right list: somebody else wrote it."""
    from video_opd.training.checkpoint import STATE
    from video_opd.training.digests import read_list, write_list

    good = good_checkpoints(folder)
    path = fresh(folder, good)
    saved, forged = path / "checkpoints" / "step-4", rng.random() < 0.6
    facts = read_list(saved, STATE)
    facts = {key: facts[key] for key in ("step", "recipe", "rows")}
    if not forged:
        break_file(rng, rng.choice(files_below(path)))
    elif rng.random() < 0.5:
        broken_training_state(rng, saved / "training.pt")
        write_list(saved, STATE, facts)
    elif rng.random() < 0.5:
        tree = odd_tree(rng, facts)
        write_list(saved, STATE, tree if isinstance(tree, dict) else {"x": tree})
    else:  # a list of an earlier version has no digest
        files = read_list(saved, STATE)["files"]
        old = {"step": 4, "files": {name: size for name, (size, _) in files.items()}}
        (saved / STATE).write_text(json.dumps(odd_tree(rng, old)))
    chosen: list[str | None] = []
    state = torch.get_rng_state()
    what = outcome(lambda: chosen.append(resume_from(path)))
    torch.set_rng_state(state)
    if what == "read" and not forged and chosen[0] is not None:
        left, right = contents(path / "checkpoints" / chosen[0]), contents(good / "checkpoints" / chosen[0])
        if {name: left.get(name) for name in right} != right:
            return f"wrong: it goes on from {chosen[0]}, which is another"
    return "refused" if what == "read" and chosen != ["step-4"] else what


# --- whole runs that are repeated --------------------------------------------------------------------


@functools.cache
def undisturbed(folder: Path, adapted: bool) -> Path:
    """Two steps, each with a checkpoint."""
    from training_cases import Build

    from video_opd.training.loop import train

    path = folder / ("adapted" if adapted else "whole") / "run"
    train(resumed_recipe(path, adapted), Build(rows=4))
    return path


def resumed_recipe(path: Path, adapted: bool) -> Recipe:
    from training_cases import make_recipe

    lora: dict[str, Any] = {"lora": {"parts": ["language"], "rank": 2}} if adapted else {}
    return make_recipe(path, optim={"epochs": 2}, run={"dir": str(path), "save_every": 1}, **lora)


def resume_case(rng: random.Random, folder: Path) -> str:
    """The repeated run ends with the weights of the undisturbed one, or it is refused."""
    from training_cases import Build, weights_of

    from video_opd.training.loop import train

    adapted = WHOLE and rng.random() < 0.5
    good = undisturbed(folder, adapted)
    path = fresh(folder, good)
    if rng.random() < 0.7:
        shutil.rmtree(path / "model")
        (path / "done.json").unlink()
    files = [file for file in files_below(path) if "tensorboard" not in file.parts]
    for _ in range(rng.choice((1, 1, 2))):
        break_file(rng, rng.choice([file for file in files if file.is_file()]))
    what = outcome(lambda: train(resumed_recipe(path, adapted), Build(rows=4)))
    if what == "read":
        mine, theirs = weights_of(path), weights_of(good)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine | theirs), "other weights"
    return what


CASES: dict[str, Callable[[random.Random, Path], str]] = {
    "output": output_case,
    "scores": scores_case,
    "rounds": rounds_case,
    "report": report_case,
    "checkpoint": checkpoint_case,
    "resume": resume_case,
}
