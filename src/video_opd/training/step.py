"""Optimiser steps: sample and score once, then update once or several times.

Everything that differs between methods is in the method.

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
from video_opd.algorithms.method import Signal, Trajectories
from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.modes import call_through
from video_opd.models.protocols import Teacher
from video_opd.models.teachers import stack
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


@dataclass(kw_only=True)
class _Piece:
    """A micro-batch. What is constant over the updates on it is filled in by the first of them."""

    rows: Sequence[Row]
    groups: Sequence[Sequence[Rollout]]
    batch: Trajectories | None = None
    signal: Signal | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch whose trajectories are there: what one or several updates are made from."""

    pieces: Sequence[_Piece]
    divisor: float | None  # None: no video of the whole batch could be decoded


class Stepper:
    """Makes batches ready, and updates on them. ``watch`` adds up the seconds of each stage."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, parts: Parts, watch: Stopwatch) -> None:
        self.recipe, self.accelerator, self.parts, self.watch = recipe, accelerator, parts, watch
        self.needs = parts.method.needs
        self.full = self.needs.distributions or (
            recipe.run.analytic_kl and (recipe.teacher.distributions or not self.needs.teacher)
        )
        # Scored as it was sampled; the teacher's own distribution is never sharpened.
        self.temperature = recipe.sampling.temperature if self.needs.sampling else 1.0

    def prepare(self, step: int, planned: int, rows: Sequence[Row]) -> Prepared:
        """The trajectories of this process's ``rows`` of a global batch of ``planned`` prompts.

        ``step`` (from 0) is the first optimiser step that will be made on them.
        """
        from accelerate.utils import gather_object

        # Prompts of like length together: a micro-batch is padded to its longest, and the cut is free.
        rows = sorted(rows, key=lambda row: row.prompt.length)
        rollouts = self.sample(step, rows)
        lengths = gather_object([len(r.token_ids) for group in rollouts.values() for r in group])
        pieces = micro_batches(
            rows, planned, self.accelerator.num_processes, self.recipe.optim.micro_batch_size
        )
        return Prepared(
            pieces=[_Piece(rows=piece, groups=[rollouts[row.position] for row in piece]) for piece in pieces],
            divisor=divisor(lengths, self.recipe.loss.reduction) if lengths else None,
        )

    def update(self, step: int, prepared: Prepared) -> StepResult:
        """One optimiser step."""
        if prepared.divisor is None:  # there is nothing to learn from
            return StepResult(records=(), loss=0.0, grad_norm=math.nan, updated=False)
        records: list[RolloutRecord] = []
        loss = 0.0
        for i, piece in enumerate(prepared.pieces):
            last = i + 1 == len(prepared.pieces)
            # Gradients are added up locally and exchanged once, by the backward of the last piece.
            with self.accelerator.no_sync(self.parts.forward_module) if not last else nullcontext():
                if piece.rows:
                    part, new = self._update(piece, prepared.divisor)
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
            once = self.needs.sampling and recipe.model.engine == "prefix"
            with self.watch.stage("prefill"):
                prefix = parts.policy.prefill(prompts) if once else prompts
            with self.watch.stage("sample"):
                groups = parts.method.trajectories(parts.policy, prefix, [row.sample for row in piece], seeds)
            for row, group in zip(piece, groups, strict=True):
                rollouts[row.position] = group
        return rollouts

    def _update(self, piece: _Piece, divisor: float) -> tuple[float, list[RolloutRecord]]:
        """Student, loss and backward of one micro-batch, and before the first of its updates everything that
        stays: (its part of the loss, its records)."""
        parts, recipe = self.parts, self.recipe
        prompts = [row.prompt for row in piece.rows]
        responses = [[rollout.token_ids for rollout in group] for group in piece.groups]
        teacher = reference = None
        if piece.batch is None:
            with self.watch.stage("teacher"):
                teacher = self._score(parts.teacher, prompts, responses) if self.needs.teacher else None
            with self.watch.stage("reference"):
                reference = self._score(parts.reference, prompts, responses) if self.needs.reference else None
        with self.watch.stage("update"):
            student = parts.policy.logprobs(
                prompts, responses, grad=True, full=self.full, temperature=self.temperature
            )
            if piece.batch is None:
                limit = recipe.loss.max_importance_weight
                batch = make_trajectories(piece.rows, piece.groups, student, teacher, reference, limit)
                piece.batch = without_nonfinite(batch, student, recipe.loss.nonfinite)
                piece.signal = parts.method.signal(piece.batch)
                check_ratio(piece.batch, student, recipe.ratio_tolerance)
            assert piece.signal is not None
            # An update may have broken what was finite before it.
            batch = without_nonfinite(piece.batch, student, recipe.loss.nonfinite)
            loss = parts.method.loss(student, batch, piece.signal, divisor)
            # Data-parallel wrappers average over ranks; ``divisor`` is already global, so undo that.
            self.accelerator.backward(loss * self.accelerator.num_processes)
            records = make_records(
                piece.rows, piece.groups, batch, student, piece.signal, recipe.prompt.thinking
            )
            return loss.item(), records

    def _score(
        self,
        judge: Teacher | None,
        prompts: Sequence[EncodedPrompt],
        responses: Sequence[Sequence[Sequence[int]]],
    ) -> TokenLogprobs:
        """What the teacher, or the initial student, says of the trajectories."""
        assert judge is not None, "the method needs a model that was not built"
        teacher = judge is self.parts.teacher
        full = self.full and teacher
        temperature = 1.0 if teacher else self.temperature
        size = self.recipe.teacher.micro_batch_size or len(prompts)
        pieces = [
            judge.logprobs(prompts[i : i + size], responses[i : i + size], full=full, temperature=temperature)
            for i in range(0, len(prompts), size)
        ]
        return pieces[0] if len(pieces) == 1 else stack(pieces)

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
