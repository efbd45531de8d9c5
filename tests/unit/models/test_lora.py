"""Adapters: which weights they train, that they begin as nothing, can be merged, saved and resumed.

``s`` is alpha / rank. An adapted layer of base weight W has the effective weight W + s B A.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import mixed_prompts, model, processor
from safetensors.torch import load_file
from training_cases import (
    Build,
    Watched,
    assert_equal_to_rounding,
    assert_same_run,
    free_port,
    kill_later,
    make_recipe,
    rows_of,
    start,
    train_on_two,
    weights_of,
)

from video_opd.config import LoraConfig, Recipe
from video_opd.errors import UserError
from video_opd.models.interfaces import Teacher
from video_opd.models.loading import DTYPES, load_model
from video_opd.models.lora import (
    adapted_layers,
    adapters_off,
    add_adapters,
    load_adapter,
    merge_adapters,
    merged_weights,
    save_adapter,
)
from video_opd.models.parts import cast_weights
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import AdaptersOffReference, LocalTeacher
from video_opd.training.checkpoint import find_checkpoints, save_model_folder
from video_opd.training.components import adapt, load_reference, load_student
from video_opd.training.loop import RunResult, train
from video_opd.training.optimizers import make_optimizer
from video_opd.training.run_folder import RunFolder

PARTS: Any = ("vision", "merger", "language")
EACH_AND_ALL = [("vision",), ("merger",), ("language",), PARTS]
PREFIXES = {
    "vision": ("model.visual.blocks.", "model.visual.patch_embed.", "model.visual.pos_embed."),
    "merger": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
    "language": ("model.language_model.",),
    "lm_head": ("lm_head.",),
}
# The layers of the tiny model: two vision blocks (qkv, proj, fc1, fc2), a merger and a deepstack merger (fc1,
# fc2), two decoder layers (q, k, v, o, gate, up, down).
LAYERS = {"vision": 8, "merger": 4, "language": 14}
RESPONSES: Any = [[(9, 10, 11), (12,)], [(13, 14)], [(9, 15, 16, 17)]]
SCALE = 2.0  # alpha 8, rank 4


def lora_recipe(folder: Path | str, parts: Any, **sections: Any) -> Recipe:
    """Adapters on ``parts``, and nothing else trained unless ``model.freeze`` says so."""
    freeze = [part for part in PREFIXES if part not in parts]
    sections["model"] = {"freeze": freeze, **sections.get("model", {})}
    return make_recipe(Path(folder), lora={"parts": list(parts), "rank": 4, "alpha": 8.0}, **sections)


def adapted(parts: Any = PARTS, **sections: dict[str, Any]) -> Any:
    made = model(0, sharpness=8.0)
    adapt(made, lora_recipe("run", parts, **sections), "base")
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_was_read_in_16_bits_gives_the_same_student(dtype: str) -> None:
    """Adapters on the language model, a merger that is trained in full, a vision tower that is frozen."""
    recipe = make_recipe(
        Path("run"), lora={"parts": ["language"], "rank": 4}, model={"freeze": ["vision"], "dtype": dtype}
    )
    narrow, wide = model(0, sharpness=8.0), model(0, sharpness=8.0)
    for each in (narrow, wide):
        cast_weights(each, torch.bfloat16)
    cast_weights(wide, torch.float32)
    for each in (narrow, wide):
        adapt(each, recipe, "base")
    expected, got = dict(wide.named_parameters()), dict(narrow.named_parameters())
    assert expected.keys() == got.keys() and {w.requires_grad for w in got.values()} == {True, False}
    for name, weight in expected.items():
        assert got[name].dtype == (torch.float32 if weight.requires_grad else DTYPES[dtype]), name
        assert torch.equal(got[name], weight) and got[name].requires_grad == weight.requires_grad, name


def trained(parts: Any = PARTS, **sections: dict[str, Any]) -> Any:
    """A student whose adapters have random weights, as if training had moved them."""
    made = adapted(parts, **sections)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def scores(of: Any, engine: Any = "prefix") -> torch.Tensor:
    """Log-probabilities of all responses over the whole vocabulary."""
    found = HFPolicy(of, processor(), engine).logprobs(mixed_prompts(), RESPONSES, full=True)
    assert found.full_BTV is not None
    return found.full_BTV


def gradients(of: Any, engine: Any = "prefix") -> dict[str, torch.Tensor]:
    of.zero_grad()
    return backward(HFPolicy(of, processor(), engine), mixed_prompts())


def backward(policy: HFPolicy, prompts: Any) -> dict[str, torch.Tensor]:
    found = policy.logprobs(prompts, RESPONSES, grad=True)
    weights = torch.linspace(-1.0, 2.0, found.mask_BT.numel()).reshape(found.mask_BT.shape)
    (found.logprobs_BT * weights).sum().backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def assert_close_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def base_name(name: str) -> str:
    """The name in the plain model of a weight of the adapted model."""
    return name.replace(".base_layer.", ".")


# ---------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("parts", EACH_AND_ALL, ids="+".join)
def test_only_the_adapters_of_these_parts_learn(parts: tuple[str, ...]) -> None:
    student, plain = adapted(parts), model(0, sharpness=8.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = make_optimizer([p for p in student.parameters() if p.requires_grad], make_recipe_optim())
    seen: set[str] = set()
    for _ in range(2):  # A has no gradient while B is 0
        seen |= {name for name, gradient in gradients(student).items() if gradient.norm() > 0}
        optimizer.step()
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    assert len(seen) == 2 * sum(LAYERS[part] for part in parts)
    assert all(".lora_" in name and name.startswith(prefixes) for name in seen)
    after = student.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == seen
    bases = {base_name(name): value for name, value in after.items() if ".lora_" not in name}
    assert bases.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, bases[name]) for name, value in plain.state_dict().items())
    assert type(student) is type(plain)


def make_recipe_optim() -> Any:
    return make_recipe(Path("run"), optim={"lr": 1e-2}).optim


@pytest.mark.parametrize("freeze", [[], ["vision"], ["lm_head", "merger"]], ids=str)
def test_a_part_is_trained_in_full_through_adapters_or_not_at_all(freeze: list[str]) -> None:
    student = trained(("language",), model={"freeze": freeze})
    found = {name for name, gradient in gradients(student).items() if gradient.norm() > 0}
    plain = {name for name, _ in model().named_parameters()}
    for part, prefixes in PREFIXES.items():
        mine = {name for name in plain if name.startswith(prefixes)}
        learned = {name for name in found if name.startswith(prefixes)}
        if part == "language":
            assert len(learned) == 2 * LAYERS[part] and all(".lora_" in name for name in learned)
        else:
            assert learned == (set() if part in freeze else mine)


def test_a_tensor_of_two_parts_is_frozen_with_either() -> None:
    tied = model()
    tied.lm_head.weight = tied.model.language_model.embed_tokens.weight
    add_adapters(tied, LoraConfig(parts=("language",)), seed=0)
    assert not tied.lm_head.weight.requires_grad
    assert tied.model.visual.merger.linear_fc1.weight.requires_grad


# ------------------------------------------------------------------------------------------- how they begin


@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_at_first_they_change_nothing(engine: str) -> None:
    assert torch.equal(scores(adapted(), engine), scores(model(0, sharpness=8.0), engine))


def factors(of: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in of.named_parameters() if ".lora_A." in name}


def test_the_beginning_is_a_function_of_the_seed() -> None:
    first = factors(adapted())
    state = torch.get_rng_state()
    random_state = torch.rand(3)
    again = factors(adapted())
    assert not torch.equal(torch.rand(3), random_state)
    torch.set_rng_state(state)
    adapted()
    assert torch.equal(torch.rand(3), random_state)  # the global random state was not used
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    alone = factors(adapted(("merger",)))
    assert len(alone) == LAYERS["merger"] and all(torch.equal(first[name], alone[name]) for name in alone)
    other = factors(adapted(run={"seed": 1}))
    assert not any(torch.equal(first[name], other[name]) for name in first)
    blocks = [f"model.visual.blocks.{i}.attn.qkv.lora_A.default.weight" for i in range(2)]
    assert not torch.equal(first[blocks[0]], first[blocks[1]])  # every layer has its own
    for name, a in first.items():  # uniform within 1 / sqrt(inputs), a standard deviation of that / sqrt(3)
        bound = a.shape[1] ** -0.5
        assert a.abs().max() <= bound, name
        assert 0.8 < a.std() / (bound / 3**0.5) < 1.2, name


# ------------------------------------------------------------------------------------------------ arithmetic


def test_gradients_follow_from_those_of_the_effective_weight() -> None:
    """With G = dL/d(W + s B A): dL/dB = s G Aᵀ and dL/dA = s Bᵀ G."""
    student = trained()
    got = gradients(student)
    full = model(0, sharpness=8.0)
    expected = {}
    with torch.no_grad():
        pairs = {}
        for name, layer in student.named_modules():
            if hasattr(layer, "lora_A"):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                full.get_submodule(name).weight.add_(SCALE * b @ a)
                pairs[name] = a, b
    of_weight = gradients(full)
    for name, (a, b) in pairs.items():
        g = of_weight[f"{name}.weight"]
        expected[f"{name}.lora_B.default.weight"] = SCALE * g @ a.T
        expected[f"{name}.lora_A.default.weight"] = SCALE * b.T @ g
    assert len(pairs) == sum(LAYERS.values())
    assert_close_gradients(got, {name: gradient.detach() for name, gradient in expected.items()})


def test_the_engines_agree() -> None:
    student = trained()
    assert (scores(student) - scores(model(0, sharpness=8.0))).abs().max() > 0.1
    torch.testing.assert_close(scores(student), scores(student, "plain"), atol=1e-4, rtol=0)
    assert_close_gradients(gradients(student), gradients(student, "plain"))


@pytest.mark.parametrize("recompute", [False, True])
def test_they_train_through_the_prefill_that_was_sampled_from(recompute: bool) -> None:
    student = trained()
    expected = gradients(student, "plain")
    student.zero_grad()
    student.train()
    policy = HFPolicy(student, processor(), "prefix", recompute=recompute)
    prefix = policy.prefill(mixed_prompts(), grad=True)
    policy.sample(prefix, n=2, max_new_tokens=3, temperature=0)
    assert_close_gradients(backward(policy, prefix), expected)


def test_they_train_under_gradient_checkpointing() -> None:
    student = trained()
    expected = gradients(student, "plain")
    new_name = getattr(student, "activation_checkpointing_enable", None)  # not in 5.20
    (new_name or student.gradient_checkpointing_enable)({"use_reentrant": False})
    student.train()
    assert student.model.language_model.layers[0].gradient_checkpointing
    assert_close_gradients(gradients(student), expected)


@pytest.mark.parametrize("parts", EACH_AND_ALL, ids="+".join)
def test_the_merged_model_is_the_adapted_one(parts: tuple[str, ...], tmp_path: Path) -> None:
    student = trained(parts)
    expected = scores(student)
    merged = copy.deepcopy(student)
    merge_adapters(merged)
    save_model_folder(merged, processor(), tmp_path, lora_recipe("run", parts))
    loaded, _ = load_model(tmp_path, dtype="float32")
    assert loaded.state_dict().keys() == model().state_dict().keys()
    assert (scores(loaded) - expected).abs().max() < 1e-5
    assert torch.equal(scores(student), expected)  # the adapted model is unchanged


@pytest.mark.parametrize("parts", [(), *EACH_AND_ALL], ids="+".join)
def test_merged_weights_are_those_of_the_merged_model(parts: tuple[str, ...]) -> None:
    """One after the other, so that no two need memory at once; weights that are one tensor come once."""
    student = trained(parts) if parts else copy.deepcopy(model())
    merged = copy.deepcopy(student)
    merge_adapters(merged)
    expected = merged.state_dict()
    found: dict[str, torch.Tensor] = {}
    for name, tensor in merged_weights(student):
        assert name not in found
        found[name] = tensor.clone()
        del tensor
    tied = {"lm_head.weight"} if merged.config.tie_word_embeddings else set()
    assert set(found) | tied == set(expected)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-7, rtol=1e-6)


def test_a_merge_rounds_once() -> None:
    """The base is bfloat16 and the delta is below its rounding step: only their float32 sum keeps both."""
    student = trained(("language",), model={"dtype": "bfloat16"})
    layer = student.model.language_model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = (layer.weight.double() + SCALE * b @ a).detach()
    in_bf16 = copy.deepcopy(student)
    merge_adapters(student)
    merge_adapters(in_bf16, torch.bfloat16)
    whole, rounded = (m.model.language_model.layers[0].mlp.up_proj.weight for m in (student, in_bf16))
    torch.testing.assert_close(whole.double(), exact, atol=1e-7, rtol=1e-6)
    assert torch.equal(rounded, whole.bfloat16())


# ----------------------------------------------------------------------------------------- files, precision


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    import peft

    student = trained()
    save_adapter(student, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "base")
    by_peft = peft.PeftModel.from_pretrained(model(0, sharpness=8.0), tmp_path)
    assert torch.equal(scores(by_peft.get_base_model()), scores(student))
    by_us = model(0, sharpness=8.0)
    load_adapter(by_us, tmp_path)
    assert torch.equal(scores(by_us), scores(student))
    assert [name for name, p in by_us.named_parameters() if p.requires_grad][:-1] == [
        name for name, p in student.named_parameters() if p.requires_grad
    ]  # what a recipe freezes is not the adapter's matter: lm_head


def test_what_is_trained_in_full_is_saved_beside_them(tmp_path: Path) -> None:
    student = trained(("language",), model={"freeze": ["vision"]})
    with torch.no_grad():
        student.lm_head.weight.add_(1.0)
        student.model.visual.merger.norm.bias.add_(1.0)
    save_adapter(student, tmp_path)
    names = set(load_file(tmp_path / "trained_in_full.safetensors"))
    assert names == {
        n for n, _ in model().named_parameters() if n.startswith((*PREFIXES["merger"], "lm_head"))
    }
    again = model(0, sharpness=8.0)
    load_adapter(again, tmp_path)
    mine, theirs = student.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("damage", ["another model", "half a file", "no weights"])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    from video_opd.world.tiny import build_model

    save_adapter(trained(), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    if damage == "half a file":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no weights":
        weights.unlink()
    other = build_model("tiny") if damage == "another model" else model()
    with pytest.raises(UserError, match="not the same layer" if damage == "another model" else "cannot be"):
        load_adapter(other, tmp_path)


def test_only_what_is_frozen_is_held_in_bfloat16(tmp_path: Path) -> None:
    base = model(0, sharpness=8.0)
    base.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    settings: dict[str, Any] = {"freeze": ["vision"], "path": str(tmp_path), "dtype": "bfloat16"}
    recipe = lora_recipe("run", ("language",), model=settings)
    student, _ = load_student(recipe, tmp_path, torch.device("cpu"))
    for name, parameter in student.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, base.get_buffer(name)), name  # rotary frequencies, above all
    for prefix in (*PREFIXES["merger"], "lm_head."):  # trained in full, and never rounded
        for name, parameter in base.named_parameters():
            assert not name.startswith(prefix) or torch.equal(parameter, student.get_parameter(name))
    in_float32 = factors(adapted(("language",)))
    assert all(torch.equal(in_float32[name], a) for name, a in factors(student).items())

    policy = HFPolicy(student, processor(), compute_dtype=torch.bfloat16)
    optimizer = make_optimizer([p for p in student.parameters() if p.requires_grad], make_recipe_optim())
    for _ in range(2):
        optimizer.zero_grad()
        policy.logprobs(mixed_prompts(), RESPONSES, grad=True).logprobs_BT.sum().backward()
        for name, parameter in student.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        optimizer.step()
    assert all((a != factors(student)[name]).any() for name, a in in_float32.items())


def test_added_to_a_base_in_bfloat16_they_are_float32() -> None:
    """Their first values are those on a float32 base, not rounded."""
    student = model().bfloat16()
    add_adapters(student, LoraConfig(parts=PARTS, rank=4), seed=0)
    assert {p.dtype for name, p in student.named_parameters() if ".lora_" in name} == {torch.float32}
    expected = factors(adapted())
    assert all(torch.equal(expected[name], a) for name, a in factors(student).items())


@pytest.mark.parametrize("recompute", [False, True])
def test_under_autocast_their_input_is_not_copied_in_float32(recompute: bool) -> None:
    """Loss and gradients are, bit by bit, those with peft's own cast, which holds twice as much."""
    student = trained(**{"model": {"dtype": "bfloat16"}})
    layers = [layer for _, layer in adapted_layers(student)]
    given: set[torch.dtype] = set()
    for layer in layers:
        layer.lora_A["default"].register_forward_pre_hook(lambda _, inputs: given.add(inputs[0].dtype))
    policy = HFPolicy(student, processor(), compute_dtype=torch.bfloat16, recompute=recompute)

    def found() -> tuple[set[torch.dtype], torch.Tensor, dict[str, torch.Tensor]]:
        given.clear()
        student.zero_grad()
        scored = policy.logprobs(mixed_prompts(), RESPONSES, grad=True).logprobs_BT
        scored.sum().backward()
        named = student.named_parameters()
        return {*given}, scored.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    dtypes, scored, gradients = found()
    assert dtypes == {torch.bfloat16}
    for layer in layers:
        del layer._cast_input_dtype
    with_cast, expected, of_peft = found()
    assert with_cast == {torch.float32}
    assert torch.equal(scored, expected) and gradients.keys() == of_peft.keys()
    assert all(torch.equal(gradient, of_peft[name]) for name, gradient in gradients.items())
    plain = HFPolicy(student, processor())  # without autocast A is given what it can multiply
    plain.logprobs(mixed_prompts(), RESPONSES)


# -------------------------------------------------------------------------------------------- the reference


def test_the_reference_is_the_student_without_them(tmp_path: Path) -> None:
    student = trained()
    policy = HFPolicy(student, processor())
    reference = load_reference(lora_recipe(tmp_path, PARTS), policy, torch.device("cpu"))
    assert isinstance(reference, AdaptersOffReference) and isinstance(reference, Teacher)
    expected = scores(model(0, sharpness=8.0))
    before = scores(student)
    found = reference.logprobs(mixed_prompts(), RESPONSES, full=True)
    assert found.full_BTV is not None and torch.equal(found.full_BTV, expected)
    assert not found.logprobs_BT.requires_grad
    # and they are on again, and trained
    assert torch.equal(scores(student), before) and not torch.equal(before, expected)
    assert len(gradients(student)) == 2 * sum(LAYERS.values())
    with pytest.raises(RuntimeError, match="stop"), adapters_off(student):
        raise RuntimeError("stop")
    assert torch.equal(scores(student), before)
    with adapters_off(student), pytest.raises(AssertionError, match="another model"), adapters_off(student):
        pass


def test_the_reference_is_a_copy_where_something_is_trained_in_full(tmp_path: Path) -> None:
    base = model(0, sharpness=8.0)
    base.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    settings: dict[str, Any] = {"freeze": [], "path": str(tmp_path)}
    student = trained(("vision",), model=settings)
    with pytest.raises(AssertionError, match="in full"):
        AdaptersOffReference(HFPolicy(student, processor()))
    recipe = lora_recipe("run", ("vision",), model=settings)
    reference = load_reference(recipe, HFPolicy(student, processor()), torch.device("cpu"))
    assert isinstance(reference, LocalTeacher) and reference.policy.model is not student
    with torch.no_grad():
        student.lm_head.weight.mul_(2.0)
    found = reference.logprobs(mixed_prompts(), RESPONSES, full=True).full_BTV
    assert (
        found is not None and (found - scores(base)).abs().max() < 1e-4
    )  # frames in one call, or one by one


def test_a_reference_that_is_not_finite_names_its_sample() -> None:
    student = adapted()
    with torch.no_grad():
        student.model.language_model.embed_tokens.weight[10] = torch.nan
    with pytest.raises(UserError, match="log-probability of response token"):
        AdaptersOffReference(HFPolicy(student, processor())).logprobs(mixed_prompts(), RESPONSES)


# -------------------------------------------------------------------------------------------------- a run


def run_recipe(path: Path, **sections: dict[str, Any]) -> Recipe:
    """Adapters on two parts, the merger in full, lm_head frozen."""
    sections = {"model": {"freeze": ["lm_head"]}, "optim": {"epochs": 2}, **sections}
    return lora_recipe(path, ("language", "vision"), **sections)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(run_recipe(tmp_path_factory.mktemp("undisturbed") / "run"), Build())


def test_a_run_leaves_adapters_and_a_plain_model(undisturbed: RunResult) -> None:
    folder = RunFolder(undisturbed.path)
    saved = find_checkpoints(folder.checkpoints)
    assert [checkpoint.step for checkpoint in saved] == [4, 2]
    for checkpoint in saved:
        assert {path.name for path in checkpoint.path.iterdir()} == {"adapter", "training.pt", "state.json"}
    held = sum(p.numel() for name, p in model().named_parameters() if not name.startswith(PREFIXES["merger"]))
    written = sum(path.stat().st_size for path in saved[0].weights.iterdir())
    assert written < 4 * held  # nothing of the base
    assert all(0 < row["weights/changed"] <= 1 for row in rows_of(folder.metrics))

    base = model(0, sharpness=8.0)
    start_weights, end_weights = base.state_dict(), weights_of(undisturbed.path)
    assert start_weights.keys() == end_weights.keys()
    changed = {name for name in end_weights if not torch.equal(start_weights[name], end_weights[name])}
    layers = (".attn.", ".mlp.", ".self_attn.")
    assert all(
        (name in changed)
        == (
            name.startswith(PREFIXES["merger"])
            or (name.endswith(".weight") and any(kind in name for kind in layers) and "_norm" not in name)
        )
        for name in end_weights
    )
    load_adapter(base, folder.adapter)
    expected = scores(base)
    final, _ = load_model(folder.model, dtype="float32")
    assert (scores(final) - expected).abs().max() < 1e-4
    for name in ("adapter_model.safetensors", "trained_in_full.safetensors"):
        assert (folder.adapter / name).read_bytes() == (saved[0].weights / name).read_bytes()


def test_kills_leave_no_trace(undisturbed: RunResult, tmp_path: Path) -> None:
    recipe = run_recipe(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    run_s = sum(row["time/step_s"] for row in rows_of(undisturbed.path / "metrics.jsonl"))
    draws = random.Random(1)
    for _ in range(2):
        kill_later(start(0, 1, free_port(), recipe, Build()), folder, draws.uniform(0.2, 0.7) * run_s)
    process = start(0, 1, free_port(), recipe, Build())
    process.join()
    assert process.exitcode == 0
    assert_same_run(undisturbed.path, tmp_path / "run")


@pytest.mark.parametrize("left", ["step 2", "all steps", "the model"])
def test_a_run_that_was_cut_off_continues(undisturbed: RunResult, tmp_path: Path, left: str) -> None:
    path = tmp_path / "run"
    shutil.copytree(undisturbed.path, path)
    (path / "done.json").unlink()
    if left != "the model":
        shutil.rmtree(path / "model")
        shutil.rmtree(path / "adapter")
    if left == "step 2":
        shutil.rmtree(path / "checkpoints" / "step-4")
    build = Watched()
    train(run_recipe(path), build)
    assert_same_run(undisturbed.path, path)
    for name in ("adapter_config.json", "adapter_model.safetensors", "trained_in_full.safetensors"):
        mine, theirs = (folder / "adapter" / name for folder in (undisturbed.path, path))
        assert mine.read_bytes() == theirs.read_bytes()
    assert not any(
        ".lora_" in name for name, _ in build.components.model.named_parameters()
    )  # plain, at the end
    assert len(build.sampled) == {"step 2": 4, "all steps": 0, "the model": 0}[left]


class WithCopy(Build):
    """The initial student as a model of its own."""

    def reference(self, recipe: Recipe, accelerator: Any, policy: HFPolicy) -> Teacher:
        return LocalTeacher(HFPolicy(self.base(), processor(), self.engine))


def grpo_recipe(path: Path) -> Recipe:
    return lora_recipe(
        path,
        PARTS,
        method="grpo",
        sampling={"rollouts": 3},
        loss={"kl_beta": 0.5},
        reward={"function": "training_cases:a_reward"},
        optim={"micro_batch_size": 1, "epochs": 2},
    )


def test_a_run_against_the_reference_is_that_against_a_copy(tmp_path: Path) -> None:
    train(grpo_recipe(tmp_path / "off"), Build())
    train(grpo_recipe(tmp_path / "copy"), WithCopy())
    assert_same_run(tmp_path / "off", tmp_path / "copy")
    rows = rows_of(tmp_path / "off" / "metrics.jsonl")
    assert all(row["update/done"] and row["update/grad_norm"] > 0 for row in rows)
    assert rows[-1]["reference_kl/sampled"] > 0


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Between two steps of DDP, adapters are switched off for the reference."""
    train(grpo_recipe(tmp_path / "one"), Build())
    train_on_two(Build(), grpo_recipe(tmp_path / "two"))
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")


def test_the_model_is_saved_in_the_precision_that_was_asked_for(tmp_path: Path) -> None:
    build = Watched()
    recipe = lora_recipe(
        tmp_path / "run",
        ("language",),
        model={"dtype": "bfloat16"},
        optim={"max_steps": 1},
        run={"dir": str(tmp_path / "run"), "save_dtype": "bfloat16"},
    )
    train(recipe, build)
    assert {value.dtype for value in weights_of(tmp_path / "run").values()} == {torch.bfloat16}
    # The evaluation uses the saved model. Rotary frequencies are not weights and keep their precision.
    loaded, _ = load_model(tmp_path / "run" / "model", dtype="bfloat16")
    assert all(torch.equal(b, build.components.model.get_buffer(name)) for name, b in loaded.named_buffers())
    assert torch.equal(scores(loaded), scores(build.components.model))
