"""Per-token signals and divergences: pure functions on tensors.

Shapes: ``B`` trajectories (``N`` prompts × ``G`` rollouts, prompt-major), ``T`` response tokens
(right-padded), ``V`` vocabulary. All values are in nats.

The sign: r_t (eq 5) is the *negative* of the sampled-token reverse KL, so that a larger r_t is better and
eq 6 ascends it:

    E_{a ~ π_θ}[ r_t ∇ log π_θ(a) ] = −∇ KL(π_θ ‖ π_tea)     at every visited state.

The paper's eq 11 prints the right side without the minus. If that were so, an ascent on r_t would move
*away* from the teacher. ``tests/unit/algorithms/test_losses.py`` checks the direction by exact enumeration.

Each token is credited with its own r_t only (discount 0). So the gradient is that of the KL at each state
that the student visited, with the visits taken as given. It is not the gradient of the KL between the two
distributions over whole sequences, which also counts how an early token changes the later states.
"""

from __future__ import annotations

import torch

STD_FLOOR = 1e-4  # the value in TRL; verl has 1e-6


def sampled_reverse_kl(teacher_BT: torch.Tensor, old_BT: torch.Tensor) -> torch.Tensor:
    """eq 5: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t), detached, [B, T].

    ``old_BT`` holds the log-probs recorded when the tokens were sampled. The mean of −r_t over sampled tokens
    estimates the reverse KL without bias.
    """
    assert teacher_BT.shape == old_BT.shape, (teacher_BT.shape, old_BT.shape)
    return (teacher_BT - old_BT).detach()


def scaled_reverse_kl(
    teacher_BT: torch.Tensor, old_BT: torch.Tensor, scale: float, reference_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """G-OPD: r_t = λ(log π_tea − log π_ref) − (log π_old − log π_ref) for λ = ``scale``, detached, [B, T].

    The first term rewards what the teacher adds to the reference; the second keeps the student near the
    reference (Yang et al. 2026, arXiv 2602.12125). λ = 1 is exactly eq 5 and ignores the reference; λ > 1
    moves the student past the teacher. Without a reference r_t = λ log π_tea − log π_old, which differs by a
    constant from the r_t of a uniform reference.
    """
    assert teacher_BT.shape == old_BT.shape, (teacher_BT.shape, old_BT.shape)
    if scale == 1:
        return sampled_reverse_kl(teacher_BT, old_BT)
    if reference_BT is None:
        return (scale * teacher_BT - old_BT).detach()
    assert reference_BT.shape == old_BT.shape, (reference_BT.shape, old_BT.shape)
    return (scale * (teacher_BT - reference_BT) - (old_BT - reference_BT)).detach()


def kl_baseline(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor) -> torch.Tensor:
    """b_t = E_{a ~ π}[r_t] = −KL(π ‖ π_tea) at every visited state, detached, [B, T].

    A control variate for eq 5: b_t does not depend on the token, and E_{a ~ π}[∇ log π(a)] = 0, so
    r_t − b_t has the same expected gradient. Its variance is smaller if the r_t of a state lie on one side of
    0 and far from it; it can be larger if they lie on both sides.
    """
    with torch.no_grad():
        return -reverse_kl(student_BTV, teacher_BTV)


def group_advantages(rewards_B: torch.Tensor, rollouts: int, normalise_std: bool) -> torch.Tensor:
    """r̂_G of eq 2: each reward relative to the other rewards of its prompt, detached, [B].

    ``rewards_B`` is prompt-major with G = ``rollouts`` entries for each prompt. The result is
    (r − mean) / (std + 1e-4) with the unbiased std of the group, as in TRL, or r − mean without
    ``normalise_std`` (Dr. GRPO). It is exactly 0 if all rewards of a group are equal. Raises ValueError for
    fewer than two rollouts.
    """
    if rollouts < 2:
        raise ValueError(f"{rollouts} rollouts a prompt have no group to compare with; set at least 2")
    assert rewards_B.ndim == 1 and len(rewards_B) % rollouts == 0, "rollouts for every prompt"
    rewards_NG = rewards_B.detach().reshape(-1, rollouts)
    centred_NG = rewards_NG - rewards_NG.mean(-1, keepdim=True)
    if normalise_std:
        centred_NG = centred_NG / (rewards_NG.std(-1, keepdim=True) + STD_FLOOR)
    # The mean of equal numbers may differ from them by a rounding error, which the division would enlarge.
    equal_N1 = (rewards_NG == rewards_NG[:, :1]).all(-1, keepdim=True)
    return torch.where(equal_N1, 0.0, centred_NG).reshape(-1)


def reverse_kl(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor) -> torch.Tensor:
    """Σ_v p(v) log(p(v)/q(v)) at every position, [B, T], for log-probabilities p (student) and q (teacher).

    Tokens that the student cannot write (for example vision placeholders, whose log p is −inf or so low that
    p is 0) add 0, whether or not the teacher can write them.
    """
    assert student_BTV.shape == teacher_BTV.shape, (student_BTV.shape, teacher_BTV.shape)
    possible = student_BTV.exp() > 0
    # Both sides of a `where` are differentiated: the masked side must be finite before it is dropped.
    p = torch.where(possible, student_BTV, 0.0)
    q = torch.where(possible, teacher_BTV, 0.0)
    return torch.where(possible, p.exp() * (p - q), 0.0).sum(-1)


def forward_kl(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor) -> torch.Tensor:
    """eq 27: Σ_v q(v) log(q(v)/p(v)) at every position, [B, T], with p the student and q the teacher.

    Tokens of teacher probability 0 add 0.
    """
    return reverse_kl(teacher_BTV, student_BTV)


def k3(log_ratio_BT: torch.Tensor) -> torch.Tensor:
    """exp(x) − x − 1 for every x = log q(a_t) − log p(a_t), [B, T], never negative.

    Over tokens that p sampled, its mean estimates KL(p ‖ q) without bias (the k3 estimator: Schulman 2020,
    "Approximating KL divergence").
    """
    return log_ratio_BT.expm1() - log_ratio_BT


def entropy(student_BTV: torch.Tensor) -> torch.Tensor:
    """−Σ_v p(v) log p(v) at every position, [B, T]."""
    possible = student_BTV > -torch.inf
    p = torch.where(possible, student_BTV, 0.0)
    return -torch.where(possible, p.exp() * p, 0.0).sum(-1)
