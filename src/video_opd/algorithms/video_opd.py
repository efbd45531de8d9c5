"""Video-OPD: on-policy distillation for temporal grounding (section 3.1, eqs 4–6).

Who samples: the student, one rollout for each prompt, at temperature 1 (eq 4).
Signal: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t) for every token, no normalisation (eq 5).
Loss: −Σ_t sg(r_t) · π_θ(a_t|s_t) / π_old(a_t|s_t), mean over trajectories (eq 6).
The teacher never writes a token; the annotation is never looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from video_opd.algorithms.losses import importance_surrogate
from video_opd.algorithms.method import Trajectories
from video_opd.algorithms.signals import sampled_reverse_kl
from video_opd.config import SamplingConfig
from video_opd.models.protocols import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


class VideoOPD:
    uses_teacher = True

    def __init__(self, sampling: SamplingConfig) -> None:
        self.sampling = sampling

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """eq 4: τ ~ π_θ(·|v, q), with the log-prob of each token as it was sampled."""
        return policy.sample(
            prefix,
            n=self.sampling.rollouts,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            seeds=seeds,
        )

    def signal(self, batch: Trajectories) -> torch.Tensor:
        """eq 5."""
        assert batch.teacher is not None, "video-opd needs the teacher's log-probs"
        return sampled_reverse_kl(batch.teacher.logprobs_BT, batch.old_BT)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal_BT: torch.Tensor, divisor: float
    ) -> torch.Tensor:
        """eq 6."""
        return importance_surrogate(student.logprobs_BT, batch.old_BT, signal_BT, batch.mask_BT, divisor)
