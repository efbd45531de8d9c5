"""What the loop asks of a method. No engine is named here.

Shapes: ``B`` trajectories (prompts × rollouts, prompt-major), ``T`` response tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from video_opd.models.protocols import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A micro-batch ready for an update: who wrote what, how probable it was, and the teacher's view.

    ``old_BT`` [B, T] are the log-probs of sampling time, 0 where ``mask_BT`` [B, T] is False. ``samples`` and
    ``rollouts`` have one entry for each row.
    """

    samples: Sequence[Sample]
    rollouts: Sequence[Rollout]
    old_BT: torch.Tensor
    mask_BT: torch.Tensor
    teacher: TokenLogprobs | None


class Method(Protocol):
    """Trajectories × signal × loss. A method is one small file that answers these three questions."""

    uses_teacher: bool

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """A list of rollouts for each prompt.

        ``prefix`` is what ``policy.prefill`` returned, or the prompts themselves; ``samples`` are their rows.
        ``seeds`` has a list for each prompt, and in it a non-negative integer for each rollout, as
        ``policy.sample`` takes them: ``seeds[i][j]`` decides rollout j of prompt i, and nothing else does.
        """
        ...

    def signal(self, batch: Trajectories) -> torch.Tensor:
        """What each token is credited with, detached, [B, T]."""
        ...

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal_BT: torch.Tensor, divisor: float
    ) -> torch.Tensor:
        """A scalar to minimise; summed over the micro-batches of all ranks it is the loss of the step."""
        ...
