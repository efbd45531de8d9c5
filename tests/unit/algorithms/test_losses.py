"""Every loss and its gradient against loops written from the equations, finite differences, and exact
enumeration. Enumeration also shows that the update lowers the reverse KL."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.algorithms.losses import (
    forward_kl_loss,
    importance_surrogate,
    is_clipped,
    k3_penalty,
    loss_divisor,
    negative_log_likelihood,
    reverse_kl_loss,
    topk_reverse_kl_loss,
    truncated_weights,
)
from video_opd.algorithms.signals import forward_kl, kl_baseline, reverse_kl, sampled_reverse_kl


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
        count = loss_divisor([4, 1, 3], reduction)
        whole = importance_surrogate(logp, old, advantage, mask, count)
        parts = sum(
            importance_surrogate(logp[b, None], old[b, None], advantage[b, None], mask[b, None], count)
            for b in range(3)
        )
        assert torch.allclose(whole, torch.as_tensor(parts))


def test_the_divisors():
    assert loss_divisor([4, 1, 3], "sum") == 3.0  # eq 6: mean over trajectories
    assert loss_divisor([4, 1, 3], "token_mean") == 8.0


def softmax_policy(seed: int, vocabulary: int = 4) -> torch.Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_token_the_expected_gradient_is_the_analytic_reverse_kls():
    """Every token of a vocabulary of 4 is weighted by its probability, so there is no sampling error."""
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
    """With discount 0, token 1 is credited with the KL of its own state only. The gradient of the KL between
    whole sequences differs: an early token decides which state comes next, which adds one term."""
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
    """With the sign as eq 11 prints it, the update would move away from the teacher."""
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


# --- clipping and importance weights -----------------------------------------------------------------

LOW, HIGH = 0.2, 0.3


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "share"),
    [
        (2.0, 1.5, -2.0 * 1.3, 0.0, 1.0),  # good and likelier already: clipped above
        (2.0, 0.5, -2.0 * 0.5, -2.0 * 0.5, 0.0),  # good and less likely: pulled back
        (-2.0, 1.5, 2.0 * 1.5, 2.0 * 1.5, 0.0),  # bad and likelier: pushed down
        (-2.0, 0.5, 2.0 * 0.8, 0.0, 1.0),  # bad and less likely already: clipped below
        (2.0, 1.25, -2.0 * 1.25, -2.0 * 1.25, 0.0),  # inside; a symmetric 0.2 would clip it
        (-2.0, 0.85, 2.0 * 0.85, 2.0 * 0.85, 0.0),
        (0.0, 1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clip_case_by_case(advantage: float, ratio: float, loss: float, slope: float, share: float):
    logp = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    old, a = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[advantage]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    measured = importance_surrogate(logp, old, a, mask, 1.0, clip=(LOW, HIGH))
    measured.backward()
    assert logp.grad is not None
    assert math.isclose(measured.item(), loss, rel_tol=1e-12, abs_tol=1e-15)
    assert math.isclose(logp.grad.item(), slope, rel_tol=1e-12, abs_tol=1e-15)
    assert advantage == 0 or (logp.grad.item() == 0) == bool(share)
    assert is_clipped(torch.tensor([[ratio]]), a, (LOW, HIGH)).tolist() == [[bool(share)]]


def test_the_clipped_weighted_surrogate_is_ppos_formula_token_by_token():
    logp, old, advantage, mask = case(4)
    weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    logp.requires_grad_(True)
    loss = importance_surrogate(logp, old, advantage, mask, 8.0, clip=(LOW, HIGH), weight_BT=weight)
    loss.backward()
    total, clipped, slopes = 0.0, 0, torch.zeros(3, 4, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logp[b, t].item()) / math.exp(old[b, t].item())
        a, w = advantage[b, t].item(), weight[b, t].item()
        free, bounded = ratio * a, min(max(ratio, 1 - LOW), 1 + HIGH) * a
        total -= w * min(free, bounded) / 8
        slopes[b, t] = 0.0 if bounded < free else -w * a * ratio / 8
        clipped += bounded < free
    assert 0 < clipped < 8  # both branches are walked
    assert math.isclose(loss.item(), total, rel_tol=1e-12)
    assert logp.grad is not None and torch.allclose(logp.grad, slopes, rtol=1e-12, atol=1e-15)


def test_a_clip_that_is_never_reached_and_weights_of_one_change_no_bit():
    logp, old, advantage, mask = case(5)
    plain = importance_surrogate(logp, old, advantage, mask, 3.0)
    assert torch.equal(importance_surrogate(logp, old, advantage, mask, 3.0, clip=(1.0, 1e6)), plain)
    ones = torch.ones_like(logp)
    assert torch.equal(importance_surrogate(logp, old, advantage, mask, 3.0, weight_BT=ones), plain)


def test_a_clipped_ratio_may_overflow_without_spoiling_the_gradient():
    logp = torch.tensor([[200.0, -0.5]], requires_grad=True)  # exp(200) is inf in float32
    ones, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    loss = importance_surrogate(logp, torch.zeros(1, 2), ones, mask, 1.0, clip=(0.2, 0.2))
    loss.backward()
    assert math.isclose(loss.item(), -1.2 - math.exp(-0.5), rel_tol=1e-6)
    assert logp.grad is not None and logp.grad[0, 0] == 0.0
    assert math.isclose(logp.grad[0, 1].item(), -math.exp(-0.5), rel_tol=1e-6)


def test_weights_are_the_ratio_up_to_the_limit_and_constant():
    trainer = torch.tensor([[-1.0, -1.0, -5.0, math.nan]], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([[-1.5, -4.0, -1.0, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_weights(trainer, sampler, mask, 2.0)
    assert not weights.requires_grad
    assert weights[0].tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-4.0), 1.0], rel=1e-12)


def test_weights_turn_the_samplers_expectation_into_the_trainers():
    """Enumeration shows it, as long as the limit is not reached."""
    trainer, sampler = softmax_policy(5).log_softmax(-1), softmax_policy(6).log_softmax(-1)
    values = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    ratios = [math.exp(t - s) for t, s in zip(trainer.tolist(), sampler.tolist(), strict=True)]

    def expectation(limit: float) -> float:
        weights = truncated_weights(trainer[None], sampler[None], mask, limit)[0].tolist()
        return sum(
            math.exp(s) * w * f for s, w, f in zip(sampler.tolist(), weights, values.tolist(), strict=True)
        )

    exact = sum(math.exp(t) * f for t, f in zip(trainer.tolist(), values.tolist(), strict=True))
    assert math.isclose(expectation(max(ratios) + 1), exact, rel_tol=1e-12)
    assert not math.isclose(expectation(max(ratios) / 2), exact, rel_tol=1e-2)


# --- k3 and the likelihood ---------------------------------------------------------------------------


def test_k3_and_its_gradient_token_by_token():
    logp, reference, _, mask = case(6)
    logp.requires_grad_(True)
    loss = k3_penalty(logp, reference, mask, 3.0)
    loss.backward()
    total, slopes = 0.0, torch.zeros(3, 4, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(reference[b, t].item()) / math.exp(logp[b, t].item())
        total += (ratio - math.log(ratio) - 1) / 3
        slopes[b, t] = (1 - ratio) / 3
    assert math.isclose(loss.item(), total, rel_tol=1e-10)
    assert logp.grad is not None and torch.allclose(logp.grad, slopes, rtol=1e-10, atol=1e-15)


@settings(max_examples=50)
@given(logp=st.floats(-30, 0), reference=st.floats(-30, 0))
def test_k3_is_never_negative(logp: float, reference: float):
    x, y = (torch.tensor([[v]], dtype=torch.float64) for v in (logp, reference))
    value = k3_penalty(x, y, torch.ones(1, 1, dtype=torch.bool), 1.0).item()
    assert value >= 0
    assert value > 0 or abs(logp - reference) < 1e-6


def test_k3_in_expectation():
    """The value is the reverse KL; the gradient through the log-prob alone is that of the forward KL."""
    logits = softmax_policy(7).requires_grad_(True)
    reference = softmax_policy(8).log_softmax(-1)
    logp = logits.log_softmax(-1)
    one = torch.ones(1, 1, dtype=torch.bool)
    terms = [k3_penalty(logp[a].view(1, 1), reference[a].view(1, 1), one, 1.0) for a in range(4)]
    expected = torch.stack([logp[a].detach().exp() * terms[a] for a in range(4)]).sum()
    p, q = logp.detach().exp().tolist(), reference.exp().tolist()
    reverse = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert math.isclose(expected.item(), reverse, rel_tol=1e-10)
    (gradient,) = torch.autograd.grad(expected, logits)
    of_forward = torch.tensor([x - y for x, y in zip(p, q, strict=True)], dtype=torch.float64)
    of_reverse = [x * (math.log(x / y) - reverse) for x, y in zip(p, q, strict=True)]
    assert torch.allclose(gradient, of_forward, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(gradient, torch.tensor(of_reverse, dtype=torch.float64), rtol=1e-2)


def test_the_negative_log_likelihood_and_its_gradient():
    logp, _, _, mask = case(7)
    logp.requires_grad_(True)
    loss = negative_log_likelihood(logp, mask, 8.0)
    loss.backward()
    total = -sum(logp[b, t].item() for b, t in mask.nonzero().tolist()) / 8
    assert math.isclose(loss.item(), total, rel_tol=1e-12)
    assert logp.grad is not None and torch.allclose(logp.grad, -mask.double() / 8)


# --- divergences over the vocabulary -----------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def vocabulary_case(seed: int, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a student and log-probabilities of a teacher, [2, 3, V]."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, size, generator=g, dtype=torch.float64) * 2
    return logits, (torch.randn(2, 3, size, generator=g, dtype=torch.float64) * 2).log_softmax(-1)


def by_hand(kind: str, logits: list[float], teacher: list[float]) -> tuple[float, list[float]]:
    """The divergence at one position and its gradient in the student's logits, from the definitions."""
    total = math.fsum(math.exp(x) for x in logits)
    p, q = [math.exp(x) / total for x in logits], [math.exp(x) for x in teacher]
    if kind == "forward":  # eq 27; eq 28 with ∇log-softmax
        value = math.fsum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
        return value, [x - y for x, y in zip(p, q, strict=True)]
    k = len(p) if kind == "reverse" else int(kind)
    kept = sorted(range(len(p)), key=lambda v: -p[v])[:k]
    rest = [v for v in range(len(p)) if v not in kept]
    outcomes = [[v] for v in kept] + ([rest] if rest else [])
    value, log_ratio = 0.0, [0.0] * len(p)
    for outcome in outcomes:
        mass_p, mass_q = math.fsum(p[v] for v in outcome), math.fsum(q[v] for v in outcome)
        value += mass_p * math.log(mass_p / mass_q)
        for v in outcome:
            log_ratio[v] = math.log(mass_p / mass_q)
    return value, [p[v] * (log_ratio[v] - value) for v in range(len(p))]


def topk(k: int) -> Divergence:
    return lambda student, teacher, mask, count: topk_reverse_kl_loss(student, teacher, mask, count, k)


DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_kl_loss,
    "reverse": reverse_kl_loss,
    **{str(k): topk(k) for k in (1, 2, 3, 5, 6)},
}
every_divergence = pytest.mark.parametrize("kind", DIVERGENCES)


@every_divergence
def test_a_divergence_and_its_gradient_position_by_position(kind: str):
    logits, teacher = vocabulary_case(11)
    logits.requires_grad_(True)
    loss = DIVERGENCES[kind](logits.log_softmax(-1), teacher, MASK, 2.0)
    loss.backward()
    total, slopes = 0.0, torch.zeros_like(logits)
    for b, t in MASK.nonzero().tolist():
        value, slope = by_hand(kind, logits[b, t].tolist(), teacher[b, t].tolist())
        total += value / 2
        slopes[b, t] = torch.tensor(slope, dtype=torch.float64) / 2
    assert math.isclose(loss.item(), total, rel_tol=1e-10) and total > 0.1
    assert logits.grad is not None and slopes.abs().max() > 1e-2
    assert torch.allclose(logits.grad, slopes, rtol=1e-10, atol=1e-13)


@every_divergence
def test_a_divergence_by_finite_differences_and_only_through_the_student(kind: str):
    logits, teacher = vocabulary_case(12)
    logits.requires_grad_(True)
    teacher.requires_grad_(True)
    loss = DIVERGENCES[kind]
    assert torch.autograd.gradcheck(
        lambda x: loss(x.log_softmax(-1), teacher.detach(), MASK, 2.0), logits, atol=1e-8
    )
    # The same holds for log-probabilities that do not sum to one.
    free = logits.detach().log_softmax(-1).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher.detach(), MASK, 2.0), free, atol=1e-8)
    loss(logits.log_softmax(-1), teacher, MASK, 2.0).backward()
    assert teacher.grad is None


@every_divergence
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_of_a_divergence_may_hold_anything(kind: str, garbage: float):
    logits, teacher = vocabulary_case(13)
    student = logits.log_softmax(-1).requires_grad_(True)
    clean = DIVERGENCES[kind](student, teacher, MASK, 2.0)
    (expected,) = torch.autograd.grad(clean, student)
    dirty = torch.where(MASK[..., None], student.detach(), garbage).requires_grad_(True)
    loss = DIVERGENCES[kind](dirty, torch.where(MASK[..., None], teacher, garbage), MASK, 2.0)
    loss.backward()
    assert torch.equal(loss, clean) and dirty.grad is not None
    assert torch.equal(dirty.grad, expected)
    assert (dirty.grad[~MASK] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_of_the_token_losses_may_hold_anything(garbage: float):
    logp, old, advantage, mask = case(8)
    weight = torch.full_like(logp, 1.5)
    clip = (0.1, 0.1)

    def losses(*tensors: torch.Tensor) -> list[torch.Tensor]:
        logp, old, advantage, weight = tensors
        return [
            importance_surrogate(logp, old, advantage, mask, 3.0, clip=clip, weight_BT=weight),
            k3_penalty(logp, old, mask, 3.0),
            negative_log_likelihood(logp, mask, 3.0),
        ]

    clean = logp.clone().requires_grad_(True)
    dirty = torch.where(mask, logp, garbage).requires_grad_(True)
    rest = [torch.where(mask, x, garbage) for x in (old, advantage, weight)]
    for a, b in zip(losses(clean, old, advantage, weight), losses(dirty, *rest), strict=True):
        assert torch.equal(a, b)
        (expected,), (measured,) = torch.autograd.grad(a, clean), torch.autograd.grad(b, dirty)
        assert torch.equal(measured, expected) and (measured[~mask] == 0).all()
    assert (truncated_weights(dirty, rest[0], mask, 2.0)[~mask] == 1).all()


@every_divergence
def test_micro_batches_of_a_divergence_add_up(kind: str):
    logits, teacher = vocabulary_case(14)
    student, loss = logits.log_softmax(-1), DIVERGENCES[kind]
    parts = sum(loss(student[b, None], teacher[b, None], MASK[b, None], 4.0) for b in range(2))
    assert math.isclose(loss(student, teacher, MASK, 4.0), parts, rel_tol=1e-12)


def test_micro_batches_of_the_token_losses_add_up():
    logp, old, advantage, mask = case(9)
    rows = [(logp[b, None], old[b, None], advantage[b, None], mask[b, None]) for b in range(3)]
    clip = (0.1, 0.1)
    wholes = [
        importance_surrogate(logp, old, advantage, mask, 3.0, clip=clip, weight_BT=advantage.abs()),
        k3_penalty(logp, old, mask, 3.0),
        negative_log_likelihood(logp, mask, 3.0),
    ]
    parts = [
        sum(importance_surrogate(*row, 3.0, clip=clip, weight_BT=row[2].abs()) for row in rows),
        sum(k3_penalty(x, y, m, 3.0) for x, y, _, m in rows),
        sum(negative_log_likelihood(x, m, 3.0) for x, _, _, m in rows),
    ]
    for whole, part in zip(wholes, parts, strict=True):
        assert math.isclose(whole, part, rel_tol=1e-12)


@every_divergence
def test_no_tokens_no_loss_and_no_gradient(kind: str):
    logits, teacher = vocabulary_case(15)
    logits.requires_grad_(True)
    loss = DIVERGENCES[kind](logits.log_softmax(-1), teacher, torch.zeros_like(MASK), 1.0)
    loss.backward()
    assert loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


@every_divergence
@pytest.mark.parametrize(
    ("in_student", "in_teacher"),
    [(-1e30, -1e30), (-math.inf, -math.inf), (-1e9, -1e9 + 3), (-1e30, -math.inf), (-math.inf, -1e30)],
)
def test_unwritable_tokens_add_nothing(kind: str, in_student: float, in_teacher: float):
    """Loss and gradient are those over the writable tokens alone; for k = 5 the rest is the tail."""
    logits, teacher = vocabulary_case(16, size=4)
    alone = logits.clone().requires_grad_(True)
    expected = DIVERGENCES[kind](alone.log_softmax(-1), teacher, MASK, 2.0)
    expected.backward()
    forbidden = torch.ones(2, 3, 3, dtype=torch.float64)
    padded = torch.cat([logits, forbidden * in_student], -1).requires_grad_(True)
    loss = DIVERGENCES[kind](
        padded.log_softmax(-1), torch.cat([teacher, forbidden * in_teacher], -1), MASK, 2.0
    )
    loss.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-10)
    assert padded.grad is not None and alone.grad is not None
    assert torch.allclose(padded.grad[..., :4], alone.grad, rtol=1e-10, atol=1e-14)
    assert (padded.grad[..., 4:] == 0).all()


def test_a_tail_without_mass_is_nothing_in_float32_too():
    """The form in which models give it: float32, −1e30 for tokens that cannot be written, two tokens left."""
    logits = torch.full((1, 1, 50), -1e30)
    logits[..., :2] = torch.tensor([0.3, -0.4])
    logits.requires_grad_(True)
    teacher = torch.full((1, 1, 50), -1e30)
    teacher[..., :2] = torch.tensor([0.5, 0.5]).log()
    mask = torch.ones(1, 1, dtype=torch.bool)
    for k in (2, 3, 49, 50):
        loss = topk_reverse_kl_loss(logits.log_softmax(-1), teacher, mask, 1.0, k)
        full = reverse_kl_loss(logits.log_softmax(-1), teacher, mask, 1.0)
        assert math.isclose(loss.item(), full.item(), rel_tol=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-2


def test_a_tiny_tail_is_summed_and_not_a_difference_from_one():
    """Computed as 1 − Σ, a tail of about 1e-20 would be 0; its log-ratio to the teacher's 0.5 is −45."""
    student = torch.tensor([[[0.0, -46.0, -47.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    free = student.clone().requires_grad_(True)
    topk_reverse_kl_loss(free, teacher, torch.ones(1, 1, dtype=torch.bool), 1.0, 1).backward()
    tail = math.exp(-46) + math.exp(-47)
    slope = math.log(tail / 0.5) + 1  # d/d log p_v = p_v (log(p_tail/q_tail) + 1)
    assert free.grad is not None
    assert math.isclose(free.grad[0, 0, 1].item(), math.exp(-46) * slope, rel_tol=1e-10)
    assert math.isclose(free.grad[0, 0, 2].item(), math.exp(-47) * slope, rel_tol=1e-10)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 9), spread=st.floats(0.1, 10))
def test_top_k_rises_with_k_to_the_full_divergence(seed: int, size: int, spread: float):
    logits, teacher = vocabulary_case(seed, size)
    student = (logits * spread).log_softmax(-1)
    values = [topk_reverse_kl_loss(student, teacher, MASK, 1.0, k).item() for k in range(1, size + 3)]
    full = reverse_kl_loss(student, teacher, MASK, 1.0).item()
    slack = 1e-12 * max(full, 1.0)
    assert values[0] >= -slack
    assert all(a <= b + slack for a, b in itertools.pairwise(values))
    assert all(value <= full + slack for value in values)
    for at_or_past_the_vocabulary in values[size - 1 :]:
        assert math.isclose(at_or_past_the_vocabulary, full, rel_tol=1e-10, abs_tol=1e-12)


def test_the_tokens_kept_are_the_students():
    student = torch.tensor([[[0.7, 0.2, 0.1]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.1, 0.3, 0.6]]], dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = topk_reverse_kl_loss(student.log(), teacher.log(), mask, 1.0, 1).item()
    assert math.isclose(loss, 0.7 * math.log(0.7 / 0.1) + 0.3 * math.log(0.3 / 0.9), rel_tol=1e-12)


def test_the_two_directions_differ_and_vanish_only_at_the_teacher():
    logits, teacher = vocabulary_case(17)
    student = logits.log_softmax(-1)
    forward = forward_kl_loss(student, teacher, MASK, 1.0)
    assert not torch.allclose(forward, reverse_kl_loss(student, teacher, MASK, 1.0), rtol=1e-2)
    assert torch.allclose(forward, forward_kl(student, teacher)[MASK].sum())
    for loss in DIVERGENCES.values():
        assert abs(loss(teacher, teacher, MASK, 1.0).item()) < 1e-12


# --- the control variate -----------------------------------------------------------------------------


def enumerated(logits: torch.Tensor, teacher: torch.Tensor, baseline: float) -> tuple[torch.Tensor, float]:
    """Mean and total variance of eq 6's gradient with r − baseline, over the tokens of the policy."""
    gradients, weights = [], []
    for a in range(len(teacher)):
        logp = logits.log_softmax(-1)[a].view(1, 1)
        old = logp.detach()
        signal = sampled_reverse_kl(teacher[a].view(1, 1), old) - baseline
        loss = importance_surrogate(logp, old, signal, torch.ones(1, 1, dtype=torch.bool), 1.0)
        gradients.append(torch.autograd.grad(loss, logits)[0])
        weights.append(old.exp().item())
    stacked, p = torch.stack(gradients), torch.tensor(weights, dtype=torch.float64)
    mean = p @ stacked
    return mean, float(p @ (stacked - mean).square().sum(-1))


def test_the_control_variate_keeps_the_expected_gradient_and_lowers_the_variance():
    logits = softmax_policy(21).requires_grad_(True)
    # The teacher differs by a token of its own, so that every token the student writes scores below zero.
    teacher = torch.cat([logits.detach(), torch.tensor([4.0], dtype=torch.float64)]).log_softmax(-1)[:4]
    baseline = kl_baseline(logits.log_softmax(-1).view(1, 1, -1), teacher.view(1, 1, -1)).item()
    assert baseline < -1
    plain_mean, plain_variance = enumerated(logits, teacher, 0.0)
    mean, variance = enumerated(logits, teacher, baseline)
    assert torch.allclose(mean, plain_mean, atol=1e-12)
    assert variance < 1e-6 * plain_variance


def test_the_control_variate_is_no_guarantee():
    """The mean of r is not the best constant if the signals lie on both sides of 0."""
    logits = softmax_policy(0).requires_grad_(True)
    teacher = softmax_policy(1).log_softmax(-1)
    baseline = kl_baseline(logits.log_softmax(-1).view(1, 1, -1), teacher.view(1, 1, -1)).item()
    plain_mean, plain_variance = enumerated(logits, teacher, 0.0)
    mean, variance = enumerated(logits, teacher, baseline)
    assert torch.allclose(mean, plain_mean, atol=1e-12) and mean.abs().max() > 1e-2
    assert variance > plain_variance
