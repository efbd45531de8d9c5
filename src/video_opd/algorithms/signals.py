"""Per-token signals and divergences: pure functions on tensors, no model in sight.

Shapes: ``B`` trajectories, ``T`` response tokens (right-padded), ``V`` vocabulary. All in nats.

The sign, once and for all. r_t (eq 5) is the *negative* of the sampled-token reverse KL, so that a larger r_t
is better and eq 6 ascends it:

    E_{a ~ π_θ}[ r_t ∇ log π_θ(a) ] = −∇ KL(π_θ ‖ π_tea)     at every visited state.

The paper's eq 11 prints the right side without the minus; with it, an ascent on r_t would move *away* from
the teacher. ``tests/unit/test_losses.py`` checks the direction by exact enumeration.

With discount 0 a token is credited with its own r_t only: the gradient is that of the per-state KL at the
states the student visited, taken as given. It is not the gradient of the KL between the two distributions
over whole sequences, which also counts how an early token changes the later states.
"""

from __future__ import annotations

import torch


def sampled_reverse_kl(teacher_BT: torch.Tensor, old_BT: torch.Tensor) -> torch.Tensor:
    """eq 5: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t), detached, [B, T].

    ``old_BT`` are the log-probs recorded when the tokens were sampled. The mean of −r_t over sampled tokens
    estimates the reverse KL without bias.
    """
    assert teacher_BT.shape == old_BT.shape, (teacher_BT.shape, old_BT.shape)
    return (teacher_BT - old_BT).detach()


def reverse_kl(student_BTV: torch.Tensor, teacher_BTV: torch.Tensor) -> torch.Tensor:
    """Σ_v p(v) log(p(v)/q(v)) at every position, [B, T], for log-probabilities p (student) and q (teacher).

    Tokens that the student cannot write (such as vision placeholders: log p is −inf, or so low that p is 0)
    add 0, also where the teacher cannot write them either.
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


def entropy(student_BTV: torch.Tensor) -> torch.Tensor:
    """−Σ_v p(v) log p(v) at every position, [B, T]."""
    possible = student_BTV > -torch.inf
    p = torch.where(possible, student_BTV, 0.0)
    return -torch.where(possible, p.exp() * p, 0.0).sum(-1)
