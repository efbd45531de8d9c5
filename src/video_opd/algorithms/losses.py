"""Losses: pure functions from tensors to one scalar to minimise.

Shapes: ``B`` trajectories, ``T`` response tokens (right-padded), ``V`` vocabulary, ``K`` kept tokens.
Log-probabilities are natural; every loss is in nats.

Every loss is a *sum* divided by ``divisor``, a count over the global batch (all processes and micro-batches)
that the caller passes in. So the losses of the micro-batches add up to the loss of the global batch, however
it was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from video_opd.algorithms.signals import forward_kl, k3, reverse_kl

Reduction = Literal["sum", "token_mean"]


def importance_surrogate(
    logp_BT: torch.Tensor,
    old_BT: torch.Tensor,
    advantage_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    divisor: float,
    *,
    clip: tuple[float, float] | None = None,
    weight_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """eq 6: −Σ_t sg(r_t) · exp(log π_θ(a_t) − log π_old(a_t)) / divisor, a scalar.

    Its gradient is −Σ_t r_t · ratio_t · ∇log π_θ(a_t) / divisor. ``logp_BT`` carries the gradient;
    ``old_BT`` and ``advantage_BT`` are constants. Positions where ``mask_BT`` is False add nothing, whatever
    value they hold.

    ``clip=(low, high)`` makes each term min(ratio·A, clamp(ratio, 1 − low, 1 + high)·A) (PPO, GRPO; unequal
    bounds as in DAPO); see :func:`is_clipped`. ``weight_BT`` multiplies each term by a constant of its own:
    the :func:`truncated_weights` of a sampler that is not the trainer's engine.
    """
    assert logp_BT.shape == old_BT.shape == advantage_BT.shape == mask_BT.shape, "one value for each token"
    assert divisor > 0, "an empty global batch has no loss"
    advantage_BT = torch.where(mask_BT, advantage_BT.detach(), 0.0)
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_BT.detach(), 0.0)
    if clip is None:
        terms_BT = advantage_BT * log_ratio_BT.exp()
    else:
        low, high = clip
        constant_ratio_BT = log_ratio_BT.detach().exp()
        clipped_BT = is_clipped(constant_ratio_BT, advantage_BT, clip)
        # Not torch.minimum: its backward multiplies 0 by a ratio that may have overflowed.
        ratio_BT = torch.where(clipped_BT, 0.0, log_ratio_BT).exp()
        bound_BT = constant_ratio_BT.clamp(1.0 - low, 1.0 + high)
        terms_BT = advantage_BT * torch.where(clipped_BT, bound_BT, ratio_BT)
    if weight_BT is not None:
        assert weight_BT.shape == mask_BT.shape, "one weight for each token"
        terms_BT = terms_BT * torch.where(mask_BT, weight_BT.detach(), 0.0)
    return -terms_BT.sum() / divisor


def is_clipped(ratio_BT: torch.Tensor, advantage_BT: torch.Tensor, clip: tuple[float, float]) -> torch.Tensor:
    """Bool [B, T]: the clip rule of PPO, True where clamp(ratio, 1 − low, 1 + high)·A is below ratio·A.

    ``ratio_BT`` is π_θ(a_t) / π_old(a_t), ``advantage_BT`` is A, ``clip`` is ``(low, high)``. A clipped token
    has no gradient. Comparisons with NaN are False.
    """
    low, high = clip
    assert low >= 0 and high >= 0, "clip is how far the ratio may leave 1, downwards and upwards"
    return ((advantage_BT > 0) & (ratio_BT > 1.0 + high)) | ((advantage_BT < 0) & (ratio_BT < 1.0 - low))


def truncated_weights(
    trainer_BT: torch.Tensor, sampler_BT: torch.Tensor, mask_BT: torch.Tensor, limit: float
) -> torch.Tensor:
    """min(π_trainer(a_t) / π_sampler(a_t), limit), detached, [B, T]; 1 where ``mask_BT`` is False.

    The weights correct for an engine that samples from slightly other probabilities than the trainer
    computes. The limit accepts a small bias for a bounded variance. This is truncated importance sampling:
    Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    assert trainer_BT.shape == sampler_BT.shape == mask_BT.shape, "one value for each token"
    assert limit > 0, "a weight is positive"
    ratio_BT = (trainer_BT - sampler_BT).detach().exp()
    return torch.where(mask_BT, ratio_BT.clamp(max=limit), 1.0)


def k3_penalty(
    logp_BT: torch.Tensor, reference_BT: torch.Tensor, mask_BT: torch.Tensor, divisor: float
) -> torch.Tensor:
    """Σ_t k3(log π_ref(a_t) − log π_θ(a_t)) / divisor, a scalar ≥ 0: GRPO's penalty (Shao et al. 2024).

    The *value* estimates KL(π_θ ‖ π_ref) (:func:`~video_opd.algorithms.signals.k3`). The *gradient*, which
    goes through ``logp_BT`` alone, is in expectation that of KL(π_ref ‖ π_θ): the two agree to first order
    around π_ref.
    """
    assert logp_BT.shape == reference_BT.shape == mask_BT.shape, "one value for each token"
    assert divisor > 0, "an empty global batch has no loss"
    log_ratio_BT = torch.where(mask_BT, reference_BT.detach() - logp_BT, 0.0)
    return k3(log_ratio_BT).sum() / divisor


def negative_log_likelihood(logp_BT: torch.Tensor, mask_BT: torch.Tensor, divisor: float) -> torch.Tensor:
    """−Σ_t log π_θ(a_t|s_t) / divisor, a scalar: supervised fine-tuning on given tokens."""
    assert logp_BT.shape == mask_BT.shape, "one value for each token"
    assert divisor > 0, "an empty global batch has no loss"
    return -torch.where(mask_BT, logp_BT, 0.0).sum() / divisor


def forward_kl_loss(
    student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, mask_BT: torch.Tensor, divisor: float
) -> torch.Tensor:
    """eq 27–29: Σ_t KL(π_tea ‖ π_θ) over the vocabulary / divisor, a scalar.

    Both inputs are log-probabilities; the gradient goes through the student only (eq 28). Positions where
    ``mask_BT`` is False add nothing, whatever value they hold.
    """
    assert divisor > 0, "an empty global batch has no loss"
    student_BTV, teacher_BTV = _unmasked(student_BTV, teacher_BTV, mask_BT)
    return forward_kl(student_BTV, teacher_BTV).sum() / divisor


def reverse_kl_loss(
    student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, mask_BT: torch.Tensor, divisor: float
) -> torch.Tensor:
    """Σ_t KL(π_θ ‖ π_tea) over the vocabulary / divisor, a scalar: eq 6 without its sampling noise.

    Its gradient is the expectation of the gradient of eq 6 at each visited state. Both inputs are
    log-probabilities; the gradient goes through the student only. Positions where ``mask_BT`` is False add
    nothing, whatever value they hold.
    """
    assert divisor > 0, "an empty global batch has no loss"
    student_BTV, teacher_BTV = _unmasked(student_BTV, teacher_BTV, mask_BT)
    return reverse_kl(student_BTV, teacher_BTV).sum() / divisor


def topk_reverse_kl_loss(
    student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, mask_BT: torch.Tensor, divisor: float, k: int
) -> torch.Tensor:
    """The reverse KL over the student's ``k`` likeliest tokens, with all others as *one* outcome, a scalar.

    Σ_t [ Σ_{v∈S_t} p(v) log(p(v)/q(v)) + p(rest) log(p(rest)/q(rest)) ] / divisor, with p the student's
    probabilities, q the teacher's, and S_t the ``k`` kept tokens, which are a constant. Merging outcomes can
    only lower a KL (data processing inequality), so the result lies between 0 and :func:`reverse_kl_loss`. It
    equals the latter if ``k`` is at least V or if S_t holds all the mass. Positions where ``mask_BT`` is
    False add nothing, whatever value they hold.
    """
    assert k >= 1, "at least one token is kept"
    assert divisor > 0, "an empty global batch has no loss"
    student_BTV, teacher_BTV = _unmasked(student_BTV, teacher_BTV, mask_BT)
    top_BTK = student_BTV.detach().topk(min(k, student_BTV.shape[-1]), dim=-1).indices
    return reverse_kl(_merge_rest(student_BTV, top_BTK), _merge_rest(teacher_BTV, top_BTK)).sum() / divisor


def _merge_rest(logp_BTV: torch.Tensor, kept_BTK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the kept tokens, followed by that of all others together: [B, T, K + 1]."""
    rest_BTV = logp_BTV.scatter(-1, kept_BTK, -torch.inf)
    some_BT1 = (rest_BTV > -torch.inf).any(-1, keepdim=True)
    # The gradient of logsumexp over −inf alone is NaN, and a `where` after it would not remove the NaN.
    rest_BT1 = torch.where(some_BT1, rest_BTV, 0.0).logsumexp(-1, keepdim=True)
    return torch.cat([logp_BTV.gather(-1, kept_BTK), torch.where(some_BT1, rest_BT1, -torch.inf)], -1)


def _unmasked(
    student_BTV: torch.Tensor, teacher_BTV: torch.Tensor, mask_BT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher with zeros where the mask is False: the divergence is 0 there. The teacher is
    detached."""
    assert student_BTV.shape == teacher_BTV.shape, (student_BTV.shape, teacher_BTV.shape)
    assert student_BTV.shape[:-1] == mask_BT.shape, "one distribution for each token"
    mask_BT1 = mask_BT[..., None]
    return torch.where(mask_BT1, student_BTV, 0.0), torch.where(mask_BT1, teacher_BTV.detach(), 0.0)


def loss_divisor(response_lengths: Sequence[int], reduction: Reduction) -> float:
    """The number that a loss is divided by, from the lengths of *all* trajectories of the global batch.

    ``sum`` divides by the number of trajectories, so that each contributes the sum over its tokens (eq 6).
    ``token_mean`` divides by the number of tokens, so that every token weighs the same.
    """
    return float(len(response_lengths) if reduction == "sum" else sum(response_lengths))
