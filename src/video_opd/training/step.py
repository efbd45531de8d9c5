"""One optimiser step: sample, score, update. Everything that differs between methods is in the method.

Shapes: ``B`` rollouts of a micro-batch (prompt-major), ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from video_opd.algorithms.losses import divisor
from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.modes import call_through
from video_opd.seeds import derive_seed
from video_opd.training.batches import Row, micro_batches
from video_opd.training.build import Parts
from video_opd.training.metrics import RolloutRecord, Stopwatch
from video_opd.training.trajectories import check_ratio, make_records, make_trajectories, without_nonfinite
from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Of this process: its rollouts, its part of the loss, and the global gradient norm."""

    records: Sequence[RolloutRecord]
    loss: float
    grad_norm: float
    updated: bool


class Stepper:
    """Runs optimiser steps. ``watch`` adds up the seconds of each stage."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, parts: Parts, watch: Stopwatch) -> None:
        self.recipe, self.accelerator, self.parts, self.watch = recipe, accelerator, parts, watch

    def run(self, step: int, planned: int, rows: Sequence[Row]) -> StepResult:
        """Step ``step`` (from 0) on this process's ``rows`` of a global batch of ``planned`` prompts."""
        from accelerate.utils import gather_object

        rollouts = self.sample(step, rows)
        lengths = gather_object([len(r.token_ids) for group in rollouts.values() for r in group])
        if not lengths:  # no video of the whole batch could be decoded: there is nothing to learn from
            return StepResult(records=(), loss=0.0, grad_norm=math.nan, updated=False)
        count = divisor(lengths, self.recipe.loss.reduction)

        records: list[RolloutRecord] = []
        loss = 0.0
        pieces = micro_batches(
            rows, planned, self.accelerator.num_processes, self.recipe.optim.micro_batch_size
        )
        for i, piece in enumerate(pieces):
            last = i + 1 == len(pieces)
            # Gradients are added up locally and exchanged once, by the backward of the last piece.
            with self.accelerator.no_sync(self.parts.forward_module) if not last else nullcontext():
                if piece:
                    part, new = self._update(piece, [rollouts[row.position] for row in piece], count)
                    records += new
                    loss += part
                else:
                    self._update_nothing()
        grad_norm, updated = self._apply(step)
        return StepResult(records=records, loss=loss, grad_norm=grad_norm, updated=updated)

    def sample(self, step: int, rows: Sequence[Row]) -> dict[int, list[Rollout]]:
        """The rollouts of each row, by its position. Draws depend on (seed, step, sample id, index) alone."""
        recipe, parts = self.recipe, self.parts
        size = recipe.sampling.micro_batch_size or recipe.optim.micro_batch_size
        rollouts: dict[int, list[Rollout]] = {}
        for i in range(0, len(rows), size):
            piece = rows[i : i + size]
            prompts = [row.prompt for row in piece]
            seeds = [
                [
                    derive_seed(recipe.run.seed, "rollout", step, row.sample.id, g)
                    for g in range(recipe.sampling.rollouts)
                ]
                for row in piece
            ]
            with self.watch.stage("prefill"):
                prefix = parts.policy.prefill(prompts) if recipe.model.engine == "prefix" else prompts
            with self.watch.stage("sample"):
                groups = parts.method.trajectories(parts.policy, prefix, [row.sample for row in piece], seeds)
            for row, group in zip(piece, groups, strict=True):
                rollouts[row.position] = group
        return rollouts

    def _update(
        self, piece: Sequence[Row], groups: Sequence[Sequence[Rollout]], count: float
    ) -> tuple[float, list[RolloutRecord]]:
        """Teacher, student, loss and backward of one micro-batch: (its part of the loss, its records)."""
        parts, full = self.parts, self.recipe.run.analytic_kl
        prompts = [row.prompt for row in piece]
        responses = [[rollout.token_ids for rollout in group] for group in groups]
        with self.watch.stage("teacher"):
            teacher = self._score(prompts, responses, full)
        with self.watch.stage("update"):
            student = parts.policy.logprobs(prompts, responses, grad=True, full=full)
            batch = make_trajectories(piece, groups, student, teacher)
            batch = without_nonfinite(batch, student, self.recipe.loss.nonfinite)
            signal_BT = parts.method.signal(batch)
            check_ratio(batch, student, self.recipe.ratio_tolerance)
            loss = parts.method.loss(student, batch, signal_BT, count)
            # Data-parallel wrappers average over ranks; ``count`` is already global, so undo that.
            self.accelerator.backward(loss * self.accelerator.num_processes)
            records = make_records(piece, groups, batch, student, signal_BT, self.recipe.prompt.thinking)
            return loss.item(), records

    def _score(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Sequence[Sequence[int]]], full: bool
    ) -> TokenLogprobs | None:
        if not self.parts.method.uses_teacher:
            return None
        assert self.parts.teacher is not None, "the method needs a teacher"
        size = self.recipe.teacher.micro_batch_size or len(prompts)
        pieces = [
            self.parts.teacher.logprobs(prompts[i : i + size], responses[i : i + size], full=full)
            for i in range(0, len(prompts), size)
        ]
        return pieces[0] if len(pieces) == 1 else _stack(pieces)

    def _update_nothing(self) -> None:
        """A backward with zero gradients, where other ranks have rows and this one has none left."""
        parts = self.parts

        def zero() -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in parts.parameters]).sum() * 0.0

        with self.watch.stage("update"):
            if parts.forward_module is parts.model:
                return  # one process: nobody waits for it
            self.accelerator.backward(call_through(parts.forward_module, parts.model, zero))

    def _apply(self, step: int) -> tuple[float, bool]:
        """Clips and steps: (global gradient norm before clipping, whether the weights were touched)."""
        parts, optim = self.parts, self.recipe.optim
        with self.watch.stage("update"):
            norm = float(self.accelerator.clip_grad_norm_(parts.parameters, optim.max_grad_norm))
            finite = math.isfinite(norm)
            if not finite and self.recipe.loss.nonfinite == "raise":
                raise UserError(
                    f"step {step + 1}: the gradient norm is {norm}; lower optim.lr, or set loss.nonfinite "
                    "to mask, which leaves such a step out"
                )
            if finite:
                parts.optimizer.step()
            parts.optimizer.zero_grad(set_to_none=True)
        return norm, finite


def _stack(pieces: Sequence[TokenLogprobs]) -> TokenLogprobs:
    """Joins micro-batches that were padded to different lengths."""
    longest = max(piece.mask_BT.shape[1] for piece in pieces)

    def join(name: str) -> torch.Tensor:
        padded = []
        for piece in pieces:
            x = getattr(piece, name)
            shape = (x.shape[0], longest - x.shape[1], *x.shape[2:])
            padded.append(torch.cat([x, x.new_zeros(shape)], dim=1))
        return torch.cat(padded)

    return TokenLogprobs(
        logprobs_BT=join("logprobs_BT"),
        mask_BT=join("mask_BT"),
        full_BTV=None if pieces[0].full_BTV is None else join("full_BTV"),
    )
