"""A teacher equal to its student gives r_t = 0; a broken teacher raises."""

from typing import Any

import pytest
import torch
from model_cases import mixed_prompts, model, processor

from video_opd.errors import UserError
from video_opd.models.interfaces import ChunkedPolicy, Policy, Teacher
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher, RoutedTeacher


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
