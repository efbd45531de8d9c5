"""The interface between the training loop and a method. It names no model and no engine.

Shapes: ``B`` trajectories (prompts × rollouts, prompt-major), ``T`` response tokens (right-padded),
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from video_opd.models.interfaces import Sampler
from video_opd.types import Rollout, Sample, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The inputs that the loop prepares before it asks a method for a signal and a loss.

    ``sampling``: the student samples the trajectories; without it, they are the text of the annotations.
    ``teacher``: the teacher scores the trajectories. ``distributions``: student and teacher give their
    log-probabilities of the whole vocabulary at every position. ``reference``: the frozen initial student
    scores the trajectories, too. ``annotation``: rows without an annotated span cannot be used.
    """

    sampling: bool = False
    teacher: bool = False
    distributions: bool = False
    reference: bool = False
    annotation: bool = False


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """A micro-batch of responses that is ready for an update, with every model's log-probs of it.

    It is built once, before the first update on these trajectories; later updates on them reuse it.
    ``samples`` and ``rollouts`` have one entry for each row. ``old_BT`` [B, T] holds the log-probs under the
    policy before that update (recorded while sampling), and 0 where ``mask_BT`` [B, T] is False.
    ``old_full_BTV`` [B, T, V] holds the distributions of the same policy if the method needs them.
    ``weight_BT`` [B, T] holds importance weights between sampler and trainer; None means that both are the
    same model.
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
    """The credit that trajectories are given. It is constant during an update. A field is None if
    the method does not use it.

    ``advantage_BT`` [B, T] multiplies the probability ratio of each token in the loss. ``token_reward_BT``
    [B, T] is a teacher's r_t. ``reward_B`` [B] is the reward of each whole response.
    """

    advantage_BT: torch.Tensor | None = None
    token_reward_BT: torch.Tensor | None = None
    reward_B: torch.Tensor | None = None


class TrajectorySource(Protocol):
    """The source of a method's trajectories: one of the two in ``algorithms/trajectories.py``."""

    def __call__(
        self, sampler: Sampler, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        """A list of rollouts for each prompt.

        ``prefix`` is what ``policy.prefill`` returned, or the prompts themselves; ``samples`` are their rows.
        ``seeds`` has one list for each prompt, with a non-negative integer for each rollout, as
        ``policy.sample`` takes them: rollout j of prompt i depends on ``seeds[i][j]`` and on no other seed.
        """
        ...


class Method(Protocol):
    """A method is defined by its trajectories, its signal and its loss."""

    needs: Needs

    @property
    def trajectories(self) -> TrajectorySource: ...

    def signal(self, batch: Trajectories) -> Signal:
        """The credit of every trajectory, detached."""
        ...

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """A scalar to minimise. Its sum over the micro-batches of all processes is the loss of the step."""
        ...
