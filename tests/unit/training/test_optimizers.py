"""AdamW on float32 weights, on bfloat16 weights with stochastic rounding, and with moments in 8 bits.

``w`` weights, ``g`` gradients. A step's update is what it adds to a weight.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao_cases import torchao  # noqa: F401
from training_cases import Build, assert_same_run, make_recipe, rows_of, weights_of

from video_opd.config import OptimConfig, Recipe, recipe_from_dict
from video_opd.errors import UserError
from video_opd.models.parts import cast_weights
from video_opd.training import optimizers
from video_opd.training.checkpoint import find_checkpoints, load_training_state
from video_opd.training.components import check_libraries
from video_opd.training.loop import train
from video_opd.training.optimizers import LowPrecisionAdamW, accumulate_in_float32, make_optimizer
from video_opd.training.run_folder import RunFolder
from video_opd.training.step import Stepper

needs_torchao = pytest.mark.usefixtures("torchao")
STEPS = 1000
IN_8_BITS = {"moments": "int8"}
IN_BFLOAT16 = {"weights": "bfloat16", "dtype": "bfloat16"}


def some_weights(size: int = 4096) -> torch.Tensor:
    """Like a trained model's, whose neighbouring bfloat16 numbers are 1e-4 apart."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(size, generator=generator) * 0.02).bfloat16().float()


@functools.cache
def gradients(size: int = 4096) -> torch.Tensor:
    """[STEPS, size]: each weight's gradient keeps its sign, which a quarter of them have negative."""
    generator = torch.Generator().manual_seed(1)
    size_of_each = 0.5 + torch.rand(STEPS, size, generator=generator)
    return size_of_each * torch.where(torch.arange(size) % 4 == 0, -1.0, 1.0)


def stepped(weight: nn.Parameter, optimizer: torch.optim.Optimizer, gradients: torch.Tensor) -> torch.Tensor:
    """The sum of the updates, in float64."""
    first = weight.detach().double()
    for gradient in gradients:
        weight.grad = gradient.to(getattr(weight, "grad_dtype", weight.dtype))
        optimizer.step()
    return weight.detach().double() - first


@needs_torchao
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_the_mean_of_1000_updates_is_that_of_float32(moments: Any) -> None:
    """At lr 1e-6. A weight of one sign is pushed one way: its mean update is known to a standard error. Plain
    bfloat16 weights fail the same test."""

    def distance(update: torch.Tensor, expected: torch.Tensor) -> float:
        """Of the means, in standard errors."""
        off = update - expected
        return abs(off.mean().item()) / (off.std().item() / math.sqrt(len(off)))

    exact, plain = updates("float32", "torch"), updates("bfloat16", "torch")
    rounded = updates("bfloat16", moments)
    assert 0.9e-3 < exact.abs().mean() < 1.1e-3  # 1,000 times 1e-6
    for sign in (gradients()[0] > 0, gradients()[0] < 0):
        assert distance(rounded[sign], exact[sign]) < 3
        assert distance(plain[sign], exact[sign]) > 30
    assert plain.abs().mean() < 0.2 * exact.abs().mean()


@functools.cache
def updates(dtype: Any, moments: Any) -> torch.Tensor:
    """The sums of 1,000 updates of the optimiser with these moments, or of torch's."""
    weight = nn.Parameter(some_weights().to(getattr(torch, dtype)))
    if moments == "torch":
        return stepped(weight, torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0), gradients())
    optim = OptimConfig(moments=moments)
    assert optim.lr == 1e-6
    return stepped(weight, make_optimizer([weight], optim, dtype), gradients())


def test_bfloat16_weights_need_to_be_asked_for() -> None:
    weight = nn.Parameter(some_weights().bfloat16())
    with pytest.raises(AssertionError, match="loses updates"):
        make_optimizer([weight], OptimConfig())


@needs_torchao
def test_float32_moments_give_torchs_updates() -> None:
    """The same formula: decay, bias corrections, epsilon; over slices that end inside a tensor."""
    optim = OptimConfig(lr=1e-2, weight_decay=0.1, eps=1e-3)
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(40, 30)), nn.Parameter(torch.randn(7))]
    ours = [nn.Parameter(p.detach().clone()) for p in theirs]
    reference = make_optimizer(theirs, optim)
    optimizer = LowPrecisionAdamW([dict(group) for group in _groups(ours, optim)], optim, seed=0)
    for _ in range(5):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        reference.step()
        optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-6)


def _groups(parameters: list[nn.Parameter], optim: OptimConfig) -> list[dict[str, Any]]:
    return [
        {"params": [parameters[0]], "weight_decay": optim.weight_decay},
        {"params": [parameters[1]], "weight_decay": 0.0},
    ]


@needs_torchao
def test_slices_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit blocks do not cross the slices."""

    def moved() -> torch.Tensor:
        weight = nn.Parameter(some_weights())
        return stepped(weight, make_optimizer([weight], OptimConfig(moments="int8")), gradients()[:5])

    whole = moved()
    monkeypatch.setattr(optimizers, "WEIGHTS_A_CHUNK", 1024)
    assert torch.equal(moved(), whole)


@needs_torchao
@pytest.mark.parametrize("each_step", [True, False])
def test_gradients_of_many_sizes_move_weights_as_float32_moments_do(each_step: bool) -> None:
    """The sizes of a block's gradients span orders of magnitude, each step anew or weight by weight.

    Whatever the gradients were, the third step of AdamW moves a weight by at most 1.005 learning rates (by
    Cauchy-Schwarz: the weights of the moments are 0.081, 0.09, 0.1 over 0.271, and a third each).
    """
    generator = torch.Generator().manual_seed(3)
    size = 64 * 1024
    spread = torch.exp(2 * torch.randn(3 if each_step else 1, size, generator=generator))
    given = 1e-5 * spread * torch.randn(3, size, generator=generator)
    found = {}
    for moments in ("float32", "int8"):
        weight = nn.Parameter(torch.zeros(size // 256, 256))
        optim = OptimConfig(moments=moments, weight_decay=0.0, betas=(0.9, 0.999))
        optimizer = make_optimizer([weight], optim)
        before = stepped(weight, optimizer, given[:2].view(2, *weight.shape))
        last = stepped(weight, optimizer, given[2:].view(1, *weight.shape))
        found[moments] = before + last, last.abs().max().item() / optim.lr
    assert found["float32"][1] <= 1.005
    assert found["int8"][1] <= 2.0
    exact, rounded = found["float32"][0], found["int8"][0]
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@needs_torchao
def test_moments_take_a_byte_each() -> None:
    large, small = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 63))
    optimizer = make_optimizer([large, small], OptimConfig(moments="int8"))
    for weight in (large, small):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = {name: (value.dtype, value.numel()) for name, value in optimizer.state[large].items()}
    assert held["exp_avg"] == held["exp_avg_sq_root"] == (torch.uint8, 4096)
    assert held["exp_avg_scale"] == held["exp_avg_sq_root_scale"] == (torch.float32, 16)
    assert {value.dtype for value in optimizer.state[small].values()} == {torch.float32}


def test_gradients_of_bfloat16_weights_are_added_up_in_float32() -> None:
    """32 micro-batches; summed in bfloat16, the last ones would be lost."""
    if not hasattr(nn.Parameter(torch.zeros(1)), "grad_dtype"):  # torch 2.9
        with pytest.raises(UserError, match="needs a torch in which gradients have a type of their own"):
            accumulate_in_float32(nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)))
        return
    torch.manual_seed(0)
    inputs = (1 + torch.rand(32, 16)).bfloat16()
    exact = inputs.double().sum(0)
    held = []
    for accumulate in (True, False):
        weight = nn.Parameter(torch.zeros(16, dtype=torch.bfloat16))
        if accumulate:
            accumulate_in_float32(weight)
        for x in inputs:
            (weight * x).sum().backward()
        assert weight.grad is not None
        held.append(weight.grad)
    assert held[0].dtype == torch.float32 and held[1].dtype == torch.bfloat16
    torch.testing.assert_close(held[0].double(), exact, atol=0, rtol=1e-6)
    assert (held[1].double() - exact).abs().max() / exact.max() > 1e-3


# ------------------------------------------------------------------------------------------------ whole runs


class LowBuild(Build):
    """The same models, with the student's weights in the recipe's type."""

    def __init__(self, weights: torch.dtype, **settings: Any) -> None:
        super().__init__(**settings)
        self.weights = weights

    def base(self) -> Any:
        made = super().base()
        cast_weights(made, self.weights)
        return made


def recipe(folder: Path, **sections: Any) -> Recipe:
    optim = {"epochs": 2, "lr": 1e-3} | sections.pop("optim", {})
    return make_recipe(folder, optim=optim, **sections)


@needs_torchao
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_run_that_is_cut_off_ends_the_same(
    tmp_path: Path, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, the draws of stochastic rounding included: weights, metrics, rollouts."""
    settings = {"model": IN_BFLOAT16, "optim": {"moments": moments}}
    once = train(recipe(tmp_path / "once", **settings), LowBuild(torch.bfloat16)).path
    update = Stepper.update

    def cut_off(self: Stepper, step: int, batch: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step, batch)

    cut = recipe(tmp_path / "cut", **settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Stepper, "update", cut_off)
        train(cut, LowBuild(torch.bfloat16))
    (saved,) = find_checkpoints(RunFolder(tmp_path / "cut").checkpoints)
    assert saved.step == 2
    state = load_training_state(saved)["optimizer"]["state"]["lm_head.weight"]
    assert state["exp_avg"].dtype == (torch.uint8 if moments == "int8" else torch.float32)
    train(cut, LowBuild(torch.bfloat16))
    assert_same_run(once, tmp_path / "cut")
    rows = rows_of(once / "metrics.jsonl")
    assert all(row["weights/changed"] > 0.01 for row in rows)
    assert all(weight.equal(weight.bfloat16().float()) for weight in weights_of(once).values())


@needs_torchao
def test_a_step_has_the_gradient_of_float32_weights(tmp_path: Path) -> None:
    one = {"max_steps": 1}
    whole = train(recipe(tmp_path / "a", model={"dtype": "bfloat16"}, optim=one), Build()).metrics
    low = recipe(tmp_path / "b", model=IN_BFLOAT16, optim=one | IN_8_BITS)
    ours = train(low, LowBuild(torch.bfloat16)).metrics
    for key in ("update/grad_norm", "reverse_kl/analytic", "response/nll"):
        assert math.isclose(ours[key], whole[key], rel_tol=0.1), key


# ------------------------------------------------------------------------------------------------ bad input


def tree(model: dict[str, Any], optim: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "model": {"path": "base", **model},
        "teacher": {"path": "teacher"},
        "data": {"train": "d"},
        "optim": optim,
        **sections,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (tree({"weights": "bfloat16"}, {}), "model.dtype float32: set both to bfloat16"),
        (tree(IN_BFLOAT16 | {"sharding": "fsdp2"}, {}), "model.sharding fsdp2: it shards float32 weights"),
        (tree(IN_BFLOAT16, {}, lora={"parts": ["language"]}), "lora.parts: adapters are float32"),
        (tree(IN_BFLOAT16, {"offload": True}), "optim.offload: that holds float32 weights"),
        (tree({}, IN_8_BITS | {"offload": True}), "moments on the CPU are float32"),
        (tree({"sharding": "fsdp2"}, IN_8_BITS), "optim.moments int8 with model.sharding fsdp2"),
        (tree({}, {"moments": "int4"}), "optim.moments is 'int4'"),
    ],
)
def test_types_that_do_not_go_together_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_from_dict(settings)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.weights bfloat16 needs torchao.*pip install torchao"):
        check_libraries(recipe_from_dict(tree(IN_BFLOAT16, {})))
    with pytest.raises(UserError, match=r"optim\.moments int8 needs torchao"):
        check_libraries(recipe_from_dict(tree({}, IN_8_BITS)))
    check_libraries(recipe_from_dict(tree({}, {})))


@needs_torchao
def test_moments_of_another_type_are_refused() -> None:
    weight = nn.Parameter(some_weights())
    saved = {}
    for moments in ("int8", "float32"):
        optim = OptimConfig(moments=moments)
        optimizer = LowPrecisionAdamW([{"params": [weight], "weight_decay": 0.0}], optim, seed=0)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        saved[moments] = optimizer.named_state({weight: "w"})
    optimizer.load_named_state({weight: "w"}, saved["float32"])
    with pytest.raises(ValueError, match=r"moments of w are not those of optim\.moments"):
        optimizer.load_named_state({weight: "w"}, saved["int8"])


def test_vectors_are_not_decayed():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([matrix, vector], OptimConfig(weight_decay=0.1, lr=1.0))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.9)) and torch.equal(vector, torch.ones(2))
