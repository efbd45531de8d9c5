"""Supervised fine-tuning on the annotation (section 2.1).

Who writes: nobody; the trajectory is the annotated span in the answer format.
Signal: none.
Loss: −Σ_t log π_θ(a_t|s_t), mean over trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from video_opd.algorithms.losses import negative_log_likelihood
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.trajectories import Annotated
from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


class SFT:
    needs = Needs(annotation=True)

    def __init__(self, annotated: Annotated) -> None:
        self.annotated = annotated

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        return self.annotated(samples, seeds)

    def signal(self, batch: Trajectories) -> Signal:
        return Signal()

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        return negative_log_likelihood(student.logprobs_BT, batch.mask_BT, divisor)
