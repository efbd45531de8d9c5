"""Two processes (gloo), with DDP and with FSDP2, train as one does with the plain engine: every estimator,
both modes of the prefix, adapters, a frozen part; and one goes on with what the others saved."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import mixture, model
from safetensors.torch import load_file
from training_cases import Build, TwoForks, assert_equal_to_rounding, launched, make_recipe, rows_of

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.parts import cast_weights
from video_opd.training import sharding
from video_opd.training.components import Components
from video_opd.training.loop import train
from video_opd.training.run_folder import RunFolder
from video_opd.training.sharding import (
    is_sharded,
    load_optimizer_state,
    optimizer_state,
    sharding_asked,
    whole,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "video-opd": {},
    "video-opd recompute": {"model": {"gradient_checkpointing": True}},
    "video-opd full": {"loss": {"estimator": "full", "reduction": "token_mean"}},
    "video-opd top-k": {"loss": {"estimator": "topk"}},
    "video-opd baseline": {"loss": {"baseline": "kl"}},
    "video-opd frozen vision": {"model": {"freeze": ["vision"]}},
    "video-opd adapters": {"lora": {"parts": ["language"], "rank": 4}},
    "grpo": {
        "sampling": {"rollouts": 3},
        "reward": {"function": "training_cases:a_reward"},
        "loss": {"kl_beta": 0.1},
    },
    "grpo adapters": {
        "sampling": {"rollouts": 2},
        "reward": {"function": "training_cases:a_reward"},
        "loss": {"kl_beta": 0.1},
        "lora": {"parts": ["vision", "language"], "rank": 4},
    },
    "grpo recompute": {
        "sampling": {"rollouts": 3},
        "reward": {"function": "training_cases:a_reward"},
        "model": {"gradient_checkpointing": True},
    },
    "grpo offloaded": {
        "sampling": {"rollouts": 2},
        "reward": {"function": "training_cases:a_reward"},
        "loss": {"kl_beta": 0.1},
    },
    "sft": {},
    "sft 16 bits": {},
    "video-opd 16 bits frozen vision": {"model": {"freeze": ["vision"]}},
    "video-opd experts": {},
    "grpo experts recompute": {
        "sampling": {"rollouts": 3},
        "reward": {"function": "training_cases:a_reward"},
        "model": {"gradient_checkpointing": True},
    },
}
# What is tried beside ``model.sharding fsdp2``.
MODES: dict[str, dict[str, Any]] = {
    "video-opd": {"teacher": {"placement": "sharded"}},
    "video-opd recompute": {"model": {"reduce": "micro_batch"}},
    "video-opd full": {"teacher": {"placement": "sharded"}, "model": {"reduce": "micro_batch"}},
    "video-opd top-k": {"optim": {"offload": True}, "teacher": {"placement": "cpu"}},
    "video-opd baseline": {
        "teacher": {"placement": "sharded"},
        "model": {"reduce": "micro_batch"},
        "optim": {"offload": True},
    },
    "video-opd frozen vision": {"model": {"reduce": "micro_batch"}, "optim": {"offload": True}},
    "video-opd adapters": {"optim": {"offload": True}},
    "grpo": {"teacher": {"placement": "sharded"}, "model": {"reduce": "micro_batch"}},
    "sft 16 bits": {"optim": {"offload": True}},
    "video-opd experts": {"teacher": {"placement": "sharded"}, "optim": {"offload": True}},
    "sft bfloat16 adapters": {"model": {"reduce": "micro_batch"}},
}
# What is tried once more, with layers that are gathered one at a time.
BY_LAYER: dict[str, dict[str, Any]] = {
    "video-opd": {"teacher": {"placement": "sharded"}},
    "video-opd full": {"model": {"reduce": "micro_batch"}, "optim": {"offload": True}},
    "video-opd top-k": {"sampling": {"micro_batch_size": 1}, "teacher": {"placement": "cpu"}},
    "video-opd frozen vision": {},
    "video-opd adapters": {},
    "grpo": {"teacher": {"placement": "sharded"}, "model": {"reduce": "micro_batch"}},
    "grpo adapters": {},
    "grpo offloaded": {"sampling": {"micro_batch_size": 1}, "teacher": {"placement": "cpu"}},
    "sft": {"optim": {"offload": True}},
    "sft 16 bits": {},
    "video-opd 16 bits frozen vision": {"optim": {"offload": True}},
    "grpo experts recompute": {},
    "sft bfloat16": {},
}
# bfloat16 rounds to 3 digits, and DDP's autocast keeps more in float32: alike, not equal.
BFLOAT16: dict[str, dict[str, Any]] = {
    "sft bfloat16": {"model": {"dtype": "bfloat16"}},
    "sft bfloat16 adapters": {"model": {"dtype": "bfloat16"}, "lora": {"parts": ["language"], "rank": 4}},
}


def recipe_of(
    name: str, path: Path, *, sharded: bool, engine: str = "prefix", by_layer: bool = False
) -> Recipe:
    """Four optimiser steps of 6 prompts, two on each batch; two processes have 2 and 1 micro-batches. A
    checkpoint is written after the second and the fourth."""
    sections = {key: dict(value) for key, value in (SETTINGS | BFLOAT16)[name].items()}
    optim = {"lr": 1e-3, "max_grad_norm": 1e9, "updates_per_batch": 2, "max_steps": 4}
    optim |= {"batch_size": 6, "micro_batch_size": 2}
    added: dict[str, dict[str, Any]] = {"model": {"engine": engine}, "optim": optim, "run": {"save_every": 2}}
    modes = [{"model": {"sharding": "fsdp2"}}, MODES.get(name, {})] if sharded else []
    if by_layer:
        modes = [{"model": {"sharding": "fsdp2", "gather": "layer"}}, BY_LAYER[name]]
    for more in (added, *modes):
        for key, value in more.items():
            sections[key] = {**sections.get(key, {}), **value}
    return make_recipe(path, name.split()[0], **sections)


@pytest.fixture(scope="module")
def forks() -> Iterator[TwoForks]:
    two = TwoForks()
    yield two
    two.end()


OfTwo = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def of_two(forks: TwoForks, tmp_path_factory: pytest.TempPathFactory) -> OfTwo:
    """The run of two processes that a name and a mode ask for: "whole", "sharded" or "by layer". It is made
    once, and no test writes into its folder."""
    root = tmp_path_factory.mktemp("of-two")

    @functools.cache
    def run(name: str, mode: str) -> Path:
        path = root / f"{name} {mode}"
        recipe = recipe_of(name, path, sharded=mode != "whole", by_layer=mode == "by layer")
        forks.train(build_of(name), recipe)
        return path

    return run


def modes_of(name: str) -> list[str]:
    return ["whole", "sharded", *(["by layer"] if name in BY_LAYER else [])]


class Recording(Build):
    """Keeps the gradients of the first optimiser step, whole, in ``gradients.pt`` beside the run."""

    def __call__(
        self, recipe: Recipe, accelerator: Any, folder: RunFolder, weights: str | Path
    ) -> Components:
        components = super().__call__(recipe, accelerator, folder, weights)
        step, kept = components.optimizer.step, folder.path / "gradients.pt"
        if accelerator.num_processes > 1:  # while one evaluates for hours, the others wait
            group = torch.distributed.group.WORLD
            assert group is not None
            assert group._get_backend(accelerator.device).options._timeout >= timedelta(days=1)
        assert is_sharded(components.model) == (
            accelerator.num_processes > 1 and recipe.model.sharding == "fsdp2"
        )

        def keep_and_step() -> None:
            components.optimizer.step = step  # type: ignore[method-assign]
            masters = components.masters
            named = masters.weights.items() if masters else components.model.named_parameters()
            grads = {name: weight.grad for name, weight in named if weight.grad is not None}
            held = {
                name: masters.whole(name, grad) if masters else whole(grad).clone()
                for name, grad in grads.items()
            }
            if accelerator.is_main_process:
                torch.save(held, kept)
            step()

        components.optimizer.step = keep_and_step  # type: ignore[method-assign, assignment]
        return components


# The second of two processes has no row of the first batch, and the first two of its three of the other.
BROKEN = dict.fromkeys(("video-opd full", "grpo offloaded"), ("s3", "s8", "s11", "s10"))


def stored_in_16_bits(seed: int, *, sharpness: float) -> Any:
    """A student that was read as it is stored, and not widened yet."""
    made = model(seed, sharpness=sharpness)
    cast_weights(made, torch.bfloat16)
    return made


def build_of(name: str, engine: str = "prefix") -> Recording:
    student = mixture if "experts" in name else stored_in_16_bits if "16 bits" in name else model
    return Recording(rows=12, engine=engine, student=student, broken=BROKEN.get(name, ()))


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one_with_the_plain_engine(name: str, of_two: OfTwo, tmp_path: Path):
    plain = recipe_of(name, tmp_path / "plain", sharded=False, engine="plain")
    one = train(plain, build_of(name, "plain")).path
    rows = rows_of(one / "metrics.jsonl")
    assert [row["update/grad_norm"] > 0 for row in rows] == [True] * 4
    expected = torch.load(one / "gradients.pt")
    for mode in modes_of(name):
        two = of_two(name, mode)
        assert_equal_to_rounding(one, two)
        got = torch.load(two / "gradients.pt")
        assert got.keys() == expected.keys()
        off = math.sqrt(sum((got[key] - expected[key]).square().sum().item() for key in expected))
        assert off < 1e-5 * math.sqrt(sum(grad.square().sum().item() for grad in expected.values()))


@pytest.mark.parametrize("name", ["video-opd", "video-opd adapters"])
def test_a_run_is_continued_on_another_number_of_processes(
    name: str, forks: TwoForks, of_two: OfTwo, tmp_path: Path
):
    build, by_layer = Build(rows=12), name == "video-opd adapters"
    one = train(recipe_of(name, tmp_path / "one", sharded=False), build).path
    two = of_two(name, "by layer" if by_layer else "sharded")
    for source, path in ((one, tmp_path / "two-continue"), (two, tmp_path / "one-continues")):
        shutil.copytree(source, path)
        (path / "done.json").unlink()
        shutil.rmtree(path / "model")
        shutil.rmtree(path / "checkpoints" / "step-4")
        assert [saved.name for saved in (path / "checkpoints").iterdir()] == ["step-2"]
    continuing = recipe_of(name, tmp_path / "two-continue", sharded=True, by_layer=by_layer)
    forks.train(build, continuing)
    assert_equal_to_rounding(one, tmp_path / "two-continue")
    train(recipe_of(name, tmp_path / "one-continues", sharded=False), build)
    assert_equal_to_rounding(one, tmp_path / "one-continues")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", BFLOAT16)
def test_shards_are_float32_where_the_computation_is_not(name: str, of_two: OfTwo):
    found = []
    for mode in modes_of(name):
        run = of_two(name, mode)
        gradients = torch.load(run / "gradients.pt")
        assert {grad.dtype for grad in gradients.values()} == {torch.float32}
        part = "adapter" if "adapters" in name else "model"
        kept, saved = (tensors_of(path / part) for path in (run, run / "checkpoints" / "step-4"))
        assert kept.keys() == saved.keys() and all(torch.equal(kept[key], saved[key]) for key in kept)
        assert {weight.dtype for weight in kept.values()} == {torch.float32}
        # Masters, not what was computed with: bfloat16 does not hold them.
        flat = torch.cat([weight.flatten() for weight in kept.values()])
        assert (flat != flat.bfloat16().float()).double().mean() > 0.85
        # All but the embeddings of tokens that nobody wrote: a step of 1e-3 is lost on no float32 weight.
        assert min(row["weights/changed"] for row in rows_of(run / "metrics.jsonl")) > 0.85
        found.append(torch.cat([grad.flatten() for grad in gradients.values()]))
    for sharded in found[1:]:
        assert torch.cosine_similarity(found[0], sharded, dim=0) > 0.995
        assert math.isclose(found[0].norm(), sharded.norm(), rel_tol=0.05)


def test_a_weight_without_a_gradient_has_no_state_after_loading_either():
    """With a state of zeros, Adam would correct the bias of its first step as that of its second."""

    def made() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, *names: str) -> None:
        for name in names:
            weight = layer.get_parameter(name)
            weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = made()
    assert optimizer_state(layer, optimizer)["state"] == {}
    assert not optimizer.state  # asking made no step
    step(layer, optimizer, "weight")
    state = copy.deepcopy(optimizer_state(layer, optimizer))  # as a file would be
    assert set(state["state"]) == {"weight"}
    other, continued = made()
    untouched = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_optimizer_state(other, continued, {"state": {}, "param_groups": []})
    load_optimizer_state(other, continued, state)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in untouched.items())
    other.load_state_dict(layer.state_dict())
    for pair in ((layer, optimizer), (other, continued)):
        step(*pair, "weight", "bias")
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


def test_a_frozen_weight_takes_nothing_when_a_state_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base under adapters is most of a model: blank moments of it would be twice its size."""
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(64, 64), "adapter": torch.nn.Linear(64, 2)})
    model["base"].requires_grad_(False)
    optimizer = torch.optim.AdamW(model["adapter"].parameters(), lr=0.1)
    for weight in model["adapter"].parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = copy.deepcopy(optimizer_state(model, optimizer))
    made: list[torch.Tensor] = []
    monkeypatch.setattr(sharding, "_no_moments", made.append)
    load_optimizer_state(model, optimizer, state)
    assert made == []


def test_one_process_shards_nothing_and_accelerates_own_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of("video-opd", tmp_path, sharded=True)
    assert not sharding_asked(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding_asked(recipe)
    assert not sharding_asked(recipe_of("video-opd", tmp_path, sharded=False))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="set model"):
        sharding_asked(recipe)


def test_torchrun_makes_one_run_of_several_processes(tmp_path: Path):
    """This holds without an accelerator, too, where Accelerate would start several runs in one folder."""
    recipe = recipe_of("sft", tmp_path / "two", sharded=True)
    launched(2, lambda: train(recipe, Recording(rows=12)))
    facts = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert facts["processes"] == 2
    one = train(recipe_of("sft", tmp_path / "one", sharded=False), Recording(rows=12)).path
    assert_equal_to_rounding(one, tmp_path / "two")
