"""The signal and the loss that several methods share, on a micro-batch: a teacher's r_t, and eq 6.

Shapes: ``B`` trajectories, ``T`` response tokens.
"""

from __future__ import annotations

import torch

from video_opd.algorithms.losses import importance_surrogate
from video_opd.algorithms.method import Signal, Trajectories
from video_opd.algorithms.signals import scaled_reverse_kl
from video_opd.types import TokenLogprobs


def teacher_rewards(batch: Trajectories, scale: float) -> torch.Tensor:
    """r_t of every token, [B, T]: eq 5 if ``scale`` is 1, otherwise G-OPD's."""
    assert batch.teacher is not None, "r_t needs the teacher's log-probs"
    reference_BT = None if batch.reference is None else batch.reference.logprobs_BT
    return scaled_reverse_kl(batch.teacher.logprobs_BT, batch.old_BT, scale, reference_BT)


def policy_gradient_loss(
    student: TokenLogprobs,
    batch: Trajectories,
    signal: Signal,
    divisor: float,
    clip: tuple[float, float] | None,
) -> torch.Tensor:
    """eq 6 with ``signal.advantage_BT`` as the credit of each token, a scalar."""
    assert signal.advantage_BT is not None, "eq 6 needs an advantage for each token"
    return importance_surrogate(
        student.logprobs_BT,
        batch.old_BT,
        signal.advantage_BT,
        batch.mask_BT,
        divisor,
        clip=clip,
        weight_BT=batch.weight_BT,
    )
