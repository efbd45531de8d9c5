"""The signals against the formulas written out as loops, in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.algorithms.signals import entropy, forward_kl, reverse_kl, sampled_reverse_kl


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
    """−inf in one and a large negative number in the other: probability 0 in both."""
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
