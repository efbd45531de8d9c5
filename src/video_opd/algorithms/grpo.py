"""GRPO, the paper's baseline and how its teachers were made (sections 2.2, D.1; eqs 1–3).

Who samples: the student, a group of G = 8 rollouts for each prompt.
Signal: the reward of the whole answer (timestamp-aware IoU), normalised within the group (eq 2), the same for
every token of the answer.
Loss: −Σ_t A · π_θ(a_t|s_t) / π_old(a_t|s_t), clipped on request, plus β times the KL to the initial student
(eq 1, k3 estimator), mean over trajectories. With ratio 1 its gradient is eq 3's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from video_opd.algorithms.losses import importance_surrogate, k3_penalty
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.rewards import Reward, checked
from video_opd.algorithms.signals import group_advantages
from video_opd.algorithms.trajectories import sampled
from video_opd.config import LossConfig, SamplingConfig
from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


class GRPO:
    """``annotated``: the reward reads the annotation, so rows without one cannot be used."""

    def __init__(
        self,
        sampling: SamplingConfig,
        reward: Reward,
        settings: LossConfig | None = None,
        *,
        normalise_std: bool = True,
        annotated: bool = True,
    ) -> None:
        self.sampling, self.reward, self.settings = sampling, reward, settings or LossConfig()
        self.normalise_std = normalise_std
        self.needs = Needs(sampling=True, reference=self.settings.kl_beta > 0, annotation=annotated)

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        return sampled(policy, prefix, self.sampling, seeds)

    def signal(self, batch: Trajectories) -> Signal:
        """eq 2; a micro-batch holds whole groups."""
        pairs = zip(batch.samples, batch.rollouts, strict=True)
        rewards = [checked(self.reward, sample, rollout.text) for sample, rollout in pairs]
        reward_B = torch.tensor(rewards, dtype=batch.old_BT.dtype, device=batch.old_BT.device)
        advantage_B = group_advantages(reward_B, self.sampling.rollouts, self.normalise_std)
        return Signal(advantage_BT=advantage_B[:, None].expand_as(batch.old_BT), reward_B=reward_B)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        assert signal.advantage_BT is not None
        loss = importance_surrogate(
            student.logprobs_BT,
            batch.old_BT,
            signal.advantage_BT,
            batch.mask_BT,
            divisor,
            clip=self.settings.clip,
            weight_BT=batch.weight_BT,
        )
        if self.settings.kl_beta:
            assert batch.reference is not None, "the KL needs the initial student's log-probs"
            reference_BT = batch.reference.logprobs_BT
            loss = loss + self.settings.kl_beta * k3_penalty(
                student.logprobs_BT, reference_BT, batch.mask_BT, divisor
            )
        return loss
