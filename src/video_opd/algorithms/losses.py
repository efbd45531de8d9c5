"""Losses: pure functions from tensors to one scalar that is minimised.

Shapes: ``B`` trajectories, ``T`` response tokens (right-padded), ``V`` vocabulary.

Every loss is a *sum* divided by a count that the caller passes in, taken over the global batch: all ranks,
all micro-batches. So the sum of the micro-batches' losses is the loss of the whole, however it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Reduction = Literal["sum", "token_mean"]


def importance_surrogate(
    logp_BT: torch.Tensor,
    old_BT: torch.Tensor,
    advantage_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    divisor: float,
) -> torch.Tensor:
    """eq 6: −Σ_t sg(r_t) · exp(log π_θ(a_t) − log π_old(a_t)) / divisor, a scalar.

    Its gradient is −Σ_t r_t · ratio_t · ∇log π_θ(a_t) / divisor. ``logp_BT`` carries the gradient;
    ``old_BT`` and ``advantage_BT`` are constants; positions where ``mask_BT`` is False count for nothing,
    whatever stands there.
    """
    assert logp_BT.shape == old_BT.shape == advantage_BT.shape == mask_BT.shape, "one value for each token"
    assert divisor > 0, "an empty global batch has no loss"
    advantage_BT = torch.where(mask_BT, advantage_BT.detach(), 0.0)
    log_ratio_BT = torch.where(mask_BT, logp_BT - old_BT.detach(), 0.0)
    return -(advantage_BT * log_ratio_BT.exp()).sum() / divisor


def divisor(response_lengths: Sequence[int], reduction: Reduction) -> float:
    """What a loss is divided by, from the lengths of *all* trajectories of the global batch.

    ``sum``: the number of trajectories, so each counts the sum over its tokens (eq 6). ``token_mean``: the
    number of tokens, so a long answer weighs no more a token than a short one.
    """
    return float(len(response_lengths) if reduction == "sum" else sum(response_lengths))
