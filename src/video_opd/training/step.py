"""Optimiser steps: sample and score once, then update once or several times.

Everything that differs between methods is in the method. With the ``prefix`` engine the reading of a prompt
that its answers are sampled from is recorded, and is the forward of the first update too: a micro-batch is
then read, sampled, scored and differentiated before the next one, so that one graph is held at a time.

Shapes: ``B`` rollouts of a micro-batch (prompt-major), ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from video_opd.algorithms.losses import loss_divisor
from video_opd.algorithms.method import Signal, Trajectories
from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.interfaces import Teacher
from video_opd.models.modes import call_through
from video_opd.models.teachers import stack
from video_opd.seeds import derive_seed
from video_opd.training.batches import Row, micro_batches
from video_opd.training.components import Components
from video_opd.training.loss_batch import check_ratio, make_records, make_trajectories, without_nonfinite
from video_opd.training.sharding import Shards, whole
from video_opd.training.step_metrics import RolloutRecord, Stopwatch
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
    groups: Sequence[Sequence[Rollout]] = ()
    batch: Trajectories | None = None
    signal: Signal | None = None


@dataclass(kw_only=True)
class Prepared:
    """A batch: what one or several updates are made from."""

    pieces: Sequence[_Piece]
    planned: int  # prompts of the global batch
    divisor: float | None = None  # of the loss; None before all trajectories are there


class Stepper:
    """Makes batches ready, and updates on them. ``watch`` adds up the seconds of each stage."""

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, components: Components, watch: Stopwatch
    ) -> None:
        self.recipe, self.accelerator, self.components, self.watch = recipe, accelerator, components, watch
        self.needs = components.method.needs
        self.full = self.needs.distributions or (
            recipe.run.analytic_kl and (recipe.teacher.distributions or not self.needs.teacher)
        )
        # Scored as it was sampled; the teacher's own distribution is never sharpened.
        self.temperature = recipe.sampling.temperature if self.needs.sampling else 1.0
        self.shards = Shards(components.model)
        self.reads_once = self.needs.sampling and recipe.model.engine == "prefix"

    @property
    def samples_while_updating(self) -> bool:
        """Whether the first update on a batch samples it: a prompt is read once for both."""
        return self.reads_once and self.recipe.sampling.micro_batch_size is None

    def prepare(self, step: int, planned: int, rows: Sequence[Row]) -> Prepared:
        """This process's ``rows`` of a global batch of ``planned`` prompts, in micro-batches, and their
        trajectories, unless the first update makes them.

        ``step`` (from 0) is the first optimiser step that will be made on them.
        """
        # Prompts of like length together: a micro-batch is padded to its longest, and the cut is free.
        rows = sorted(rows, key=lambda row: row.prompt.length)
        size, processes = self.recipe.optim.micro_batch_size, self.accelerator.num_processes
        pieces = [_Piece(rows=piece) for piece in micro_batches(rows, planned, processes, size)]
        prepared = Prepared(pieces=pieces, planned=planned)
        if not self.samples_while_updating:
            rollouts = self.sample(step, rows)
            for piece in pieces:
                piece.groups = [rollouts[row.position] for row in piece.rows]
            prepared.divisor = self._divisor(pieces)
        return prepared

    def update(self, step: int, prepared: Prepared) -> StepResult:
        """One optimiser step."""
        samples = prepared.divisor is None
        # Until the answers are there, what the divisor will most likely be: their number.
        assumed = prepared.divisor or float(prepared.planned * self.recipe.sampling.rollouts)
        records: list[RolloutRecord] = []
        loss = 0.0
        for i, piece in enumerate(prepared.pieces if prepared.divisor != 0 else ()):
            last = i + 1 == len(prepared.pieces)
            # Gradients are added up locally and exchanged once, by the backward of the last piece.
            alone = self.shards.units or not last  # shards are reduced when all is added up
            with self.accelerator.no_sync(self.components.forward_module) if alone else nullcontext():
                if piece.rows:
                    part, new = self._update(piece, assumed, step if samples else None)
                    records += new
                    loss += part
                else:
                    self._update_nothing()
        if samples:
            prepared.divisor = self._divisor(prepared.pieces)
        if not prepared.divisor:  # no video of the whole batch could be decoded
            self.components.optimizer.zero_grad(set_to_none=True)
            return StepResult(records=(), loss=0.0, grad_norm=math.nan, updated=False)
        grad_norm, updated = self._apply(step, assumed / prepared.divisor)
        return StepResult(
            records=records, loss=loss * assumed / prepared.divisor, grad_norm=grad_norm, updated=updated
        )

    def sample(self, step: int, rows: Sequence[Row]) -> dict[int, list[Rollout]]:
        """The rollouts of each row, by its position."""
        size = self.recipe.sampling.micro_batch_size or self.recipe.optim.micro_batch_size
        rollouts: dict[int, list[Rollout]] = {}
        for i in range(0, len(rows), size):
            piece = rows[i : i + size]
            prompts = [row.prompt for row in piece]
            with self.watch.stage("prefill"):
                prefix = self.components.policy.prefill(prompts) if self.reads_once else prompts
            for row, group in zip(piece, self._trajectories(step, piece, prefix), strict=True):
                rollouts[row.position] = group
        return rollouts

    def _trajectories(self, step: int, rows: Sequence[Row], prefix: Any) -> list[list[Rollout]]:
        """The rollouts of each row. Draws depend on (seed, step, sample id, index) alone."""
        seed, count = self.recipe.run.seed, self.recipe.sampling.rollouts
        seeds = [[derive_seed(seed, "rollout", step, row.sample.id, g) for g in range(count)] for row in rows]
        samples = [row.sample for row in rows]
        with self.watch.stage("sample"):
            return self.components.method.trajectories(self.components.policy, prefix, samples, seeds)

    def _divisor(self, pieces: Sequence[_Piece]) -> float:
        """Of the loss, from the lengths of all answers of all processes; 0 if there are none."""
        from accelerate.utils import gather_object

        lengths = gather_object([len(r.token_ids) for p in pieces for group in p.groups for r in group])
        return loss_divisor(lengths, self.recipe.loss.reduction)

    def _update(
        self, piece: _Piece, divisor: float, sample_at: int | None
    ) -> tuple[float, list[RolloutRecord]]:
        """Student, loss and backward of one micro-batch, and before the first of its updates everything that
        stays: (its part of the loss, its records). It is sampled first with ``sample_at``, this step."""
        components, recipe = self.components, self.recipe
        prompts = [row.prompt for row in piece.rows]
        prefix: Any = prompts
        if sample_at is not None:
            with self.watch.stage("prefill"):
                prefix = components.policy.prefill(prompts, grad=True)
            piece.groups = self._trajectories(sample_at, piece.rows, prefix)
        responses = [[rollout.token_ids for rollout in group] for group in piece.groups]
        teacher = reference = None
        if piece.batch is None:
            with self.watch.stage("teacher"):
                teacher = self._score(components.teacher, prompts, responses) if self.needs.teacher else None
            with self.watch.stage("reference"):
                reference = (
                    self._score(components.reference, prompts, responses) if self.needs.reference else None
                )
        with self.watch.stage("update"):
            student = components.policy.logprobs(
                prefix, responses, grad=True, full=self.full, temperature=self.temperature
            )
            del prefix  # the graph keeps what it needs of keys and values
            if piece.batch is None:
                limit = recipe.loss.max_importance_weight
                batch = make_trajectories(piece.rows, piece.groups, student, teacher, reference, limit)
                piece.batch = without_nonfinite(batch, student, recipe.loss.nonfinite)
                piece.signal = components.method.signal(piece.batch)
                check_ratio(piece.batch, student, recipe.ratio_tolerance)
            assert piece.signal is not None
            # An update may have broken what was finite before it.
            batch = without_nonfinite(piece.batch, student, recipe.loss.nonfinite)
            loss = components.method.loss(student, batch, piece.signal, divisor)
            # Data-parallel wrappers average over ranks; ``divisor`` is already global, so undo that.
            self.accelerator.backward(loss * self.accelerator.num_processes)
            records = make_records(
                piece.rows, piece.groups, batch, student, piece.signal, recipe.prompt.thinking
            )
            return loss.item(), records

    def _score(
        self,
        scorer: Teacher | None,
        prompts: Sequence[EncodedPrompt],
        responses: Sequence[Sequence[Sequence[int]]],
    ) -> TokenLogprobs:
        """What the teacher, or the initial student, says of the trajectories."""
        assert scorer is not None, "the method needs a model that was not built"
        teacher = scorer is self.components.teacher
        full = self.full and teacher
        temperature = 1.0 if teacher else self.temperature
        size = self.recipe.teacher.micro_batch_size or len(prompts)
        pieces = [
            scorer.logprobs(
                prompts[i : i + size], responses[i : i + size], full=full, temperature=temperature
            )
            for i in range(0, len(prompts), size)
        ]
        return pieces[0] if len(pieces) == 1 else stack(pieces)

    def _update_nothing(self) -> None:
        """A backward with zero gradients, where other ranks have rows and this one has none left."""
        components = self.components

        def zero() -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in components.parameters]).sum() * 0.0

        with self.watch.stage("update"):
            if components.forward_module is components.model:
                return  # one process, or shards: nobody waits for it
            self.accelerator.backward(call_through(components.forward_module, components.model, zero))

    def _apply(self, step: int, factor: float) -> tuple[float, bool]:
        """Clips and steps, with ``factor`` times the gradients that were added up: (global gradient norm
        before clipping, whether the weights were touched)."""
        components, optim = self.components, self.recipe.optim
        with self.watch.stage("update"):
            self.shards.reduce()
            parameters = self.shards.parameters
            for parameter in parameters if factor != 1.0 else ():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
            norm = whole(self.accelerator.clip_grad_norm_(parameters, optim.max_grad_norm)).item()
            finite = math.isfinite(norm)
            if not finite and self.recipe.loss.nonfinite == "raise":
                raise UserError(
                    f"step {step + 1}: the gradient norm is {norm}; lower optim.lr, or set loss.nonfinite "
                    "to mask, which leaves such a step out"
                )
            if finite:
                components.optimizer.step()
            components.optimizer.zero_grad(set_to_none=True)
            self.shards.gather()
        return norm, finite
