"""Between rollouts and a loss: the records of a micro-batch, the tensors that a loss takes, and their checks.

    MicroBatch (rows) → ScoredBatch (rows, groups, trajectories, signal)

Shapes: ``B`` rollouts of a micro-batch (prompt-major), ``T`` response tokens (right-padded),
``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from video_opd.algorithms.losses import truncated_weights
from video_opd.algorithms.method import Signal, Trajectories
from video_opd.errors import UserError
from video_opd.training.batches import Row
from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

TOKENS_OF_A_MEAN = 8  # at least
SINGLE_TOKEN = 5.0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The rows whose prompts go through the models together.

    ``groups`` are the rollouts of each row, None if they have not been sampled yet. With ``scored_ahead``,
    ``teacher`` and ``reference`` are their scores, None where the method needs none or there is no row.
    ``wait_for_teacher`` waits for those of a distant teacher that has been asked.
    """

    rows: Sequence[Row]
    groups: Sequence[Sequence[Rollout]] | None = None
    teacher: TokenLogprobs | None = None
    reference: TokenLogprobs | None = None
    wait_for_teacher: Callable[[], TokenLogprobs] | None = None
    scored_ahead: bool = False

    @property
    def prompts(self) -> list[EncodedPrompt]:
        return [row.prompt for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class ScoredBatch(MicroBatch):
    """A micro-batch with its trajectories and their signal, which are constant over the updates on them."""

    groups: Sequence[Sequence[Rollout]]
    trajectories: Trajectories
    signal: Signal


class RatioError(AssertionError):
    """π_θ/π_old is not 1 on the update that follows sampling: sampler and trainer are not the same model."""


def make_trajectories(
    rows: Sequence[Row],
    groups: Sequence[Sequence[Rollout]],
    student: TokenLogprobs,
    teacher: TokenLogprobs | None,
    reference: TokenLogprobs | None = None,
    max_weight: float | None = None,
) -> Trajectories:
    """The trajectories of a micro-batch, from the scores of student, teacher and reference.

    ``student`` scores them before the update. π_old is what was recorded while sampling; an annotation was
    not sampled, so its π_old is ``student`` itself. With ``max_weight``, sampler and trainer may differ:
    π_old is then the trainer's, and each token carries the truncated importance weight between the two. A
    token that teacher or reference masked is masked.
    """
    rollouts = [rollout for group in groups for rollout in group]
    current_BT = torch.where(student.mask_BT, student.logprobs_BT.detach(), 0.0)
    old_BT = current_BT.clone()
    for row, rollout in enumerate(rollouts):
        if rollout.logprobs is not None:
            old_BT[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs, dtype=old_BT.dtype)
    weight_BT = None
    if max_weight is not None:
        weight_BT = truncated_weights(current_BT, old_BT, student.mask_BT, max_weight)
        old_BT = current_BT
    device = old_BT.device
    teacher = None if teacher is None else teacher.to(device)
    reference = None if reference is None else reference.to(device)
    mask_BT = student.mask_BT
    for other in (teacher, reference):
        mask_BT = mask_BT if other is None else mask_BT & other.mask_BT
    return Trajectories(
        samples=[row.sample for row, group in zip(rows, groups, strict=True) for _ in group],
        rollouts=rollouts,
        old_BT=old_BT,
        mask_BT=mask_BT,
        teacher=teacher,
        reference=reference,
        old_full_BTV=None if student.full_BTV is None else student.full_BTV.detach(),
        weight_BT=weight_BT,
    )


def without_nonfinite(batch: Trajectories, student: TokenLogprobs, mode: str) -> Trajectories:
    """Raises :class:`UserError`, which names the sample, if a log-prob is nan or infinite; with ``mode``
    ``mask`` such tokens are taken out of the mask instead."""
    bad_BT = torch.zeros_like(batch.mask_BT)
    values = {"the student's": student.logprobs_BT.detach(), "the student's recorded": batch.old_BT}
    for name, scores in (("the teacher's", batch.teacher), ("the reference's", batch.reference)):
        if scores is not None:
            values[name] = scores.logprobs_BT
    for who, values_BT in values.items():
        found_BT = batch.mask_BT & ~values_BT.isfinite()
        if mode == "raise" and bool(found_BT.any()):
            row, token = found_BT.nonzero()[0].tolist()
            raise UserError(
                f"sample {batch.samples[row].id!r}: {who} log-prob of response token {token} is "
                f"{values_BT[row, token].item()}; check the checkpoint and its precision, or set "
                "loss.nonfinite to mask"
            )
        bad_BT |= found_BT
    return replace(batch, mask_BT=batch.mask_BT & ~bad_BT)


def distance(gaps: Sequence[float], *, low_precision: bool) -> float:
    """How far the log-probs of a rollout's tokens are from those that they should equal, in nats: the largest
    gap or, in low precision, the mean or a part of the largest, whichever is more.

    Rounding in bfloat16 has a long tail: of 96 tokens that Qwen3-VL-8B's shape wrote to prompts of 8,491
    tokens, one was off by 0.1 nats. A mistake (another position, other weights) shifts many tokens by more,
    or one by nats (the first, the last). So one token may be ``SINGLE_TOKEN`` times as far off as the mean.
    Fewer than ``TOKENS_OF_A_MEAN`` tokens count as so many, so that one of them is not all.
    """
    largest = float(np.max(gaps, initial=0.0))  # Python's max would pass over nan
    if not low_precision:
        return largest
    return float(np.max([sum(gaps) / max(len(gaps), TOKENS_OF_A_MEAN), largest / SINGLE_TOKEN]))


def check_sampler(
    rows: Sequence[Row], groups: Sequence[Sequence[Rollout]], student: TokenLogprobs, tolerance: float
) -> None:
    """Raises :class:`RatioError` if another engine sampled with other weights than the student's: what it
    recorded must be what the student gives, but for rounding, on the average over the tokens."""
    scores = iter(student.logprobs_BT.detach().tolist())
    for row, group in zip(rows, groups, strict=True):
        gaps = [
            abs(score - recorded)
            for rollout in group
            for score, recorded in zip(next(scores), rollout.recorded, strict=False)
            if math.isfinite(score)  # loss.nonfinite decides about the others
        ]
        mean = sum(gaps) / max(1, len(gaps))
        if not mean <= tolerance:
            raise RatioError(
                f"sample {row.sample.id!r}: the sampler's log-probs are off by {mean:.3g} nats a token from "
                f"the student's, above {tolerance:g}: vLLM has other weights, or computes otherwise"
            )


def check_ratio(
    batch: Trajectories, student: TokenLogprobs, tolerance: float, *, low_precision: bool = False
) -> None:
    """Raises :class:`RatioError` if a rollout's ratios are not 1 (but for rounding) right after sampling,
    which would be our own mistake. :func:`distance` says how far they are."""
    off_BT = torch.where(batch.mask_BT, (student.logprobs_BT.detach() - batch.old_BT).abs(), 0.0)
    for sample, off_T, mask_T in zip(batch.samples, off_BT.cpu(), batch.mask_BT.cpu(), strict=True):
        gaps = off_T[mask_T].tolist()
        found = distance(gaps, low_precision=low_precision)
        if not found <= tolerance:
            worst = int(np.argmax(gaps))
            mean = f", {sum(gaps) / len(gaps):.3g} on the average of {len(gaps)}" if low_precision else ""
            raise RatioError(
                f"sample {sample.id!r}: |log π_θ − log π_old| is {gaps[worst]:.3g} nats at response token "
                f"{worst}{mean} right after sampling, above loss.ratio_tolerance {tolerance:g}; the sampler "
                "and the trainer do not compute the same probabilities"
            )
