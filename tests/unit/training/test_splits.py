"""Every method gives the same losses and weights however a batch is cut up, and after a resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import model, processor
from training_cases import (
    Build,
    assert_equal_to_rounding,
    assert_same_run,
    finish,
    free_port,
    make_recipe,
    rows_of,
    start,
)

from video_opd.config import LoraConfig, Recipe
from video_opd.models.interfaces import Teacher
from video_opd.models.lora import (
    adapter_weights,
    add_adapters,
    add_frozen_adapter,
    merge_adapters,
    save_adapter,
)
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import AdapterTeacher, LocalTeacher, RoutedTeacher
from video_opd.training.loop import train

ROWS = 10  # of them every fourth without annotation: 7 for the methods that need one
SETTINGS: dict[str, dict[str, Any]] = {
    "video-opd": {},
    "video-opd full": {"loss": {"estimator": "full"}},
    "video-opd baseline": {"loss": {"baseline": "kl", "reduction": "token_mean"}},
    "video-opd beyond": {"teacher": {"reward_scale": 1.25}},
    "grpo": {
        "sampling": {"rollouts": 3},
        "reward": {"function": "training_cases:a_reward"},
        "loss": {"clip_low": 0.2, "kl_beta": 0.1},
    },
    "sft": {"loss": {"reduction": "token_mean"}},
    "op-rkd": {},
    "op-fkd": {},
}


def recipe_of(name: str, path: Path, micro: int, save_every: int = 100, check: bool = False) -> Recipe:
    """Four optimiser steps of 8 prompts, two on each batch."""
    sections = {key: dict(value) for key, value in SETTINGS[name].items()}
    optim = {"batch_size": 8, "micro_batch_size": micro, "updates_per_batch": 2, "max_steps": 4}
    return make_recipe(
        path,
        name.split()[0],
        **{**sections, "optim": {"lr": 1e-3, **optim}, "run": {"save_every": save_every, "check": check}},
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_the_split_does_not_matter(name: str, tmp_path: Path):
    build = Build(rows=ROWS)
    whole = train(recipe_of(name, tmp_path / "1x8", 8, save_every=2), build)
    rows = rows_of(whole.path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["update/done"] == 1 and row["update/grad_norm"] > 0 for row in rows)
    assert rows[0]["policy/ratio_off_max"] < 1e-4 < rows[1]["policy/ratio_off_max"]  # the second update's

    for micro in (4, 2):  # 2×4, 4×2
        assert_equal_to_rounding(whole.path, train(recipe_of(name, tmp_path / f"{micro}", micro), build).path)

    port, two = free_port(), tmp_path / "two"
    recipe = recipe_of(name, two, 2, check=True)  # the check's forward must not disturb DDP
    processes = [start(rank, 2, port, recipe, build) for rank in range(2)]
    assert finish(processes) == [0, 0]
    assert_equal_to_rounding(whole.path, two)

    resumed = tmp_path / "resumed"
    shutil.copytree(whole.path, resumed)
    (resumed / "done.json").unlink()
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints" / "step-4")
    train(recipe_of(name, resumed, 8, save_every=2), build)
    assert_same_run(whole.path, resumed)


def test_rows_without_annotation_are_left_out_of_supervised_methods(tmp_path: Path):
    result = train(recipe_of("sft", tmp_path / "run", 8), Build(rows=ROWS))
    logged = {row["id"] for row in rows_of(result.path / "rollouts.jsonl")}
    assert logged and all(int(name[1:]) % 4 for name in logged)


def trained_teacher() -> Any:
    """The students' base with an adapter that training might have made."""
    made = model(0, sharpness=8.0).requires_grad_(False)
    add_adapters(made, LoraConfig(parts=("language",), rank=4), 7, base="base")
    with torch.no_grad():
        for number, weight in enumerate(adapter_weights(made).values()):
            generator = torch.Generator().manual_seed(number)
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return made


class OfOneBase(Build):
    """The teacher is an adapter on the student's own base, which the reference is, too."""

    def __init__(self, adapter: Path, *, routed: bool = False) -> None:
        super().__init__(rows=ROWS)
        self.adapter, self.routed = adapter, routed

    def teacher(self, recipe: Recipe, accelerator: Any, policy: HFPolicy) -> Teacher:
        add_frozen_adapter(policy.model, self.adapter, "teacher0")
        teacher = AdapterTeacher(policy, "teacher0")
        return RoutedTeacher({"all": teacher}, lambda _: "all") if self.routed else teacher


class Merged(Build):
    """The same teacher as a model of its own."""

    def teacher(self, recipe: Recipe, accelerator: Any, policy: HFPolicy) -> Teacher:
        made = trained_teacher()
        merge_adapters(made)
        return LocalTeacher(HFPolicy(made, processor(), self.engine))


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("method", ["video-opd", "op-rkd"])
def test_a_student_that_is_its_own_teacher_and_reference_scores_as_three_models(
    method: str, routed: bool, tmp_path: Path
):
    save_adapter(trained_teacher(), tmp_path / "adapter")

    def run(name: str, build: Build) -> Path:
        return train(
            make_recipe(
                tmp_path / name,
                method,
                model={"freeze": ["vision", "merger", "lm_head"]},
                lora={"parts": ["language"], "rank": 4},
                teacher={"reward_scale": 1.25},
                sampling={"micro_batch_size": 2} if method == "video-opd" else {},
                optim={"lr": 1e-3, "batch_size": 8, "micro_batch_size": 2, "max_steps": 2},
            ),
            build,
        ).path

    expected = run("merged", Merged(rows=ROWS))
    assert_equal_to_rounding(expected, run("shared", OfOneBase(tmp_path / "adapter", routed=routed)))
