"""Frozen layers in 8 bits: the arithmetic, the gradient of the input, and how far log-probs move."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import mixed_prompts, mixture, model, processor
from torch import nn
from torchao_cases import torchao  # noqa: F401
from training_cases import Build, assert_equal_to_rounding, make_recipe, train_on_two, weights_of

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models import quantisation
from video_opd.models.loading import load_model, load_teacher
from video_opd.models.lora import adapter_weights, load_adapter, merge_adapters
from video_opd.models.policy import HFPolicy
from video_opd.models.quantisation import QuantisedLinear, check_quantisation, quantise_frozen_layers
from video_opd.models.teachers import LocalTeacher
from video_opd.training.components import load_student
from video_opd.training.loop import train

CPU = torch.device("cpu")
RESPONSES: Any = [[(9, 10, 11), (12,)], [(13, 14)], [(9, 15, 16, 17)]]
needs_torchao = pytest.mark.usefixtures("torchao")


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 10).to(dtype).requires_grad_(False)


def rounded(weight: torch.Tensor, kind: Any) -> torch.Tensor:
    """W as one scale a row leaves it, written from the definition of the two types."""
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "int8":
        scale = largest / 127.5  # half of the 255 steps from -128 to 127: the largest weight is a tie
        return (weight * (1.0 / scale)).round().clamp(-128, 127).double() * scale
    scale = largest / 448  # the largest number of float8_e4m3fn
    return (weight / scale).to(torch.float8_e4m3fn).double() * scale


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_layer_computes_with_rounded_weights(kind: Any) -> None:
    plain, x = layer(), torch.randn(3, 5, 24)
    made = QuantisedLinear.of(plain, kind, CPU)
    expected = x.double() @ rounded(plain.weight, kind).T + plain.bias.double()
    torch.testing.assert_close(made(x).double(), expected, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(made(x), plain(x), atol=1e-5)
    weight: Any = made.weight
    assert weight.qdata.element_size() == 1 and weight.scale.shape == (10, 1)


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_gradients_of_the_input_are_those_of_the_rounded_weights(kind: Any) -> None:
    plain = layer()
    made = QuantisedLinear.of(plain, kind, CPU)
    x = torch.randn(3, 5, 24, requires_grad=True)
    (made(x).tanh() ** 2).sum().backward()
    y = x.detach().double().requires_grad_()
    ((y @ rounded(plain.weight, kind).T + plain.bias.double()).tanh() ** 2).sum().backward()
    assert x.grad is not None and y.grad is not None
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5, rtol=1e-5)


@needs_torchao
def test_autocast_decides_the_type_of_the_product() -> None:
    made = QuantisedLinear.of(layer(), "int8", CPU)
    x = torch.randn(3, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x), atol=0.03, rtol=0.03)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@needs_torchao
def test_what_is_trained_and_the_head_keep_their_type() -> None:
    made = model()
    made.requires_grad_(False)
    made.model.language_model.layers[0].mlp.requires_grad_(True)
    count = quantise_frozen_layers(made, "int8", CPU)
    kinds = {name: type(module) for name, module in made.named_modules() if isinstance(module, nn.Linear)}
    plain = {name for name, kind in kinds.items() if kind is nn.Linear}
    mlp = "model.language_model.layers.0.mlp."
    assert plain == {"lm_head", *(f"{mlp}{name}_proj" for name in ("gate", "up", "down"))}
    held = [m.weight.numel() for m in made.modules() if isinstance(m, QuantisedLinear)]
    assert count == sum(held) and len(held) == 26 - 3  # tests/unit/models/test_lora.py counts the layers


@needs_torchao
@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_both_engines_score_with_the_rounded_weights(engine: Any) -> None:
    """The whole teacher equals a plain model whose weights were rounded beforehand."""
    quantised = model(sharpness=20).requires_grad_(False)
    quantise_frozen_layers(quantised, "int8", CPU)
    by_hand = model(sharpness=20)
    with torch.no_grad():
        for name, child in by_hand.named_modules():
            if isinstance(child, nn.Linear) and name != "lm_head":
                child.weight.copy_(rounded(child.weight, "int8"))
    got, expected, full = (
        LocalTeacher(HFPolicy(each, processor(), engine)).logprobs(mixed_prompts(), RESPONSES).logprobs_BT
        for each in (quantised, by_hand, model(sharpness=20))
    )
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    assert (got - full).abs().max() > 1e-3


@needs_torchao
def test_a_folder_is_quantised_while_it_is_loaded(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded, _ = load_teacher(tmp_path, "bfloat16", CPU, quantization="int8")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = copy.deepcopy(model()).bfloat16().requires_grad_(False)
    quantise_frozen_layers(expected, "int8", CPU)
    theirs = dict(expected.named_parameters())
    for name, weight in loaded.named_parameters():
        a, b = (getattr(each, "qdata", each) for each in (weight, theirs[name]))
        assert torch.equal(a.flatten(), b.flatten()), name


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"teacher\.quantization int8 needs torchao.*pip install torchao"):
        check_quantisation("int8", "teacher.quantization", CPU, "qwen3_vl")


@needs_torchao
def test_a_device_without_the_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no float8 here\nmore")

    monkeypatch.setattr(quantisation.QuantisedLinear, "of", fail)
    with pytest.raises(UserError, match=r"float8 cannot be computed on cpu \(no float8 here\); use int8"):
        check_quantisation("float8", "teacher.quantization", CPU, "qwen3_vl")


@needs_torchao
def test_experts_are_refused(tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="experts of a qwen3_vl_moe model are no linear layers"):
        load_teacher(tmp_path, "float32", CPU, quantization="int8")


# ----------------------------------------------------------------------------------- adapters on such a base


def adapted_recipe(folder: Path, base: Path, quantised: bool, **sections: Any) -> Recipe:
    """Adapters on the language model; everything else is frozen."""
    lora = {"parts": ["language"], "rank": 4, "alpha": 8.0}
    if quantised:
        lora["base_quantization"] = "int8"
    sections["model"] = {"path": str(base), "freeze": ["vision", "merger", "lm_head"]}
    return make_recipe(folder, lora=lora, **sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of every ``Build``, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    model(0, sharpness=8.0).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def adapted(base: Path, quantised: bool) -> tuple[Any, dict[str, nn.Parameter]]:
    """(the policy, A and B); B has random values, as if training had moved them."""
    recipe = adapted_recipe(Path("run"), base, quantised)
    student, _ = load_student(recipe, base, CPU)
    factors = adapter_weights(student)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in factors.items():
            if ".lora_B." in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return HFPolicy(student, processor()), factors


@needs_torchao
def test_adapters_on_a_quantised_base_have_nearly_the_same_gradients(base: Path) -> None:
    found = []
    for quantised in (False, True):
        policy, factors = adapted(base, quantised)
        policy.logprobs(mixed_prompts(), RESPONSES, grad=True).logprobs_BT.sum().backward()
        found.append({name: p.grad for name, p in factors.items() if p.grad is not None})
        held = [name for name, m in policy.model.named_modules() if isinstance(m, QuantisedLinear)]
        assert len(held) == (26 if quantised else 0)
    assert found[0].keys() == found[1].keys() == factors.keys()
    for name, exact in found[0].items():
        assert (found[1][name] - exact).norm() < 0.1 * exact.norm(), name
        assert not torch.equal(found[1][name], exact)


@needs_torchao
def test_adapters_on_a_quantised_base_learn(base: Path) -> None:
    policy, factors = adapted(base, True)
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = -policy.logprobs(mixed_prompts(), RESPONSES, grad=True).logprobs_BT.sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@needs_torchao
def test_a_run_on_a_quantised_base_ends_on_the_whole_base(base: Path, tmp_path: Path) -> None:
    """In one process and two. ``model/`` is the base's own weights with the adapter merged into them."""
    one = train(adapted_recipe(tmp_path / "one", base, True), Build())
    expected, _ = load_model(base, dtype="float32")
    load_adapter(expected, one.path / "adapter")
    merge_adapters(expected)
    saved = weights_of(one.path)
    assert saved.keys() == expected.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.state_dict().items())
    plain = train(adapted_recipe(tmp_path / "plain", base, False), Build())
    assert any(not torch.equal(saved[name], value) for name, value in weights_of(plain.path).items())

    train_on_two(Build(), adapted_recipe(tmp_path / "two", base, True))
    assert_equal_to_rounding(one.path, tmp_path / "two")


@pytest.mark.parametrize("placement", ["sharded", "cpu"])
def test_a_quantised_teacher_stays_where_it_is(placement: str) -> None:
    with pytest.raises(UserError, match=f"teacher.placement {placement} with teacher.quantization int8"):
        make_recipe(Path("run"), teacher={"quantization": "int8", "placement": placement})


@pytest.mark.parametrize(
    ("lora", "model_section", "said"),
    [
        ({"base_quantization": "int8"}, {}, "lora.base_quantization int8 without lora.parts"),
        (
            {"base_quantization": "int8", "parts": ["language"]},
            {"sharding": "fsdp2"},
            "model.sharding fsdp2: quantised weights are not sharded",
        ),
        ({"base_quantization": "float8"}, {}, "lora.base_quantization is 'float8'"),
    ],
)
def test_a_quantised_base_has_its_conditions(lora: Any, model_section: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_recipe(Path("run"), lora=lora, model=model_section)
