"""What the loop asks of a method. No engine is named here.

Shapes: ``B`` trajectories (prompts × rollouts, prompt-major), ``T`` response tokens (right-padded),
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the loop computes for a method before it asks for a signal and a loss.

    ``sampling``: the student writes the trajectories, from one reading of the prompt; otherwise they are the
    annotation's text. ``distributions``: of student and teacher over the whole vocabulary at every position.
    ``reference``: the frozen initial student scores the trajectories, too. ``annotation``: rows without a
    span cannot be used.
    """

    sampling: bool = False
    teacher: bool = False
    distributions: bool = False
    reference: bool = False
    annotation: bool = False


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A micro-batch ready for an update: who wrote what, how probable it was, and what others say of it.

    Made once, before the first update on these trajectories, and constant from then on. ``old_BT`` [B, T] are
    the log-probs under the policy before that update (recorded while sampling), 0 where ``mask_BT`` [B, T] is
    False; ``old_full_BTV`` [B, T, V] its distributions, when the method needs them. ``weight_BT`` [B, T] are
    importance weights between sampler and trainer (None: they are the same model). ``samples`` and
    ``rollouts`` have one entry for each row.
    """

    samples: Sequence[Sample]
    rollouts: Sequence[Rollout]
    old_BT: torch.Tensor
    mask_BT: torch.Tensor
    teacher: TokenLogprobs | None = None
    reference: TokenLogprobs | None = None
    old_full_BTV: torch.Tensor | None = None
    weight_BT: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What trajectories are credited with, constant like they are.

    ``advantage_BT`` [B, T] multiplies each token's probability ratio; None for a loss without one.
    ``token_reward_BT`` [B, T] is a teacher's r_t; ``reward_B`` [B] the reward of whole answers; None where a
    method has no such thing.
    """

    advantage_BT: torch.Tensor | None = None
    token_reward_BT: torch.Tensor | None = None
    reward_B: torch.Tensor | None = None


class Method(Protocol):
    """Trajectories × signal × loss. A method is one small file that answers these three questions."""

    needs: Needs

    def trajectories(
        self, policy: Policy, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """A list of rollouts for each prompt.

        ``prefix`` is what ``policy.prefill`` returned, or the prompts themselves; ``samples`` are their rows.
        ``seeds`` has a list for each prompt, and in it a non-negative integer for each rollout, as
        ``policy.sample`` takes them: ``seeds[i][j]`` decides rollout j of prompt i, and nothing else does.
        """
        ...

    def signal(self, batch: Trajectories) -> Signal:
        """What the trajectories are credited with, detached."""
        ...

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """A scalar to minimise; summed over the micro-batches of all ranks it is the loss of the step."""
        ...
