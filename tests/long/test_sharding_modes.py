"""Everything in shards, on two and on four processes, ends as one process with nothing in shards; also if
its processes are killed and it is continued by another number of them, which hold the weights otherwise."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from process_cases import needs_proc, wait_until
from training_cases import Build, finish, free_port, make_recipe, rows_of, start, started_ns, weights_of

from video_opd.config import Recipe
from video_opd.training.loop import train
from video_opd.training.run_folder import RunFolder

pytestmark = [pytest.mark.slow]

KILLS = 10
METHODS: dict[str, dict[str, Any]] = {
    "video-opd": {},
    "video-opd full": {"loss": {"estimator": "full"}},
    "grpo": {
        "sampling": {"rollouts": 3},
        "reward": {"function": "training_cases:a_reward"},
        "loss": {"kl_beta": 0.1},
    },
    "op-fkd": {},
}
WHOLE: dict[str, dict[str, Any]] = {"model": {}, "teacher": {}, "optim": {}}
IN_SHARDS: dict[str, dict[str, Any]] = {
    "model": {"sharding": "fsdp2", "reduce": "micro_batch"},
    "teacher": {"placement": "sharded"},
    "optim": {"offload": True},
}


def recipe_of(name: str, path: Path, holding: dict[str, dict[str, Any]], **run: Any) -> Recipe:
    """Batches of five and of one prompt, of which one to all are missing."""
    optim = {"lr": 1e-3, "eps": 1e-5, "max_grad_norm": 1.0, "batch_size": 5, "micro_batch_size": 1}
    sections = {**METHODS[name], "model": {}, "teacher": {}, "run": run}
    sections["optim"] = {**optim, "updates_per_batch": 2, "max_steps": 12, **holding["optim"]}
    for key in ("model", "teacher"):
        sections[key] = {**sections[key], **holding[key]}
    return make_recipe(path, name.split()[0], **sections)


def build() -> Build:
    return Build(rows=11, broken=("s2", "s3", "s9"))


def train_on(count: int, recipe: Recipe) -> None:
    port = free_port()
    assert finish([start(rank, count, port, recipe, build()) for rank in range(count)]) == [0] * count


def assert_equal(one: Path, several: Path) -> None:
    """Every number that both runs wrote, and the weights, to 1e-5."""
    worst: dict[str, float] = {}
    for x, y in zip(rows_of(one / "metrics.jsonl"), rows_of(several / "metrics.jsonl"), strict=True):
        assert x.keys() == y.keys()
        for key in x:
            if key.startswith(("time/", "weights/", "policy/ratio_off")):  # the last is rounding itself
                continue
            assert (x[key] is None) == (y[key] is None), key
            if x[key] is not None:
                off = abs(x[key] - y[key]) / max(abs(x[key]), abs(y[key]), 0.1)
                worst[key] = max(worst.get(key, 0.0), off)
    for x, y in zip(rows_of(one / "rollouts.jsonl"), rows_of(several / "rollouts.jsonl"), strict=True):
        assert (x["step"], x["id"], x["token_ids"]) == (y["step"], y["id"], y["token_ids"])
        for key in ("student_logprobs", "teacher_logprobs", "r", "reverse_kl"):
            for a, b in zip(x.get(key) or (), y.get(key) or (), strict=True):
                assert (a is None) == (b is None), key  # without a teacher there is none
                off = 0.0 if a is None else abs(a - b) / max(abs(a), abs(b), 1.0)
                worst[key] = max(worst.get(key, 0.0), off)
    mine, theirs = weights_of(one), weights_of(several)
    assert mine.keys() == theirs.keys()
    worst["weights"] = max(
        ((mine[key] - theirs[key]).norm() / mine[key].norm().clamp(min=1e-30)).item() for key in mine
    )
    print(json.dumps(dict(sorted(worst.items(), key=lambda item: -item[1])[:6])))
    assert max(worst.values()) < 1e-5


class RunsOfOne(dict[str, Path]):
    """The run of each method in one process that holds everything whole; made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = train(recipe_of(name, self.folder / name, WHOLE), build()).path
        return self[name]


@pytest.fixture(scope="module")
def runs_of_one(tmp_path_factory: pytest.TempPathFactory) -> RunsOfOne:
    return RunsOfOne(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_in_shards_as_whole(name: str, count: int, runs_of_one: RunsOfOne, tmp_path: Path) -> None:
    train_on(count, recipe_of(name, tmp_path / "run", IN_SHARDS))
    steps = rows_of(runs_of_one[name] / "metrics.jsonl")
    assert any(row["update/grad_norm"] for row in steps) and len(steps) == 12
    assert_equal(runs_of_one[name], tmp_path / "run")


def test_the_optimiser_of_one_process_on_the_cpu(runs_of_one: RunsOfOne, tmp_path: Path) -> None:
    """It and a teacher that visits the device, in one process that shards nothing."""
    holding: dict[str, dict[str, Any]] = {
        "model": {},
        "teacher": {"placement": "cpu"},
        "optim": {"offload": True},
    }
    train(recipe_of("video-opd", tmp_path / "run", holding), build())
    assert_equal(runs_of_one["video-opd"], tmp_path / "run")


@needs_proc
@pytest.mark.parametrize("name", ["video-opd full", "grpo"])
def test_killed_and_continued_by_others(name: str, runs_of_one: RunsOfOne, tmp_path: Path) -> None:
    """A start is 1, 2 or 4 processes, and each holds teacher, gradients and optimiser in a way of its own."""
    draws, path, kills, longest_s = random.Random(name), tmp_path / "run", 0, 0.0
    folder = RunFolder(path)
    while kills < KILLS:
        count = draws.choice([1, 2, 4])
        recipe = recipe_of(name, path, drawn(draws, count), save_every=2)
        port, before = free_port(), started_ns(folder)
        processes = [start(rank, count, port, recipe, build()) for rank in range(count)]
        wait_until(lambda b=before: started_ns(folder) != b)  # type: ignore[misc]
        time.sleep(draws.uniform(0.0, 4.0))
        victim = draws.choice(processes)
        if victim.exitcode is not None:
            break  # the machine was faster: the run is finished
        os.kill(victim.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        codes = finish(processes)
        longest_s = max(longest_s, time.monotonic() - killed_s)
        assert None not in codes  # nobody waits for the dead
        kills += 1
        if folder.finished:
            break
    print(f"{kills} kills; all others had ended at most {longest_s:.1f} s later")
    assert longest_s < 60
    count = draws.choice([1, 2, 4])
    train_on(count, recipe_of(name, path, drawn(draws, count), save_every=2))
    assert_equal(runs_of_one[name], path)


def drawn(draws: random.Random, count: int) -> dict[str, dict[str, Any]]:
    """A way to hold the weights that so many processes may choose."""
    sharded = draws.random() < 0.7
    places = ["whole", "cpu", "auto"] + ["sharded"] * 3 * (count > 1)
    return {
        "model": {"sharding": "fsdp2", "reduce": draws.choice(["step", "micro_batch"])} if sharded else {},
        "teacher": {"placement": draws.choice(places)},
        "optim": {"offload": draws.random() < 0.5 and (sharded or count == 1)},
    }


def test_the_tolerance_sees_a_row_that_is_left_out(runs_of_one: RunsOfOne, tmp_path: Path) -> None:
    """Otherwise equality to 1e-5 would say nothing."""
    other = train(recipe_of("op-fkd", tmp_path / "run", WHOLE), Build(rows=11, broken=("s2", "s3", "s8")))
    mine, theirs = weights_of(runs_of_one["op-fkd"]), weights_of(other.path)
    off = torch.cat([(mine[key] - theirs[key]).flatten() for key in mine]).norm()
    assert off > 1e-4 * math.sqrt(sum(weight.square().sum().item() for weight in mine.values()))
