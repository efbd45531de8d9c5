"""A whole run: the same weights for any split, a lower KL, and kills that leave no trace."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from model_cases import model, processor
from places import ROOT
from training_cases import (
    Build,
    Watched,
    assert_equal_to_rounding,
    assert_same_run,
    free_port,
    kill_later,
    make_recipe,
    rows_of,
    said_by_two,
    sample,
    start,
    train_on_two,
)

from video_opd.cli import main
from video_opd.config import OptimConfig, dump_recipe
from video_opd.data.annotations import write_rows
from video_opd.data.loader import PromptLoader
from video_opd.errors import UserError
from video_opd.locks import locked_folder
from video_opd.models.loading import load_model
from video_opd.training import loop
from video_opd.training.batches import BatchPlan
from video_opd.training.checkpoint import find_checkpoints
from video_opd.training.components import prompt_loader
from video_opd.training.loop import RunResult, learning_rate, train
from video_opd.training.loss_batch import RatioError
from video_opd.training.run_folder import RunFolder
from video_opd.training.self_check import CheckError
from video_opd.types import Rollout
from video_opd.world.shipped import shipped

KILLS = int(os.environ.get("VIDEO_OPD_KILLS", "3"))


def run(path: Path, build: Build | None = None, **sections: Any) -> RunResult:
    return train(make_recipe(path, **sections), build or Build())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Four steps: eight rows, four a step, two epochs. Other runs are compared with this one."""
    return run(tmp_path_factory.mktemp("undisturbed") / "run", optim={"epochs": 2})


def test_a_run_leaves_its_folder(undisturbed: RunResult):
    folder = undisturbed.path
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "rollouts.jsonl", "checkpoints"} <= names
    metrics = rows_of(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-2", "step-4"}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["seed"] == 0 and "torch" in environment["packages"]
    facts = json.loads((folder / "model" / "video_opd.json").read_text())
    assert facts["video"]["max_video_tokens"] == 8192 and facts["prompt"]["style"] == "paper"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert facts["prompt"]["video_form"] == recipe["prompt"]["video_form"] == "release"


def test_every_metric_is_defined_in_the_docs(undisturbed: RunResult):
    text = (ROOT / "docs" / "metrics.md").read_text()
    missing = [key for key in undisturbed.metrics if f"`{key}`" not in text]
    assert not missing


def test_the_metrics_say_what_the_rollouts_say(undisturbed: RunResult):
    """Row by row from the logged tokens (all four of a step are logged), not from the code's sums."""
    rollouts = rows_of(undisturbed.path / "rollouts.jsonl")
    for rollout in rollouts:
        for name in ("student", "teacher"):
            written = zip(rollout["tokens"], rollout[f"{name}_logprobs"], rollout[f"{name}_top"], strict=True)
            for token, own, top in written:
                values = [value for _, value in top]
                assert len(top) == 3 and values == sorted(values, reverse=True)
                # Either the token is among them, with its own log-prob, or it is less likely than all. (Parts
                # of characters have one text.)
                found = [value for text, value in top if text == token]
                assert own <= values[-1] or any(math.isclose(own, v, abs_tol=1e-5) for v in found)
    for row in rows_of(undisturbed.path / "metrics.jsonl"):
        mine = [rollout for rollout in rollouts if rollout["step"] == row["step"]]
        r = [
            teacher - student
            for rollout in mine
            for teacher, student in zip(rollout["teacher_logprobs"], rollout["student_logprobs"], strict=True)
        ]
        assert len(mine) == row["rollouts"] == 4 and len(r) == row["tokens/response"]
        assert math.isclose(row["reverse_kl/sampled"], -sum(r) / len(r), rel_tol=1e-5)
        assert math.isclose(row["reward/min"], min(r), rel_tol=1e-5)
        # eq 6 with ratio 1: minus the sum over tokens, the mean over trajectories
        assert math.isclose(row["loss"], -sum(r) / 4, rel_tol=1e-4)
        assert row["response/length_max"] == max(len(rollout["tokens"]) for rollout in mine)
        assert row["policy/ratio_off_max"] < 1e-4
        assert row["reverse_kl/analytic"] > 0
        assert 0 < row["weights/changed_bf16"] <= row["weights/changed"] <= 1


def test_a_finished_run_returns_at_once(undisturbed: RunResult):
    def build(*given: Any) -> Any:
        raise AssertionError("a finished run loads nothing")

    recipe = make_recipe(undisturbed.path, optim={"epochs": 2})
    assert train(recipe, build) == undisturbed


def test_another_recipe_in_the_same_folder_is_refused(undisturbed: RunResult):
    with pytest.raises(UserError, match=r"optim\.lr = 0\.001, now it is 0\.002"):
        run(undisturbed.path, optim={"epochs": 2, "lr": 2e-3})


@pytest.mark.parametrize("fault", ["another recipe", "in use", "no evaluation data", "full disk"])
def test_an_error_of_the_first_process_ends_all_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The other processes neither wait for the first, nor tell of an error of their own."""
    folder, changes, named = tmp_path / "run", [], fault
    if fault == "another recipe":
        train(make_recipe(folder, optim={"max_steps": 1}), Build())
        changes, named = ["--optim.lr", "0.5"], "optim.lr = 0.001, now it is 0.5"
    elif fault == "no evaluation data":
        changes, named = ["--evaluate.data", "[nowhere.jsonl]"], "nowhere.jsonl"
    elif fault == "full disk":

        def full(path: Path, rows: Any) -> None:
            raise UserError(f"{path}: full disk")

        monkeypatch.setattr(loop, "append_jsonl", full)
    monkeypatch.setattr(loop, "train", partial(train, build=Build()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(folder, optim={"max_steps": 1})))
    with locked_folder(folder) if fault == "in use" else nullcontext():
        if fault == "in use":
            named = f"process {os.getpid()} on host"
        codes, said = said_by_two(["train", str(recipe), *changes], tmp_path)
    errors = [line for line in said if line.startswith("video-opd: ")]
    assert codes == [2, 2] and len(errors) == 1 and named in errors[0], (codes, said)
    assert not any("Traceback" in line or "another process stopped" in line for line in said)


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_nothing(undisturbed: RunResult, tmp_path: Path, micro: int):
    other = run(tmp_path / "run", optim={"epochs": 2, "micro_batch_size": micro})
    assert_equal_to_rounding(undisturbed.path, other.path)


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_one_prefill_for_sampling_and_update_changes_nothing(tmp_path: Path, reduction: str):
    """``sampling.micro_batch_size`` samples the batch before the update, which runs the prompts again."""
    sections: dict[str, Any] = {"optim": {"epochs": 2}, "loss": {"reduction": reduction}}
    broken = ("s3",)  # a batch that is smaller than planned
    once = run(tmp_path / "once", Build(broken=broken), **sections)
    sampling = {"max_new_tokens": 4, "micro_batch_size": 4}
    again = run(tmp_path / "again", Build(broken=broken), sampling=sampling, **sections)
    assert_equal_to_rounding(once.path, again.path)
    rows = [rows_of(r.path / "metrics.jsonl") for r in (once, again)]
    read = [[row["tokens/update"] - row["tokens/response"] for row in each] for each in rows]
    assert not any(read[0]) and all(read[1])


# ------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("recompute", [False, True])
def test_two_processes_equal_one(tmp_path: Path, recompute: bool):
    """Seven rows in batches of four: of the last batch, one process gets two rows and the other gets one."""
    sections: dict[str, Any] = {"optim": {"epochs": 1, "micro_batch_size": 1}}
    alone = run(tmp_path / "one", Build(rows=7, broken=("s3",)), **sections)
    sections["model"] = {"gradient_checkpointing": recompute}
    recipe = make_recipe(tmp_path / "two", **sections)
    train_on_two(Build(rows=7, broken=("s3",)), recipe)
    assert_equal_to_rounding(alone.path, tmp_path / "two")


# ------------------------------------------------------------------------------------------------- kills


def test_kills_at_random_moments_leave_no_trace(undisturbed: RunResult, tmp_path: Path):
    """Each start is killed within about two steps, so that most of them do not reach a checkpoint."""
    recipe = make_recipe(tmp_path / "run", optim={"epochs": 2})
    folder = RunFolder(tmp_path / "run")
    run_s = sum(row["time/step_s"] for row in rows_of(undisturbed.path / "metrics.jsonl"))
    draws = random.Random(0)
    struck = 0
    while struck < KILLS:
        process = start(0, 1, free_port(), recipe, Build())
        kill_later(process, folder, draws.uniform(0.0, 0.5 * run_s))
        if process.exitcode != -signal.SIGKILL:  # the machine is faster now: the run ended before
            run_s /= 2
            shutil.rmtree(folder.path)
            continue
        struck += 1
        steps = [int(path.name.split("-")[1]) for path in folder.checkpoints.glob("step-*")]
        if steps:  # what a checkpoint stands on was reported, whole
            assert len(folder.metrics.read_bytes().splitlines()) >= max(steps)
    process = start(0, 1, free_port(), recipe, Build())
    process.join()
    assert process.exitcode == 0
    assert_same_run(undisturbed.path, tmp_path / "run")


@pytest.mark.parametrize("damage", ["late rows", "half a row", "half a checkpoint", "no model"])
def test_a_run_cut_off_at_the_worst_places_continues(undisturbed: RunResult, tmp_path: Path, damage: str):
    path = tmp_path / "run"
    shutil.copytree(undisturbed.path, path)
    (path / "done.json").unlink()
    shutil.rmtree(path / "model")
    if damage != "no model":
        shutil.rmtree(path / "checkpoints" / "step-4")
    if damage == "half a row":
        text = (path / "metrics.jsonl").read_bytes()
        (path / "metrics.jsonl").write_bytes(text[:-200])
    if damage == "half a checkpoint":
        shutil.copytree(path / "checkpoints" / "step-2", path / "checkpoints" / "step-4")
        weights = path / "checkpoints" / "step-4" / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        (path / "checkpoints" / ".part-step-4").mkdir()
    run(path, optim={"epochs": 2})
    assert_same_run(undisturbed.path, path)
    assert not list((path / "checkpoints").glob(".part*"))


def test_a_checkpoint_of_an_earlier_version_is_continued(undisturbed: RunResult, tmp_path: Path):
    """It numbers the weights in the optimiser's state, where ours names them, keeps numpy's random state as
    an array, and states sizes in place of digests."""
    path = tmp_path / "run"
    shutil.copytree(undisturbed.path, path)
    (path / "done.json").unlink()
    shutil.rmtree(path / "model")
    shutil.rmtree(path / "checkpoints" / "step-4")
    saved = path / "checkpoints" / "step-2"
    training = torch.load(saved / "training.pt", weights_only=True)
    state = training["optimizer"]
    names = [name for group in state["param_groups"] for name in group["params"]]
    assert set(state["state"]) == set(names) and all(isinstance(name, str) for name in names)
    training["optimizer"] = {
        "state": {names.index(name): moments for name, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [names.index(name) for name in group["params"]]}
            for group in state["param_groups"]
        ],
    }
    for generators in training["random"]:
        name, key, *rest = generators["numpy"]
        generators["numpy"] = (name, np.array(key, dtype=np.uint32), *rest)
    torch.save(training, saved / "training.pt")
    (saved / "state.json").unlink()
    names = [file for file in saved.rglob("*") if file.is_file()]
    sizes = {file.relative_to(saved).as_posix(): file.stat().st_size for file in names}
    (saved / "state.json").write_text(json.dumps({"step": 2, "files": sizes}))
    run(path, optim={"epochs": 2})
    assert_same_run(undisturbed.path, path)


# ----------------------------------------------------------------------------------------- what it learns


def test_a_step_lowers_the_reverse_kl_on_its_own_batch(tmp_path: Path):
    """The KL is over the whole vocabulary, at the states that the step's rollouts visited."""
    build = Watched(rows=4)
    result = run(
        tmp_path / "run",
        build,
        optim={"max_steps": 1, "lr": 1e-3, "micro_batch_size": 4},
        sampling={"rollouts": 128, "max_new_tokens": 3},  # enough for the sample's noise to be small
    )
    ((prompts, responses),) = build.sampled
    student = build.components.policy.logprobs(prompts, responses, full=True)
    assert build.components.teacher is not None
    teacher = build.components.teacher.logprobs(prompts, responses, full=True)
    assert student.full_BTV is not None and teacher.full_BTV is not None
    p, q = (full[student.mask_BT].double() for full in (student.full_BTV, teacher.full_BTV))
    after = (p.exp() * (p - q)).sum(-1).mean().item()
    before = result.metrics["reverse_kl/analytic"]
    assert after < before - 3e-3  # of 0.80 nats: one step, by 0.019


def test_a_student_that_is_its_own_teacher_stays_where_it_is(tmp_path: Path):
    result = run(tmp_path / "run", Build(rows=4, teacher_seed=0), optim={"max_steps": 1})
    row = result.metrics
    assert abs(row["reward/min"]) < 1e-4 and abs(row["reward/max"]) < 1e-4
    assert row["update/grad_norm"] < 1e-3
    assert abs(row["reverse_kl/analytic"]) < 1e-5


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_the_checks_pass_and_the_reduction_scales_the_loss(tmp_path: Path, reduction: str):
    result = run(
        tmp_path / "run",
        optim={"max_steps": 1},
        loss={"reduction": reduction},
        run={"dir": str(tmp_path / "run"), "check": True},
    )
    row = result.metrics
    total = row["reverse_kl/sampled"] * row["tokens/response"]
    count = row["rollouts"] if reduction == "sum" else row["tokens/response"]
    assert math.isclose(row["loss"], total / count, rel_tol=1e-4)


@pytest.mark.parametrize("broken", [(), ("s3",)])
def test_the_gradient_is_that_of_the_loss_over_the_real_count(tmp_path: Path, broken: tuple[str, ...]):
    """Neither the number of tokens nor that of the rollouts of a broken batch is known beforehand."""
    norms = {}
    for reduction in ("sum", "token_mean"):
        row = run(
            tmp_path / reduction,
            Build(rows=4, broken=broken),
            optim={"max_steps": 1, "max_grad_norm": 1e9},
            loss={"reduction": reduction},
        ).metrics
        norms[reduction] = row["update/grad_norm"]
        assert row["rollouts"] == 4 - len(broken) and row["tokens/response"] > 4
    total = norms["sum"] * row["rollouts"]
    assert math.isclose(total, norms["token_mean"] * row["tokens/response"], rel_tol=1e-5)


@pytest.mark.parametrize(("method", "rollouts"), [("video-opd", 1), ("grpo", 3)])
def test_the_first_rollouts_of_the_batch_are_logged(tmp_path: Path, method: str, rollouts: int):
    """Micro-batches are cut by length, and a broken video leaves its place empty."""
    recipe = make_recipe(
        tmp_path / "run",
        method,
        optim={"max_steps": 1, "batch_size": 8},
        sampling={"rollouts": rollouts},
        run={"log_rollouts": 4},
        **({"reward": {"function": "training_cases:a_reward"}} if method == "grpo" else {}),
    )
    (batch,) = BatchPlan.of(recipe, [sample(i) for i in range(8)]).batches()
    broken = batch[1].id
    there = [row.id for row in batch if row.id != broken]
    path = train(recipe, Build(rows=8, broken=(broken,))).path
    logged = [(row["id"], row["rollout"]) for row in rows_of(path / "rollouts.jsonl")]
    assert logged == [(name, index) for name in there for index in range(rollouts)][:4]


def test_what_is_evaluated_is_what_was_saved(tmp_path: Path):
    """bfloat16 rounds the weights, but not the rotary frequencies, which nobody saves or loads."""
    build = Watched(rows=4)
    run(tmp_path / "run", build, optim={"max_steps": 1}, run={"save_dtype": "bfloat16"})
    held = build.components.model
    loaded, _ = load_model(tmp_path / "run" / "model", dtype="bfloat16")
    assert all(torch.equal(weight, held.get_parameter(name)) for name, weight in loaded.named_parameters())
    assert all(torch.equal(buffer, held.get_buffer(name)) for name, buffer in loaded.named_buffers())
    assert {weight.dtype for weight in held.parameters()} == {torch.bfloat16}


# -------------------------------------------------------------------------------------------- what goes wrong


def test_a_video_that_cannot_be_read_leaves_its_place_empty(tmp_path: Path):
    whole = run(tmp_path / "whole", optim={"max_steps": 2})
    less = run(tmp_path / "less", Build(broken=("s3", "s5")), optim={"max_steps": 2})
    seen = [{row["id"] for row in rows_of(r.path / "rollouts.jsonl")} for r in (whole, less)]
    assert seen[0] - seen[1] == {"s3", "s5"}
    counts = [row["rollouts"] for row in rows_of(less.path / "metrics.jsonl")]
    assert sum(counts) == 6


def test_a_batch_without_a_single_video_is_left_out(tmp_path: Path):
    result = run(tmp_path / "run", Build(rows=2, broken=("s0", "s1")), optim={"max_steps": 1})
    assert result.metrics["rollouts"] == 0 and result.metrics["update/done"] == 0
    assert result.metrics["weights/changed"] == 0.0
    assert result.metrics["reverse_kl/sampled"] is None  # not 0: nothing was measured


class Spoilt(Build):
    """A run whose update uses other weights than its sampling, or whose scores are not finite."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __call__(self, *arguments: Any) -> Any:
        components = super().__call__(*arguments)
        sample, logprobs = components.policy.sample, components.policy.logprobs

        def moving(*args: Any, **kwargs: Any) -> Any:
            rollouts = sample(*args, **kwargs)
            with torch.no_grad():
                components.model.get_parameter("lm_head.weight").mul_(1.05)
            return rollouts

        def nan(*args: Any, **kwargs: Any) -> Any:
            scores = logprobs(*args, **kwargs)
            with torch.no_grad():
                scores.logprobs_BT[0, 1] = math.nan
            return scores

        if self.what == "moves":
            components.policy.sample = moving  # type: ignore[method-assign]
        else:
            components.policy.logprobs = nan  # type: ignore[method-assign]
        return components


def test_the_command_writes_a_report_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loop, "train", partial(train, build=Build()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(tmp_path / "run", optim={"max_steps": 1})))
    report = tmp_path / "run" / "report.html"
    assert main(["train", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(report)
    written = report.read_text()
    assert "<html" in written and "step" in written
    report.unlink()
    assert main(["train", str(recipe)]) == 0  # finished, but the report was lost
    assert f"report: {report}" in capsys.readouterr().out and report.exists()


@pytest.mark.parametrize("changed", ["data.train", "model.path", "teacher.path"])
def test_a_run_is_not_continued_with_what_it_was_not_begun_with(tmp_path: Path, changed: str):
    """Something else may stand behind a path by the time a killed run is repeated."""
    places = {key: str(tmp_path / key) for key in ("data.train", "model.path", "teacher.path")}
    for key in ("model.path", "teacher.path"):
        model().save_pretrained(tmp_path / key)
        processor().save_pretrained(tmp_path / key)
    rows = tmp_path / "data.train"
    rows.write_text("one row\n")
    recipe = make_recipe(tmp_path / "run", optim={"max_steps": 4}).changed(**places)
    folder = train(recipe, Build()).path
    shutil.rmtree(folder / "model")
    (folder / "done.json").unlink()
    found = find_checkpoints(folder / "checkpoints")
    assert [checkpoint.step for checkpoint in found] == [4, 2]
    assert {name.split()[0] for name in found[0].inputs} == set(places)
    shutil.rmtree(found[0].path)
    file = rows if changed == "data.train" else tmp_path / changed / "config.json"
    before = file.read_bytes()
    file.write_bytes(before + b" ")
    with pytest.raises(UserError, match=rf"{changed} .* has changed since .*run was begun: put back"):
        train(recipe, Build())
    file.write_bytes(before)
    assert train(recipe, Build()).steps == 4


class OneTokenOff(Build):
    """What was recorded of the first token of each prompt is ``nats`` too much."""

    def __init__(self, nats: float) -> None:
        super().__init__()
        self.nats = nats

    def __call__(self, *arguments: Any) -> Any:
        components = super().__call__(*arguments)
        sample = components.policy.sample

        def off(*args: Any, **kwargs: Any) -> Any:
            groups = sample(*args, **kwargs)
            return [
                [replace(first, logprobs=(first.recorded[0] + self.nats, *first.recorded[1:])), *others]
                for first, *others in groups
            ]

        components.policy.sample = off  # type: ignore[method-assign]
        return components


def test_a_single_token_may_be_further_off_in_bfloat16_than_in_float32(tmp_path: Path):
    """Rounding does that, but not by nats."""
    with pytest.raises(RatioError, match=r"0\.3 nats at response token 0"):
        run(tmp_path / "float32", OneTokenOff(0.3))
    low: dict[str, Any] = {"model": {"dtype": "bfloat16"}}
    run(tmp_path / "bfloat16", OneTokenOff(0.3), **low)
    with pytest.raises(RatioError, match=r"2\.\d+ nats at response token 0, .* on the average"):
        run(tmp_path / "nats", OneTokenOff(2.4), **low)


def test_a_ratio_that_is_not_one_stops_the_run(tmp_path: Path):
    with pytest.raises(RatioError, match="right after sampling"):
        run(tmp_path / "run", Spoilt("moves"))
    with pytest.raises(CheckError, match="check before the first step"):
        run(tmp_path / "checked", Spoilt("moves"), run={"dir": str(tmp_path / "checked"), "check": True})


class OtherSampler:
    """Stands in for vLLM. Its log-probs are ``shift`` nats from the student's."""

    tolerance = 1e-3

    def __init__(self, student: Any, shift: float) -> None:
        self.student, self.shift, self.changed, self.closed = student, shift, 0, False

    def sample(self, prompts: Any, **settings: Any) -> Any:
        groups = self.student.sample(prompts, **settings)
        return [[self.shifted(rollout) for rollout in group] for group in groups]

    def shifted(self, rollout: Rollout) -> Rollout:
        return replace(rollout, logprobs=tuple(x + self.shift for x in rollout.recorded))

    def weights_changed(self) -> None:
        self.changed += 1

    def close(self) -> None:
        self.closed = True


class WithSampler(Build):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def __call__(self, *arguments: Any) -> Any:
        components = super().__call__(*arguments)
        self.sampler = OtherSampler(components.policy, self.shift)
        return replace(components, sampler=cast(Any, self.sampler))


@pytest.mark.parametrize("shift", [0.0, 5e-4, 0.01])
def test_a_sampler_with_other_weights_stops_the_run(tmp_path: Path, shift: float):
    """Its importance weights would hide it: they are near 1 whatever the sampler's weights are."""
    build, loss = WithSampler(shift), {"max_importance_weight": 2.0}
    if shift < OtherSampler.tolerance:
        result = run(tmp_path / "run", build, loss=loss)
        assert build.sampler.changed == result.steps > 1
    else:
        with pytest.raises(RatioError, match=r"the sampler's log-probs are off by 0\.01 nats a token"):
            run(tmp_path / "run", build, loss=loss)
    assert build.sampler.closed


def test_a_log_prob_that_is_not_finite_names_its_sample_or_is_masked(tmp_path: Path):
    with pytest.raises(UserError, match=r"sample 's\d': the student's log-prob of response token 1 is nan"):
        run(tmp_path / "raise", Spoilt("nan"), optim={"max_steps": 1})
    result = run(tmp_path / "mask", Spoilt("nan"), optim={"max_steps": 1}, loss={"nonfinite": "mask"})
    assert result.metrics["loss/masked_tokens"] == 2  # one in each of two micro-batches
    assert math.isfinite(result.metrics["loss"]) and result.metrics["update/done"] == 1


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="wandb"):
        run(tmp_path / "run", run={"dir": str(tmp_path / "run"), "trackers": ["wandb"]})


def test_the_learning_rate_is_a_function_of_the_step():
    warm = OptimConfig(lr=1.0, warmup_steps=3, schedule="constant")
    assert [learning_rate(step, 8, warm) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = OptimConfig(lr=1.0, schedule="linear")
    assert [learning_rate(step, 4, linear) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = OptimConfig(lr=2.0, schedule="cosine")
    assert learning_rate(0, 10, cosine) == 2.0 and math.isclose(learning_rate(5, 10, cosine), 1.0)
    assert learning_rate(9, 10, cosine) > 0


def test_a_whole_batch_is_decoded_ahead(tmp_path: Path):
    """If fewer videos are decoded ahead than a step needs, the model waits for the others."""
    for prefetch, ahead in ((None, 24), (3, 3)):
        recipe = make_recipe(tmp_path, optim={"batch_size": 24}, data={"prefetch": prefetch})
        load = prompt_loader(recipe, processor(), skipped_path=None, max_failed_share=1.0)
        loader = load([])
        assert isinstance(loader, PromptLoader) and loader.prefetch == ahead


def test_a_teacher_that_is_not_there_is_found_before_the_student_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": "a", "video": "a.mp4", "query": "the red circle", "spans": [[1, 3]]}]
    data = tmp_path / "data.jsonl"
    write_rows(data, rows)
    recipe = make_recipe(
        tmp_path / "run",
        data={"train": str(data)},
        model={"path": str(shipped("tiny-base"))},
        teacher={"path": str(tmp_path / "teacher")},
    )
    monkeypatch.setattr("video_opd.training.components.load_model", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(UserError, match="teacher: no such model folder"):
        train(recipe)


def test_one_process_says_that_it_shards_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_recipe(tmp_path / "run", optim={"max_steps": 1}, model={"sharding": "fsdp2"}), Build())
    assert "there is one process: nothing is sharded" in capsys.readouterr().err
