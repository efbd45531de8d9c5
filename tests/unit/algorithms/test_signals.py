"""The signals against the formulas written out as loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.algorithms.signals import (
    entropy,
    forward_kl,
    group_advantages,
    kl_baseline,
    reverse_kl,
    sampled_reverse_kl,
    scaled_reverse_kl,
)


def random_logp(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def test_eq_5_has_the_teachers_log_prob_first_and_no_gradient():
    teacher = torch.tensor([[-1.0, -2.0]])
    old = torch.tensor([[-3.0, -0.5]], requires_grad=True)
    r = sampled_reverse_kl(teacher, old)
    assert r.tolist() == [[2.0, -1.5]]  # the teacher likes the first token better than the student does
    assert not r.requires_grad


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(2, 9))
def test_reverse_kl_is_the_sum_over_the_vocabulary(seed: int, vocabulary: int):
    p, q = random_logp(2, 3, vocabulary, seed=seed), random_logp(2, 3, vocabulary, seed=seed + 1)
    measured = reverse_kl(p, q)
    for b in range(2):
        for t in range(3):
            by_hand = sum(
                math.exp(p[b, t, v]) * math.log(math.exp(p[b, t, v]) / math.exp(q[b, t, v]))
                for v in range(vocabulary)
            )
            assert math.isclose(measured[b, t], by_hand, rel_tol=1e-9, abs_tol=1e-12)
            assert measured[b, t] >= -1e-12
    assert torch.allclose(reverse_kl(p, p), torch.zeros(2, 3, dtype=torch.float64))


def test_reverse_kl_agrees_with_torch_and_is_not_the_forward_kl():
    p, q = random_logp(4, 5, 7, seed=3), random_logp(4, 5, 7, seed=4)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert torch.allclose(reverse_kl(p, q), expected)
    assert not torch.allclose(reverse_kl(q, p), expected, rtol=1e-2)


def test_forbidden_tokens_add_nothing_to_value_or_gradient():
    logits = torch.tensor([[[0.3, -1.0, 0.7, 0.1]]], dtype=torch.float64, requires_grad=True)
    forbidden = torch.tensor([False, False, True, True])
    p = logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)
    q = random_logp(1, 1, 4, seed=5)
    q_same = q.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)  # and impossible for both
    kl = reverse_kl(p, q_same)
    kl.sum().backward()
    p, kl = p.detach(), kl.detach()
    kept = [0, 1]
    by_hand = sum(math.exp(p[0, 0, v]) * float(p[0, 0, v] - q[0, 0, v]) for v in kept)
    assert math.isclose(float(kl), by_hand, rel_tol=1e-12)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert math.isclose(float(entropy(p)), -sum(math.exp(p[0, 0, v]) * float(p[0, 0, v]) for v in kept))


def test_a_token_the_teacher_cannot_write_costs_infinitely_much():
    p = torch.tensor([[[0.5, 0.5]]]).log()
    q = torch.tensor([[[1.0, 0.0]]]).log()
    assert reverse_kl(p, q).item() == math.inf


def test_entropy_is_that_of_torch():
    p = random_logp(3, 4, 6, seed=9)
    assert torch.allclose(entropy(p), torch.distributions.Categorical(logits=p).entropy())
    uniform = torch.full((1, 1, 8), math.log(1 / 8))
    assert math.isclose(float(entropy(uniform)), math.log(8), rel_tol=1e-6)


def test_forbidden_tokens_may_be_written_differently_by_the_two_models():
    """One model holds −inf and the other a large negative number: the probability is 0 in both."""
    p, q = torch.tensor([[[0.0, -1e30, -math.inf]]]), torch.tensor([[[0.0, -math.inf, -1e30]]])
    p.requires_grad_(True)
    kl = reverse_kl(p, q)
    kl.sum().backward()
    assert kl.item() == 0.0 and p.grad is not None
    assert p.grad.tolist() == [[[1.0, 0.0, 0.0]]]  # d(p log p) at p = 1
    assert forward_kl(p, q).item() == 0.0


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(2, 9))
def test_forward_kl_is_weighed_by_the_teacher(seed: int, vocabulary: int):
    p, q = random_logp(2, 3, vocabulary, seed=seed), random_logp(2, 3, vocabulary, seed=seed + 1)
    measured = forward_kl(p, q)
    for b in range(2):
        for t in range(3):
            by_hand = math.fsum(
                math.exp(y) * (y - x) for x, y in zip(p[b, t].tolist(), q[b, t].tolist(), strict=True)
            )
            assert math.isclose(measured[b, t].item(), by_hand, rel_tol=1e-10, abs_tol=1e-12)


# --- G-OPD -------------------------------------------------------------------------------------------


def test_the_scaled_signal_token_by_token():
    teacher, old, reference = (random_logp(3, 4, seed=seed) for seed in (21, 22, 23))
    old.requires_grad_(True)
    with_reference = scaled_reverse_kl(teacher, old, 1.25, reference)
    without = scaled_reverse_kl(teacher, old, 1.25)
    for b in range(3):
        for t in range(4):
            x, y, z = (tensor[b, t].item() for tensor in (teacher, old, reference))
            assert math.isclose(with_reference[b, t], 1.25 * (x - z) - (y - z), rel_tol=1e-10, abs_tol=1e-12)
            assert math.isclose(without[b, t], 1.25 * x - y, rel_tol=1e-10, abs_tol=1e-12)
    assert not with_reference.requires_grad and not without.requires_grad


def test_a_scale_of_one_is_eq_5_to_the_bit_whatever_the_reference():
    teacher, old = random_logp(3, 4, seed=27).float(), random_logp(3, 4, seed=28).float()
    expected = sampled_reverse_kl(teacher, old)
    assert torch.equal(scaled_reverse_kl(teacher, old, 1.0), expected)
    assert torch.equal(scaled_reverse_kl(teacher, old, 1.0, torch.full((3, 4), math.nan)), expected)


def test_the_scaled_signal_goes_to_eq_5_as_the_scale_goes_to_one():
    teacher, old, reference = (random_logp(3, 4, seed=seed) for seed in (24, 25, 26))
    near = scaled_reverse_kl(teacher, old, 1 + 1e-9, reference)
    assert torch.allclose(near, sampled_reverse_kl(teacher, old), atol=1e-8)


def test_the_optimum_of_a_scaled_signal_lies_past_the_teacher():
    """At π ∝ π_ref (π_tea/π_ref)^λ all tokens have the same r_t, so nothing is left to gain."""
    teacher, reference = random_logp(1, 1, 5, seed=31), random_logp(1, 1, 5, seed=32)
    past = (reference + 1.5 * (teacher - reference)).log_softmax(-1)
    r = scaled_reverse_kl(teacher[0], past[0], 1.5, reference[0])
    assert torch.allclose(r, r[0, 0].expand_as(r), atol=1e-12)
    at_teacher = scaled_reverse_kl(teacher[0], teacher[0], 1.5, reference[0])
    assert at_teacher.max() - at_teacher.min() > 0.1


# --- the control variate, and groups -----------------------------------------------------------------


def test_the_baseline_is_the_mean_signal_of_each_state():
    student, teacher = random_logp(2, 3, 5, seed=41).requires_grad_(True), random_logp(2, 3, 5, seed=42)
    baseline = kl_baseline(student, teacher)
    assert not baseline.requires_grad
    for b in range(2):
        for t in range(3):
            p, q = student[b, t].tolist(), teacher[b, t].tolist()
            mean = math.fsum(math.exp(x) * (y - x) for x, y in zip(p, q, strict=True))
            assert math.isclose(baseline[b, t].item(), mean, rel_tol=1e-10)
            assert mean < 0


def test_advantages_by_hand():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    centred = [-0.5, 0.5, 0.5, -0.5, -0.3, -0.1, 0.1, 0.3]
    assert group_advantages(rewards, 4, False).tolist() == pytest.approx(centred, rel=1e-12)
    # Unbiased: √(4·0.25/3) and √((2·0.09 + 2·0.01)/3).
    stds = [math.sqrt(1 / 3)] * 4 + [math.sqrt(0.2 / 3)] * 4
    expected = [c / (s + 1e-4) for c, s in zip(centred, stds, strict=True)]
    assert group_advantages(rewards, 4, True).tolist() == pytest.approx(expected, rel=1e-12)


def test_advantages_are_trls():
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rewards.requires_grad_(True)
    mean = rewards.view(-1, 8).mean(dim=1).repeat_interleave(8)
    std = torch.std(rewards.view(-1, 8), dim=1).repeat_interleave(8)
    measured = group_advantages(rewards, 8, True)
    assert not measured.requires_grad
    assert torch.allclose(measured, (rewards - mean) / (std + 1e-4), rtol=1e-12)


@pytest.mark.parametrize("normalise_std", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_says_nothing(normalise_std: bool, dtype: torch.dtype):
    rewards = torch.tensor([0.1] * 7 + [0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0], dtype=dtype)
    advantages = group_advantages(rewards, 7, normalise_std)
    assert (advantages[:7] == 0).all()  # exactly, though the mean of seven tenths may be rounded
    assert (advantages[8:10] != 0).all() and abs(advantages[7:].sum()) < 1e-5


@pytest.mark.parametrize("rollouts", [0, 1])
def test_a_group_needs_company(rollouts: int):
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.tensor([0.5]), rollouts, True)
