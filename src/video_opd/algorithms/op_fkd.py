"""OP-FKD: off-policy forward-KL distillation, the classical form (section C.2, eqs 26–29).

Who samples: nobody. The trajectory is the annotated span in the answer format.
Signal: the teacher's whole distribution at every position (eq 26).
Loss: Σ_t KL(π_tea(·|s_t) ‖ π_θ(·|s_t)), mean over trajectories (eqs 27–29).
"""

from __future__ import annotations

import torch

from video_opd.algorithms.losses import forward_kl_loss
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.policy_gradient import teacher_rewards
from video_opd.algorithms.trajectories import AnnotatedTrajectories
from video_opd.types import TokenLogprobs


class OPFKD:
    needs = Needs(teacher=True, distributions=True, annotation=True)

    def __init__(self, trajectories: AnnotatedTrajectories) -> None:
        self.trajectories = trajectories

    def signal(self, batch: Trajectories) -> Signal:
        """The loss needs no signal. r_t on the annotation's tokens is a metric, as in OP-RKD."""
        return Signal(token_reward_BT=teacher_rewards(batch, scale=1.0))

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 27; its gradient is eq 28."""
        assert student.full_BTV is not None, "op-fkd needs the student's distributions"
        assert batch.teacher is not None and batch.teacher.full_BTV is not None, "and the teacher's"
        return forward_kl_loss(student.full_BTV, batch.teacher.full_BTV, batch.mask_BT, divisor)
