"""Qwen3-VL with experts: the same code passes the tests of the dense model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_cases import mixed_prompts, mixture, model, processor, stock_logprobs
from safetensors.torch import load_file
from training_cases import Build, make_recipe, rows_of

from video_opd.config import LoraConfig
from video_opd.models.checkpoint_files import FAMILIES
from video_opd.models.loading import load_model
from video_opd.models.lora import add_adapters
from video_opd.models.patch_embedding import PatchProjection
from video_opd.models.policy import HFPolicy
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.teachers import LocalTeacher
from video_opd.training.loop import train
from video_opd.types import TokenLogprobs

SEEDS = [[10 * i + j for j in range(2)] for i in range(3)]


def policy(engine: Any = "prefix", **options: Any) -> HFPolicy:
    return HFPolicy(mixture(sharpness=20), processor(), engine, **options)


def differentiated(of: HFPolicy) -> tuple[list[list[tuple[int, ...]]], TokenLogprobs]:
    """Responses from one prefill, and their log-probabilities after a backward through it."""
    shown: Any = of.prefill(mixed_prompts(), grad=True) if of.engine == "prefix" else mixed_prompts()
    rollouts = of.sample(shown, n=2, max_new_tokens=7, seeds=SEEDS)
    responses = [[rollout.token_ids for rollout in group] for group in rollouts]
    scored = of.logprobs(shown, responses, grad=True)
    (scored.logprobs_BT * scored.mask_BT).square().sum().backward()
    return responses, scored


def test_each_token_meets_two_experts_and_all_are_used() -> None:
    chosen: list[torch.Tensor] = []
    of = policy()
    gate = of.model.model.language_model.layers[0].mlp.gate
    gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
    of.prefill(mixed_prompts())
    picked = torch.cat(chosen)
    assert picked.shape[1] == 2 and picked.unique().tolist() == [0, 1, 2, 3]


def test_both_engines_agree_with_the_stock_model() -> None:
    plain = policy("plain")
    responses, expected = differentiated(plain)
    flat = [tokens for group in responses for tokens in group]
    for row, prompt in enumerate(prompt for prompt in mixed_prompts() for _ in range(2)):
        stock = stock_logprobs(mixture(sharpness=20), prompt, flat[row])
        stock = stock.gather(-1, torch.tensor(flat[row])[:, None])[:, 0]
        torch.testing.assert_close(
            expected.logprobs_BT[row, : len(flat[row])].detach(), stock, atol=1e-4, rtol=0
        )
    for recompute in (False, True):
        prefix = policy(recompute=recompute)
        said, got = differentiated(prefix)
        assert said == responses
        torch.testing.assert_close(got.logprobs_BT, expected.logprobs_BT, atol=1e-4, rtol=0)
        weights = zip(prefix.model.named_parameters(), plain.model.parameters(), strict=True)
        for (name, mine), theirs in weights:
            assert (mine.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm(), name


def test_a_run_leaves_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", optim={"max_steps": 2})
    run = train(recipe, Build(student=mixture))
    assert all(row["weights/changed"] > 0.5 for row in rows_of(run.path / "metrics.jsonl"))
    loaded, _ = load_model(run.model, dtype="float32")
    assert isinstance(loaded, transformers.Qwen3VLMoeForConditionalGeneration)
    assert isinstance(loaded.model.visual.patch_embed.proj, PatchProjection)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(run.model)
    on_disk = load_file(run.model / "model.safetensors")
    for name, weight in loaded.state_dict().items():  # the hub's layout: [experts, in, out]
        if "experts" in name:
            assert weight.shape[1] != weight.shape[2]
            assert torch.equal(on_disk[name], weight.transpose(1, 2)), name
        else:
            assert torch.equal(on_disk[name], weight), name
    assert on_disk.keys() == loaded.state_dict().keys()
    config = json.loads((run.model / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert config["text_config"]["num_experts"] == 4
    rope = config["text_config"]["rope_parameters"]
    again = config["text_config"]["rope_scaling"] | {"rope_theta": config["text_config"]["rope_theta"]}
    assert again == rope == loaded.config.text_config.rope_parameters
    before = mixture().state_dict()
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    experts = [name for name in before if "experts" in name]
    assert experts and all(not torch.equal(before[name], stock.state_dict()[name]) for name in experts)


def test_a_dense_student_learns_from_a_teacher_with_experts(tmp_path: Path) -> None:
    teacher = mixture(1, sharpness=8)
    check_same_tokens((model(), processor()), (teacher, processor()))

    class Taught(Build):
        def __call__(self, *given: Any) -> Any:
            components = super().__call__(*given)
            return replace(components, teacher=LocalTeacher(HFPolicy(teacher, processor(), self.engine)))

    runs = [train(make_recipe(tmp_path / b.engine, optim={"max_steps": 2}, model={"engine": b.engine}), b)
            for b in (Taught(engine="prefix"), Taught(engine="plain"))]  # fmt: skip
    one, other = (rows_of(run.path / "metrics.jsonl") for run in runs)
    assert [row["reverse_kl/sampled"] for row in one] == pytest.approx(
        [row["reverse_kl/sampled"] for row in other], rel=1e-4
    )
    said = LocalTeacher(HFPolicy(teacher, processor())).logprobs(mixed_prompts(), [[(9, 10)]] * 3)
    assert said.logprobs_BT.isfinite().all()


def test_adapters_leave_experts_as_they_are() -> None:
    adapted = mixture()
    add_adapters(adapted, LoraConfig(parts=("language",), rank=4), seed=0)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any("self_attn.q_proj.lora_A" in name for name in trained)
    assert not any("experts" in name or "gate" in name for name in trained)


def test_every_family_is_a_class_of_transformers() -> None:
    for name in FAMILIES.values():
        assert hasattr(transformers, name)
