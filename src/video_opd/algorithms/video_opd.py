"""Video-OPD: on-policy distillation for temporal grounding (section 3.1, eqs 4–6).

Who samples: the student, one rollout for each prompt, at temperature 1 (eq 4).
Signal: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t) for every token, no normalisation (eq 5).
Loss: −Σ_t sg(r_t) · π_θ(a_t|s_t) / π_old(a_t|s_t), mean over trajectories (eq 6).
The teacher never writes a token; the annotation is never looked at.

Beyond the paper: ``loss.estimator`` full or topk takes the reverse KL at each visited state from the whole
distributions instead of from the sampled token; ``loss.baseline`` kl subtracts r_t's expectation;
``teacher.reward_scale`` λ > 1 goes beyond the teacher, relative to the initial student (G-OPD).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from video_opd.algorithms.losses import (
    importance_surrogate,
    reverse_kl_loss,
    topk_reverse_kl_loss,
)
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.signals import kl_baseline, scaled_reverse_kl
from video_opd.algorithms.trajectories import sampled
from video_opd.config import LossConfig, SamplingConfig
from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


class VideoOPD:
    def __init__(
        self, sampling: SamplingConfig, settings: LossConfig | None = None, reward_scale: float = 1.0
    ) -> None:
        self.sampling, self.settings = sampling, settings or LossConfig()
        self.reward_scale = reward_scale
        self.needs = Needs(
            sampling=True,
            teacher=True,
            distributions=self.settings.estimator != "sampled" or self.settings.baseline == "kl",
            reference=reward_scale != 1,
        )

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """eq 4."""
        return sampled(policy, prefix, self.sampling, seeds)

    def signal(self, batch: Trajectories) -> Signal:
        """eq 5."""
        assert batch.teacher is not None, "video-opd needs the teacher's log-probs"
        reference_BT = None if batch.reference is None else batch.reference.logprobs_BT
        r_BT = scaled_reverse_kl(batch.teacher.logprobs_BT, batch.old_BT, self.reward_scale, reference_BT)
        if self.settings.estimator != "sampled":
            return Signal(token_reward_BT=r_BT)
        advantage_BT = r_BT
        if self.settings.baseline == "kl":
            assert batch.old_full_BTV is not None and batch.teacher.full_BTV is not None
            advantage_BT = r_BT - kl_baseline(batch.old_full_BTV, batch.teacher.full_BTV)
        return Signal(advantage_BT=advantage_BT, token_reward_BT=r_BT)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 6, or the analytic reverse KL at the visited states."""
        if signal.advantage_BT is not None:
            return importance_surrogate(
                student.logprobs_BT,
                batch.old_BT,
                signal.advantage_BT,
                batch.mask_BT,
                divisor,
                clip=self.settings.clip,
                weight_BT=batch.weight_BT,
            )
        assert batch.teacher is not None and batch.teacher.full_BTV is not None
        assert student.full_BTV is not None, "an analytic estimator needs the student's distributions"
        whole = student.full_BTV, batch.teacher.full_BTV, batch.mask_BT, divisor
        if self.settings.estimator == "topk":
            return topk_reverse_kl_loss(*whole, self.settings.top_k)
        return reverse_kl_loss(*whole)
