"""OP-RKD: off-policy reverse-KL distillation (section C.1, eqs 23–25).

Who writes: nobody; the trajectory is the annotated span in the answer format.
Signal: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t) on the annotation's tokens (eq 24), where π_old is the
student before the first update on them.
Loss: Video-OPD's (eq 25). Off policy, its expected gradient is not that of a KL: it imitates a token in
proportion to how much likelier the teacher finds it, and unlearns one that the teacher finds less likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from video_opd.algorithms.losses import importance_surrogate
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.signals import scaled_reverse_kl
from video_opd.algorithms.trajectories import Annotated
from video_opd.config import LossConfig
from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


class OPRKD:
    def __init__(
        self, annotated: Annotated, settings: LossConfig | None = None, reward_scale: float = 1.0
    ) -> None:
        self.annotated, self.settings, self.reward_scale = annotated, settings or LossConfig(), reward_scale
        self.needs = Needs(teacher=True, annotation=True, reference=reward_scale != 1)

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        return self.annotated(samples, seeds)

    def signal(self, batch: Trajectories) -> Signal:
        """eq 24."""
        assert batch.teacher is not None, "op-rkd needs the teacher's log-probs"
        reference_BT = None if batch.reference is None else batch.reference.logprobs_BT
        r_BT = scaled_reverse_kl(batch.teacher.logprobs_BT, batch.old_BT, self.reward_scale, reference_BT)
        return Signal(advantage_BT=r_BT, token_reward_BT=r_BT)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 25."""
        assert signal.advantage_BT is not None
        return importance_surrogate(
            student.logprobs_BT,
            batch.old_BT,
            signal.advantage_BT,
            batch.mask_BT,
            divisor,
            clip=self.settings.clip,
        )
