"""SFT: supervised fine-tuning on the annotation (section 2.1).

Who samples: nobody. The trajectory is the annotated span in the answer format.
Signal: none.
Loss: −Σ_t log π_θ(a_t|s_t), mean over trajectories.
"""

from __future__ import annotations

import torch

from video_opd.algorithms.losses import negative_log_likelihood
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.trajectories import AnnotatedTrajectories
from video_opd.types import TokenLogprobs


class SFT:
    needs = Needs(annotation=True)

    def __init__(self, trajectories: AnnotatedTrajectories) -> None:
        self.trajectories = trajectories

    def signal(self, batch: Trajectories) -> Signal:
        return Signal()

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        return negative_log_likelihood(student.logprobs_BT, batch.mask_BT, divisor)
