"""What a plan reads from a recipe is what training does with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_cases import PAIR, paper

from video_opd.algorithms.registry import make_method
from video_opd.models.checkpoint_files import FULL_WEIGHTS
from video_opd.models.chunk_sizes import CACHE_ROOM
from video_opd.planning.memory import Memory, memory_of
from video_opd.planning.setup import Setup, Work, why_not_shared

ALONE = {"run": {"analytic_kl": False}}  # the metrics, too, need whole distributions


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("video-opd", {}),
        ("video-opd", {"teacher": {"reward_scale": 1.5}}),
        ("video-opd", {"loss": {"baseline": "kl"}}),
        ("video-opd", {"loss": {"estimator": "full"}}),
        ("video-opd", {"loss": {"estimator": "topk"}}),
        ("grpo", {}),
        ("grpo", {"loss": {"kl_beta": 0.1}}),
        ("op-rkd", {}),
        ("op-rkd", {"teacher": {"reward_scale": 2.0}}),
        ("op-fkd", {}),
        ("sft", {}),
    ],
)
def test_the_models_and_distributions_are_those_that_the_method_asks_for(
    method: str, sections: dict[str, Any]
) -> None:
    if method in ("grpo", "sft"):
        sections = {**sections, "teacher": {"path": ""}}
    recipe = paper(method, **ALONE, **sections)
    needs = make_method(recipe, SimpleNamespace(eos_token_id=0)).needs
    setup = Setup.of(recipe, 8)
    assert (setup.has_teacher, setup.reference) == (needs.teacher, needs.reference)
    assert setup.distributions == needs.distributions


def memory(sections: dict[str, Any], **settings: Any) -> Memory:
    recipe = paper(**sections)
    setup = replace(Setup.of(recipe), teacher_placement="whole", recompute=True, **settings)
    return memory_of(PAIR.student, PAIR.teachers, setup, Work.of(recipe, None))


def test_sampling_ahead_is_planned_with_its_own_number_of_prompts_and_without_a_graph() -> None:
    def sampling(size: int | None) -> dict[str, int]:
        return dict(memory({"sampling": {"micro_batch_size": size}}).phases["sampling"])

    with_update, one, four = sampling(None), sampling(1), sampling(4)
    assert one["decoder"] < with_update["decoder"] and one["vision"] < with_update["vision"]
    for part in ("decoder", "vision", "caches"):
        assert four[part] == pytest.approx(4 * one[part], rel=1e-3)
    assert one["caches"] == with_update["caches"]  # the prompt's keys and values, and sampling's copy of them


def test_long_responses_have_the_room_that_their_cache_grows_to() -> None:
    """A cache grows by a fixed number of tokens at a time, as often as a response needs it."""
    from video_opd.models.kv_cache import GrowingLayer

    text, prompt = PAIR.student.text, 3
    growths = {}
    for tokens in (1, 64, 65, 200):
        layer = GrowingLayer(torch.zeros(1, 1, prompt, 1), torch.zeros(1, 1, prompt, 1), CACHE_ROOM)
        with torch.no_grad():
            for _ in range(tokens):
                layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
        growths[tokens] = layer._keys.shape[-2] - prompt
    caches = {
        tokens: memory({"sampling": {"max_new_tokens": tokens}}).phases["sampling"]["caches"]
        for tokens in growths
    }
    a_token = text.layers * 2 * text.keys * 4  # keys and values, which autocast leaves in float32
    for tokens, growth in growths.items():
        assert caches[tokens] - caches[1] == (growth - growths[1]) * a_token


def test_a_teacher_and_a_reference_that_visit_the_device_are_there_together() -> None:
    sections: dict[str, Any] = {"teacher": {"reward_scale": 1.5}, "sampling": {"micro_batch_size": 1}}
    whole = memory(sections).phases["teacher"]
    visiting = replace(Setup.of(paper(**sections)), teacher_placement="cpu", recompute=True)
    work = Work.of(paper(**sections), None)
    phases = memory_of(PAIR.student, PAIR.teachers, visiting, work).phases
    for part in ("teacher", "reference"):
        assert phases["teacher"][part] == whole[part] > 0
        assert part not in phases["optimiser"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"model.freeze": []}, "base is trained"),
        ({"model.sharding": "fsdp2"}, "in shards"),
        ({"model.path": "Qwen/Qwen3-VL-4B-Instruct"}, "belongs to Qwen/Qwen3-VL-8B-Instruct"),
        ({"teacher.placement": "cpu"}, "teacher.placement is cpu"),
        ({"teacher.dtype": "float32"}, "teacher.dtype is float32"),
        ({"teacher.quantization": "int8"}, "teacher.quantization"),
    ],
)
def test_an_adapter_shares_the_students_base_or_there_is_a_reason(
    changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    config = {"base_model_name_or_path": "Qwen/Qwen3-VL-8B-Instruct", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    recipe = paper(
        lora={"parts": ["vision", "merger", "language"]},
        model={"freeze": ["lm_head"], "sharding": None},
        teacher={"path": str(tmp_path)},
    ).changed(**changes)
    found = why_not_shared(recipe, str(tmp_path))
    assert found is None if reason is None else reason in str(found)
    assert Setup.of(recipe).teacher_is_adapter is (reason is None)
    other = recipe.changed(**{"teacher.by_source": {"a": "Qwen/Qwen3-VL-8B-Instruct"}})
    assert not Setup.of(other).teacher_is_adapter  # a second teacher has weights of its own
    (tmp_path / FULL_WEIGHTS).touch()
    if reason is None:
        assert "trained in full" in str(why_not_shared(recipe, str(tmp_path)))
    assert not Setup.of(recipe).teacher_is_adapter


def test_gradients_of_the_responses_wait_where_the_backward_is_not_cut() -> None:
    """Beside those of earlier micro-batches: as many numbers as the decoder has trained weights."""
    recipe = paper(model={"sharding": None, "freeze": ["vision", "merger"]}, optim={"batch_size": 2})
    setup = replace(Setup.of(recipe), teacher_placement="whole")
    work = Work.of(recipe, None)
    assert work.micro_batches == 2

    def gradients(*, recompute: bool, processes: int = 1) -> int:
        held = replace(setup, processes=processes, recompute=recompute)
        found = memory_of(PAIR.student, PAIR.teachers, held, work)
        return found.phases["backward, last layer"]["gradients"]

    waiting = 4 * PAIR.student.parts["language"].count
    assert gradients(recompute=False) == gradients(recompute=True) + waiting
    assert gradients(recompute=True, processes=2) == gradients(recompute=True) + waiting  # DDP
