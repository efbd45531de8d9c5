"""GRPO: the paper's baseline, and the way its teachers were trained (sections 2.2, D.1; eqs 1–3).

Who samples: the student, a group of G = 8 rollouts for each prompt.
Signal: the reward of the whole response (timestamp-aware IoU), normalised within its group (eq 2); every
token of the response gets the same value.
Loss: −Σ_t A · π_θ(a_t|s_t) / π_old(a_t|s_t), clipped if asked for, plus β times the KL to the initial student
(eq 1, k3 estimator), mean over trajectories. Where the ratio is 1, its gradient is that of eq 3.
"""

from __future__ import annotations

import torch

from video_opd.algorithms.losses import k3_penalty
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.policy_gradient import policy_gradient_loss
from video_opd.algorithms.rewards import Reward, checked_reward
from video_opd.algorithms.signals import group_advantages
from video_opd.algorithms.trajectories import SampledTrajectories
from video_opd.config import GRPOLossConfig, GRPOSamplingConfig
from video_opd.types import TokenLogprobs


class GRPO:
    """``annotated``: the reward compares with the annotation, so rows without one cannot be used."""

    def __init__(
        self,
        sampling: GRPOSamplingConfig,
        reward: Reward,
        settings: GRPOLossConfig | None = None,
        *,
        normalise_std: bool = True,
        annotated: bool = True,
    ) -> None:
        self.trajectories = SampledTrajectories(sampling)
        self.rollouts, self.reward, self.settings = sampling.rollouts, reward, settings or GRPOLossConfig()
        self.normalise_std = normalise_std
        self.needs = Needs(sampling=True, reference=self.settings.kl_beta > 0, annotation=annotated)

    def signal(self, batch: Trajectories) -> Signal:
        """eq 2. The micro-batch must hold whole groups."""
        pairs = zip(batch.samples, batch.rollouts, strict=True)
        rewards = [checked_reward(self.reward, sample, rollout.text) for sample, rollout in pairs]
        reward_B = torch.tensor(rewards, dtype=batch.old_BT.dtype, device=batch.old_BT.device)
        advantage_B = group_advantages(reward_B, self.rollouts, self.normalise_std)
        return Signal(advantage_BT=advantage_B[:, None].expand_as(batch.old_BT), reward_B=reward_B)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 1."""
        loss = policy_gradient_loss(student, batch, signal, divisor, self.settings.clip)
        if self.settings.kl_beta:
            assert batch.reference is not None, "the KL needs the initial student's log-probs"
            reference_BT = batch.reference.logprobs_BT
            loss = loss + self.settings.kl_beta * k3_penalty(
                student.logprobs_BT, reference_BT, batch.mask_BT, divisor
            )
        return loss
