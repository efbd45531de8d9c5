"""A teacher equal to its student gives r_t = 0; a broken teacher raises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import mixed_prompts, model, processor

from video_opd.config import LoraConfig
from video_opd.errors import UserError
from video_opd.models.interfaces import ChunkedPolicy, Policy, Teacher
from video_opd.models.lora import (
    adapter_weights,
    add_adapters,
    add_frozen_adapter,
    has_adapters,
    merge_adapters,
    save_adapter,
)
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import AdapterTeacher, LocalTeacher, RoutedTeacher


def test_self_distillation_is_zero_on_every_token() -> None:
    student = HFPolicy(model(sharpness=20), processor())
    teacher = LocalTeacher(HFPolicy(model(sharpness=20), processor()))
    prompts = mixed_prompts()
    rollouts = student.sample(prompts, n=2, max_new_tokens=10, seeds=[[1, 2], [3, 4], [5, 6]])
    scores = teacher.logprobs(prompts, [[r.token_ids for r in group] for group in rollouts], full=True)
    old = [r.recorded for group in rollouts for r in group]
    for row, logprobs in enumerate(old):
        r_T = scores.logprobs_BT[row, : len(logprobs)] - torch.tensor(logprobs)  # eq 5
        assert r_T.abs().max() < 1e-4
        assert scores.mask_BT[row].sum() == len(logprobs)
    own = student.logprobs(prompts, [[r.token_ids for r in group] for group in rollouts], full=True)
    assert own.full_BTV is not None and scores.full_BTV is not None
    divergence_BT = (own.full_BTV.exp() * (own.full_BTV - scores.full_BTV)).sum(-1)
    assert divergence_BT.abs().max() < 1e-5  # and not NaN where a token is forbidden


def test_another_teacher_disagrees() -> None:
    prompts = mixed_prompts()[:1]
    student = HFPolicy(model(0, sharpness=20), processor())
    teacher = LocalTeacher(HFPolicy(model(1, sharpness=20), processor()))
    ((rollout,),) = student.sample(prompts, max_new_tokens=6, seeds=[[0]])
    r_T = teacher.logprobs(prompts, [[rollout.token_ids]]).logprobs_BT[0] - torch.tensor(rollout.logprobs)
    assert r_T.abs().max() > 1


def test_it_is_frozen() -> None:
    policy = HFPolicy(model().train(), processor())
    teacher = LocalTeacher(policy)
    assert not any(p.requires_grad for p in policy.model.parameters()) and not policy.model.training
    assert not teacher.logprobs(mixed_prompts()[:1], [[[9, 10]]]).logprobs_BT.requires_grad
    assert isinstance(teacher, Teacher) and isinstance(policy, ChunkedPolicy) and isinstance(policy, Policy)


def broken_teacher(nonfinite: str) -> LocalTeacher:
    policy = HFPolicy(model(), processor())
    teacher = LocalTeacher(policy, nonfinite=nonfinite)  # type: ignore[arg-type]
    with torch.no_grad():  # every position from token 10 on is NaN
        policy.model.get_input_embeddings().weight[10] = torch.nan
    return teacher


def test_a_score_that_is_not_finite_names_its_sample() -> None:
    prompts = mixed_prompts()[:2]
    with pytest.raises(UserError, match=rf"sample '{prompts[1].sample_id}'.*token 1 is nan.*nonfinite"):
        broken_teacher("raise").logprobs(prompts, [[[9, 11, 12]], [[10, 9, 12]]])


def test_a_score_that_is_not_finite_can_be_masked() -> None:
    scores = broken_teacher("mask").logprobs(mixed_prompts()[:2], [[[9, 11, 12]], [[10, 9, 12]]], full=True)
    assert scores.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert scores.logprobs_BT.isfinite().all() and scores.full_BTV is not None
    assert scores.full_BTV.isfinite().all() and scores.logprobs_BT[1, 1] == 0


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="nonfinite"):
        LocalTeacher(HFPolicy(model(), processor()), nonfinite="ignore")  # type: ignore[arg-type]


def test_each_prompt_is_scored_by_its_own_teacher() -> None:
    """With responses of different numbers and lengths, each row is what its teacher gives alone."""
    prompts = [*mixed_prompts(), *mixed_prompts()[:1]]
    responses: list[list[tuple[int, ...]]] = [
        [(9, 10), (11,)],
        [(12, 13, 14, 15)],
        [(9,), (10, 11, 12)],
        [(20, 21)],
    ]
    teachers = {name: LocalTeacher(HFPolicy(model(seed), processor())) for seed, name in enumerate("ab")}
    names = iter("abab")
    assigned = [next(names) for _ in prompts]
    calls: list[str] = []

    def route(prompt: Any) -> str:
        calls.append(assigned[len(calls)])
        return calls[-1]

    routed = RoutedTeacher(teachers, route).logprobs(prompts, responses, full=True)
    row = 0
    for prompt, group, name in zip(prompts, responses, assigned, strict=True):
        alone = teachers[name].logprobs([prompt], [group], full=True)
        assert alone.full_BTV is not None and routed.full_BTV is not None
        for b, tokens in enumerate(group):
            n = len(tokens)
            assert routed.mask_BT[row].sum() == n
            torch.testing.assert_close(
                routed.logprobs_BT[row, :n], alone.logprobs_BT[b, :n], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(routed.full_BTV[row, :n], alone.full_BTV[b, :n], atol=1e-4, rtol=1e-5)
            row += 1
    assert row == len(routed.mask_BT)


# --------------------------------------------------------------------------- an adapter on the student's base

RESPONSES: Any = [[(9, 10, 11), (12,)], [(13, 14)], [(9, 15, 16, 17)]]


def adapted(parts: Any, seed: int) -> Any:
    """The base with an adapter that training might have made; everything else is frozen."""
    made = model(0, sharpness=8.0)
    add_adapters(made, LoraConfig(parts=parts, rank=4, alpha=8.0), seed, base="base")
    factors = adapter_weights(made)
    made.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator)).requires_grad_(True)
    return made


def distributions(teacher: Any) -> torch.Tensor:
    found = teacher.logprobs(mixed_prompts(), RESPONSES, full=True).full_BTV
    assert found is not None
    return found


def test_an_adapter_on_the_students_base_is_the_merged_model(tmp_path: Path) -> None:
    """The student's adapter and the teacher's are on layers that overlap, and neither knows the other."""
    theirs, student = adapted(("merger", "language"), 7), adapted(("vision", "language"), 3)
    save_adapter(theirs, tmp_path / "theirs")
    save_adapter(student, tmp_path / "before")
    merge_adapters(theirs)
    policy = HFPolicy(student, processor())
    before, trained = distributions(policy), {n for n, p in student.named_parameters() if p.requires_grad}

    add_frozen_adapter(student, tmp_path / "theirs", "teacher0")
    teacher = AdapterTeacher(policy, "teacher0")
    found, expected = distributions(teacher), distributions(LocalTeacher(HFPolicy(theirs, processor())))
    assert isinstance(teacher, Teacher) and not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.1

    assert torch.equal(distributions(policy), before)
    assert {n for n, p in student.named_parameters() if p.requires_grad} == trained
    save_adapter(student, tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()
    merge_adapters(student)
    assert not has_adapters(student)
    merged = adapted(("vision", "language"), 3)
    merge_adapters(merged)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in merged.state_dict().items())


def test_its_turn_leaves_the_graph_of_the_student_alone(tmp_path: Path) -> None:
    """A step prefills with a graph, asks the teacher, and differentiates."""
    save_adapter(adapted(("language",), 7), tmp_path)

    def gradients(ask: bool) -> dict[str, torch.Tensor]:
        student = adapted(("language",), 3)
        add_frozen_adapter(student, tmp_path, "teacher0")
        policy = HFPolicy(student, processor())
        prefix = policy.prefill(mixed_prompts(), grad=True)
        if ask:
            AdapterTeacher(policy, "teacher0").logprobs(mixed_prompts(), RESPONSES)
        policy.logprobs(prefix, RESPONSES, grad=True).logprobs_BT.sum().backward()
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    alone, asked = gradients(False), gradients(True)
    assert len(alone) == 2 * 14 and alone.keys() == asked.keys()  # seven layers in each of two blocks
    assert all(torch.equal(asked[name], gradient) for name, gradient in alone.items())
