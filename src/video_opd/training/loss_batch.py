"""Between answers and an update: the tensors that a loss takes, their checks, and what is reported.

Shapes: ``B`` rollouts of a micro-batch (prompt-major), ``T`` response tokens (right-padded),
``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from video_opd.algorithms.losses import truncated_weights
from video_opd.algorithms.method import Signal, Trajectories
from video_opd.algorithms.signals import entropy, reverse_kl
from video_opd.errors import UserError
from video_opd.temporal import best_iou, parse_answer
from video_opd.training.batches import Row
from video_opd.training.step_metrics import RolloutRecord
from video_opd.types import Rollout, TokenLogprobs


class RatioError(AssertionError):
    """π_θ/π_old is not 1 on the update that follows sampling: sampler and trainer are not the same model."""


def make_trajectories(
    piece: Sequence[Row],
    groups: Sequence[Sequence[Rollout]],
    student: TokenLogprobs,
    teacher: TokenLogprobs | None,
    reference: TokenLogprobs | None = None,
    max_weight: float | None = None,
) -> Trajectories:
    """The constants of an update, from the student's scores before it.

    π_old is what was recorded while sampling. An annotation was not sampled: its π_old is ``student`` itself.
    With ``max_weight`` sampler and trainer may differ: π_old is then the trainer's, and each token carries
    the truncated importance weight between the two. Tokens that teacher or reference masked are masked.
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
    teacher, reference = _beside(teacher, old_BT), _beside(reference, old_BT)
    mask_BT = student.mask_BT
    for other in (teacher, reference):
        mask_BT = mask_BT if other is None else mask_BT & other.mask_BT
    return Trajectories(
        samples=[row.sample for row, group in zip(piece, groups, strict=True) for _ in group],
        rollouts=rollouts,
        old_BT=old_BT,
        mask_BT=mask_BT,
        teacher=teacher,
        reference=reference,
        old_full_BTV=None if student.full_BTV is None else student.full_BTV.detach(),
        weight_BT=weight_BT,
    )


def _beside(scores: TokenLogprobs | None, old_BT: torch.Tensor) -> TokenLogprobs | None:
    """On the student's device."""
    if scores is None:
        return None
    return TokenLogprobs(
        logprobs_BT=scores.logprobs_BT.to(old_BT.device),
        mask_BT=scores.mask_BT.to(old_BT.device),
        full_BTV=None if scores.full_BTV is None else scores.full_BTV.to(old_BT.device),
    )


def without_nonfinite(batch: Trajectories, student: TokenLogprobs, mode: str) -> Trajectories:
    """Tokens whose log-prob is nan or infinite: an error that names the sample, or out of the mask."""
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


def check_ratio(batch: Trajectories, student: TokenLogprobs, tolerance: float) -> None:
    """Right after sampling the ratio is 1 but for rounding; anything else is our own mistake."""
    off_BT = torch.where(batch.mask_BT, (student.logprobs_BT.detach() - batch.old_BT).exp() - 1.0, 0.0).abs()
    if off_BT.numel() and not bool((off_BT <= tolerance).all()):
        row, token = divmod(int(off_BT.argmax()), off_BT.shape[1])
        raise RatioError(
            f"sample {batch.samples[row].id!r}, response token {token}: |π_θ/π_old − 1| is "
            f"{off_BT[row, token].item():.3g} right after sampling, above loss.ratio_tolerance "
            f"{tolerance:g}; the sampler and the trainer do not compute the same probabilities"
        )


@torch.no_grad()
def make_records(
    piece: Sequence[Row],
    groups: Sequence[Sequence[Rollout]],
    batch: Trajectories,
    student: TokenLogprobs,
    signal: Signal,
    thinking: bool,
) -> list[RolloutRecord]:
    """What is reported of each rollout."""
    ratio_BT = (student.logprobs_BT - batch.old_BT).exp()
    unknown_BT = torch.full_like(ratio_BT, math.nan)
    teacher, reference = batch.teacher, batch.reference

    def known(x_BT: torch.Tensor | None) -> torch.Tensor:
        return unknown_BT if x_BT is None else x_BT

    columns = {
        "old": batch.old_BT,
        "ratio": ratio_BT,
        "reward": known(signal.token_reward_BT),
        "advantage": known(signal.advantage_BT),
        "teacher": known(None if teacher is None else teacher.logprobs_BT),
        "reference": known(None if reference is None else reference.logprobs_BT),
        "weight": known(batch.weight_BT),
        "current": student.logprobs_BT,
    }
    columns["entropy"] = columns["kl"] = unknown_BT
    if student.full_BTV is not None:
        columns["entropy"] = entropy(student.full_BTV)
        if teacher is not None and teacher.full_BTV is not None:
            columns["kl"] = reverse_kl(student.full_BTV, teacher.full_BTV)
    lists = {name: torch.where(batch.mask_BT, x, math.nan).tolist() for name, x in columns.items()}
    answer_rewards = None if signal.reward_B is None else signal.reward_B.tolist()
    records: list[RolloutRecord] = []
    for row, group in zip(piece, groups, strict=True):
        for index, rollout in enumerate(group):
            b, length = len(records), len(rollout.token_ids)
            answer = parse_answer(rollout.text, thinking=thinking)
            records.append(
                RolloutRecord(
                    position=row.position,
                    index=index,
                    sample_id=row.sample.id,
                    video=str(row.sample.video),
                    query=row.sample.query,
                    text=rollout.text,
                    token_ids=rollout.token_ids,
                    sampled=rollout.logprobs is not None,
                    truncated=rollout.truncated,
                    answer_reward=None if answer_rewards is None else answer_rewards[b],
                    rule=answer.rule,
                    span=answer.span,
                    spans=row.sample.spans,
                    iou=best_iou(answer.span, row.sample.spans) if row.sample.spans else None,
                    prompt_tokens=row.prompt.length,
                    video_tokens=row.prompt.video_tokens,
                    **{name: tuple(values[b][:length]) for name, values in lists.items()},
                )
            )
    return records
