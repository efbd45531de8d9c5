"""Video-OPD on real tiny models: its signal, its loss, and the checks around them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_cases import encode, model, processor
from training_cases import sample

from video_opd.algorithms.method import Trajectories
from video_opd.algorithms.video_opd import VideoOPD
from video_opd.config import OnPolicySamplingConfig
from video_opd.errors import UserError
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.training.batches import Row
from video_opd.training.loss_batch import check_ratio, distance, make_trajectories, without_nonfinite
from video_opd.types import Rollout, TokenLogprobs


def rollout(*logprobs: float) -> Rollout:
    return Rollout(token_ids=tuple(range(len(logprobs))), logprobs=logprobs, text="", truncated=False)


def scores(values: list[list[float]], lengths: list[int]) -> TokenLogprobs:
    logprobs = torch.tensor(values)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(lengths)[:, None]
    return TokenLogprobs(logprobs_BT=torch.where(mask, logprobs, 0.0), mask_BT=mask)


PROMPT = encode("when does the red circle appear?")
ROWS = [Row(position=i, sample=sample(i), prompt=PROMPT) for i in range(2)]
GROUPS = [[rollout(-1.0, -2.0)], [rollout(-0.5)]]


def test_signal_and_loss_by_hand():
    student = scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1])
    teacher = scores([[-2.0, -0.5], [-0.25, 0.0]], [2, 1])
    batch = make_trajectories(ROWS, GROUPS, student, teacher)
    method = VideoOPD(OnPolicySamplingConfig())
    signal = method.signal(batch)
    assert signal.token_reward_BT is signal.advantage_BT is not None
    assert signal.advantage_BT.tolist() == [[-1.0, 1.5], [0.25, 0.0]]
    loss = method.loss(student, batch, signal, divisor=2.0)
    assert math.isclose(loss.item(), -(-1.0 + 1.5 + 0.25) / 2)


def test_one_step_on_tiny_models_has_the_gradient_of_eq_6():
    """The gradient of the method equals Σ −r_t·∇log π_θ(a_t), with r_t from two stock forwards."""
    student, teacher = model(0, sharpness=4.0), model(1, sharpness=4.0)
    policy = HFPolicy(student, processor())
    method = VideoOPD(OnPolicySamplingConfig(max_new_tokens=4, rollouts=2))
    ((a, b),) = groups = method.trajectories(policy, [PROMPT], [sample(0)], [[1, 2]])
    responses = [[a.token_ids, b.token_ids]]
    scored = policy.logprobs([PROMPT], responses, grad=True)
    scored_by_teacher = LocalTeacher(HFPolicy(teacher, processor())).logprobs([PROMPT], responses)
    batch = make_trajectories(ROWS[:1], groups, scored, scored_by_teacher)
    check_ratio(batch, scored, 1e-3)
    method.loss(scored, batch, method.signal(batch), 2.0).backward()
    ours = student.lm_head.weight.grad.clone()

    student.zero_grad()
    for written in (a, b):
        tokens = torch.tensor([written.token_ids])

        def logp(net: Any, tokens: torch.Tensor = tokens) -> torch.Tensor:
            types = torch.cat([PROMPT.tensors["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
            out = net(
                input_ids=torch.cat([PROMPT.input_ids, tokens], dim=1),
                **{**PROMPT.tensors, "mm_token_type_ids": types},
            )
            logits = out.logits[:, PROMPT.length - 1 : -1, : policy.vocabulary.size]
            logits = logits + policy.vocabulary.logit_bias(logits.device)
            return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

        with torch.no_grad():
            r = logp(teacher) - logp(student)
        (-(r * logp(student)).sum() / 2.0).backward()
    assert torch.allclose(ours, student.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
    assert ours.abs().max() > 1e-3


def test_what_the_teacher_masked_is_masked():
    student = scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1])
    teacher = TokenLogprobs(
        logprobs_BT=torch.zeros(2, 2), mask_BT=torch.tensor([[True, False], [True, False]])
    )
    batch = make_trajectories(ROWS, GROUPS, student, teacher)
    assert batch.mask_BT.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("which", "who"),
    [("student", "the student's"), ("old", "the student's recorded"), ("teacher", "the teacher's")],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_numbers_that_are_not_finite(which: str, who: str, value: float):
    student, teacher = (
        scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1]),
        scores([[-1.0, -1.0], [-1.0, 0.0]], [2, 1]),
    )
    groups = GROUPS
    if which == "old":
        groups = [GROUPS[0], [rollout(value)]]
    else:
        (student if which == "student" else teacher).logprobs_BT[1, 0] = value
    batch = make_trajectories(ROWS, groups, student, teacher)
    with pytest.raises(UserError, match=f"sample 's1': {who} log-prob of response token 0"):
        without_nonfinite(batch, student, "raise")
    masked = without_nonfinite(batch, student, "mask")
    assert masked.mask_BT.tolist() == [[True, True], [False, False]]
    method = VideoOPD(OnPolicySamplingConfig())
    assert math.isclose(method.loss(student, masked, method.signal(masked), 2.0).item(), -(0.0 + 1.0) / 2)


def test_a_ratio_off_one_names_the_token():
    student = scores([[-1.0, -2.5], [-0.5, 0.0]], [2, 1])
    batch: Trajectories = make_trajectories(ROWS, GROUPS, student, None)
    with pytest.raises(AssertionError, match=r"sample 's0': .* is 0\.5 nats at response token 1 right"):
        check_ratio(batch, student, 0.4)
    check_ratio(batch, student, 0.6)


@pytest.mark.parametrize(
    ("off", "found"),
    [
        ([0.45] + [0.0] * 11, 0.09),  # a fifth of the largest
        ([0.15] * 12, 0.15),  # the mean
        ([0.2, 0.2, 0.2], 0.6 / 8),  # the mean of at least eight
        ([3.0] + [0.0] * 11, 0.6),
    ],
)
def test_in_low_precision_a_responses_tokens_are_judged_together(off: list[float], found: float):
    """Rounding puts single tokens far off; a mistake shifts many of them, or one by nats. Another response of
    the same sample, which is right, makes up for nothing."""
    length = len(off)
    student = scores([[-2.0] * length, [-1.0 - by for by in off]], [length, length])
    groups = [[rollout(*[-2.0] * length), rollout(*[-1.0] * length)]]
    batch = make_trajectories(ROWS[:1], groups, student, None)
    check_ratio(batch, student, found + 1e-6, low_precision=True)
    with pytest.raises(
        AssertionError, match=rf"sample 's0': .* is {max(off):g} nats at response token 0, .* on the average"
    ):
        check_ratio(batch, student, found - 1e-6, low_precision=True)


@pytest.mark.parametrize("gaps", [[0.0, math.nan], [math.nan, 0.0]])
@pytest.mark.parametrize("low_precision", [False, True])
def test_a_gap_that_is_no_number_is_not_passed_over(gaps: list[float], low_precision: bool):
    assert math.isnan(distance(gaps, low_precision=low_precision))


def test_a_method_without_a_teacher_says_so():
    batch = make_trajectories(ROWS, GROUPS, scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1]), None)
    with pytest.raises(AssertionError, match="needs the teacher"):
        VideoOPD(OnPolicySamplingConfig()).signal(batch)
