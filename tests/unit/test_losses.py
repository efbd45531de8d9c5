"""Eq 6 against loops, finite differences, and exact enumeration: the update lowers the reverse KL."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from video_opd.algorithms.losses import divisor, importance_surrogate
from video_opd.algorithms.signals import reverse_kl, sampled_reverse_kl


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(3, 4, generator=g, dtype=torch.float64)
    old = -torch.rand(3, 4, generator=g, dtype=torch.float64)
    advantage = torch.randn(3, 4, generator=g, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    return logp, old, advantage, mask


def test_the_surrogate_is_eq_6_token_by_token():
    logp, old, advantage, mask = case()
    total = 0.0
    for b in range(3):
        for t in range(4):
            if mask[b, t]:
                ratio = math.exp(logp[b, t]) / math.exp(old[b, t])
                total -= float(advantage[b, t]) * ratio
    assert math.isclose(importance_surrogate(logp, old, advantage, mask, 3.0), total / 3, rel_tol=1e-12)
    assert math.isclose(importance_surrogate(logp, old, advantage, mask, 8.0), total / 8, rel_tol=1e-12)


def test_its_gradient_by_finite_differences_and_only_through_the_current_policy():
    logp, old, advantage, mask = case(1)
    old.requires_grad_(True)
    advantage.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: importance_surrogate(x, old.detach(), advantage.detach(), mask, 3.0),
        logp.clone().requires_grad_(True),
    )
    live = logp.clone().requires_grad_(True)
    importance_surrogate(live, old, advantage, mask, 3.0).backward()
    assert old.grad is None and advantage.grad is None  # sg(r_t), and π_old is a constant
    assert live.grad is not None
    expected = -(advantage * (logp - old).exp()).detach() * mask / 3  # −r_t·ratio_t·∇log π, eq 6
    assert torch.allclose(live.grad, expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(garbage: float):
    logp, old, advantage, mask = case(2)
    clean = importance_surrogate(logp, old, advantage, mask, 3.0)
    live, old, advantage = (torch.where(mask, x, garbage) for x in (logp, old, advantage))
    live.requires_grad_(True)
    loss = importance_surrogate(live, old, advantage, mask, 3.0)
    loss.backward()
    assert torch.equal(loss.detach(), clean)
    assert live.grad is not None and torch.isfinite(live.grad).all()


def test_micro_batches_add_up_to_the_whole():
    logp, old, advantage, mask = case(3)
    for reduction in ("sum", "token_mean"):
        count = divisor([4, 1, 3], reduction)
        whole = importance_surrogate(logp, old, advantage, mask, count)
        parts = sum(
            importance_surrogate(logp[b, None], old[b, None], advantage[b, None], mask[b, None], count)
            for b in range(3)
        )
        assert torch.allclose(whole, torch.as_tensor(parts))


def test_the_divisors():
    assert divisor([4, 1, 3], "sum") == 3.0  # eq 6: mean over trajectories
    assert divisor([4, 1, 3], "token_mean") == 8.0


def softmax_policy(seed: int, vocabulary: int = 4) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_token_the_expected_gradient_is_the_analytic_reverse_kls():
    """Every token of a vocabulary of 4, weighed by its probability: no sampling error is left."""
    logits = softmax_policy(0).requires_grad_(True)
    teacher = softmax_policy(1).log_softmax(-1)
    logp = logits.log_softmax(-1)
    old = logp.detach()
    terms = [
        old[a].exp()
        * importance_surrogate(
            logp[a].view(1, 1),
            old[a].view(1, 1),
            sampled_reverse_kl(teacher[a].view(1, 1), old[a].view(1, 1)),
            torch.ones(1, 1, dtype=torch.bool),
            1.0,
        )
        for a in range(4)
    ]
    (sampled,) = torch.autograd.grad(torch.stack(terms).sum(), logits)
    (analytic,) = torch.autograd.grad(
        reverse_kl(logits.log_softmax(-1).view(1, 1, -1), teacher.view(1, 1, -1)).sum(), logits
    )
    assert torch.allclose(sampled, analytic, atol=1e-12)
    assert sampled.abs().max() > 1e-2  # and it is not zero on both sides


def test_two_tokens_the_expectation_is_the_kl_of_each_visited_state():
    """Discount 0: token 1 is credited with its own state's KL only. The gradient of the KL between whole
    sequences has one more term (an early token decides which state comes next), and differs."""
    vocabulary = 3
    g = torch.Generator().manual_seed(7)
    first = torch.randn(vocabulary, generator=g, dtype=torch.float64).requires_grad_(True)
    second = torch.randn(vocabulary, vocabulary, generator=g, dtype=torch.float64).requires_grad_(True)
    teacher_first = torch.randn(vocabulary, generator=g, dtype=torch.float64).log_softmax(-1)
    teacher_second = torch.randn(vocabulary, vocabulary, generator=g, dtype=torch.float64).log_softmax(-1)

    def logps() -> tuple[torch.Tensor, torch.Tensor]:
        return first.log_softmax(-1), second.log_softmax(-1)

    p1, p2 = logps()
    expected_loss = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(vocabulary), repeat=2):
        logp = torch.stack([p1[a], p2[a, b]]).view(1, 2)
        teacher = torch.stack([teacher_first[a], teacher_second[a, b]]).view(1, 2)
        old = logp.detach()
        probability = old.sum().exp()
        r = sampled_reverse_kl(teacher, old)
        expected_loss = expected_loss + probability * importance_surrogate(
            logp, old, r, torch.ones(1, 2, dtype=torch.bool), 1.0
        )
    sampled = torch.autograd.grad(expected_loss, [first, second])

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    p1, p2 = logps()
    visited = p1.detach().exp()  # how often each second state is reached, as given
    per_state = kl(p1, teacher_first) + (visited * kl(p2, teacher_second)).sum()
    expected = torch.autograd.grad(per_state, [first, second])
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(sampled, expected, strict=True))

    p1, p2 = logps()
    whole_sequence = kl(p1, teacher_first) + (p1.exp() * kl(p2, teacher_second)).sum()
    whole = torch.autograd.grad(whole_sequence, [first, second])
    assert torch.allclose(sampled[1], whole[1], atol=1e-12)
    assert not torch.allclose(sampled[0], whole[0], atol=1e-3)


def test_the_update_moves_towards_the_teacher():
    """Eq 11's printed sign would move away."""
    logits = softmax_policy(3).requires_grad_(True)
    teacher = softmax_policy(4).log_softmax(-1)

    def divergence() -> float:
        with torch.no_grad():
            return float(reverse_kl(logits.log_softmax(-1).view(1, 1, -1), teacher.view(1, 1, -1)))

    before, history = divergence(), []
    optimiser = torch.optim.SGD([logits], lr=0.2)
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        logp = logits.log_softmax(-1)
        old = logp.detach()
        actions = torch.multinomial(old.exp(), 64, replacement=True, generator=g)
        r = sampled_reverse_kl(teacher[actions][:, None], old[actions][:, None])
        mask = torch.ones(64, 1, dtype=torch.bool)
        optimiser.zero_grad()
        importance_surrogate(logp[actions][:, None], old[actions][:, None], r, mask, 64.0).backward()
        optimiser.step()
        history.append(divergence())
    assert history[-1] < 0.05 * before
