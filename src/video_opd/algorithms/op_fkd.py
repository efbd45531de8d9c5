"""OP-FKD: off-policy forward-KL distillation, the classical one (section C.2, eqs 26–29).

Who writes: nobody; the trajectory is the annotated span in the answer format.
Signal: the teacher's whole distribution at every position (eq 26).
Loss: Σ_t KL(π_tea(·|s_t) ‖ π_θ(·|s_t)), mean over trajectories (eqs 27–29).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from video_opd.algorithms.losses import forward_kl_loss
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.signals import sampled_reverse_kl
from video_opd.algorithms.trajectories import Annotated
from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


class OPFKD:
    needs = Needs(teacher=True, distributions=True, annotation=True)

    def __init__(self, annotated: Annotated) -> None:
        self.annotated = annotated

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        return self.annotated(samples, seeds)

    def signal(self, batch: Trajectories) -> Signal:
        """The loss needs none; r_t on the annotation is watched, as in OP-RKD."""
        assert batch.teacher is not None, "op-fkd needs the teacher's distributions"
        return Signal(token_reward_BT=sampled_reverse_kl(batch.teacher.logprobs_BT, batch.old_BT))

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 27, differentiated as eq 28."""
        assert batch.teacher is not None and batch.teacher.full_BTV is not None
        assert student.full_BTV is not None, "op-fkd needs the student's distributions"
        return forward_kl_loss(student.full_BTV, batch.teacher.full_BTV, batch.mask_BT, divisor)
