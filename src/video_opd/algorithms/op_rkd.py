"""OP-RKD: off-policy reverse-KL distillation (section C.1, eqs 23–25).

Who samples: nobody. The trajectory is the annotated span in the answer format.
Signal: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t) on the annotation's tokens (eq 24), where π_old is the
student before the first update on them.
Loss: the same as Video-OPD's (eq 25). Off policy, its expected gradient is not the gradient of a KL: the
student imitates a token in proportion to how much likelier the teacher finds it, and unlearns a token that
the teacher finds less likely.
"""

from __future__ import annotations

import torch

from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.policy_gradient import policy_gradient_loss, teacher_rewards
from video_opd.algorithms.trajectories import AnnotatedTrajectories
from video_opd.config import SurrogateLossConfig
from video_opd.types import TokenLogprobs


class OPRKD:
    def __init__(
        self,
        trajectories: AnnotatedTrajectories,
        settings: SurrogateLossConfig | None = None,
        reward_scale: float = 1.0,
    ) -> None:
        self.trajectories, self.settings = trajectories, settings or SurrogateLossConfig()
        self.reward_scale = reward_scale
        self.needs = Needs(teacher=True, annotation=True, reference=reward_scale != 1)

    def signal(self, batch: Trajectories) -> Signal:
        """eq 24."""
        r_BT = teacher_rewards(batch, self.reward_scale)
        return Signal(advantage_BT=r_BT, token_reward_BT=r_BT)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 25."""
        return policy_gradient_loss(student, batch, signal, divisor, self.settings.clip)
