"""An optimiser step: sample → score → loss → backward for each micro-batch, then rescale, clip and step.

Everything that differs between methods is in the method. The first update on a batch samples and scores its
trajectories; later updates reuse them. With the ``prefix`` engine, the prefill that responses are sampled
from keeps its graph and is the forward of the first update, too. A micro-batch is therefore prefilled,
sampled, scored and differentiated before the next one, so that memory holds one graph at a time. With
``teacher.overlap`` it holds two: while a distant teacher scores a micro-batch, the next one is sampled.

The loss is divided by a count over the global batch, which is known only when every process has sampled all
of its trajectories. Gradients are linear in one over that count: each micro-batch is divided by an assumed
divisor, the planned number of rollouts, and the sum of the gradients is rescaled once.

Shapes: ``B`` rollouts of a micro-batch (prompt-major), ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from video_opd.algorithms.losses import Reduction, loss_divisor
from video_opd.algorithms.method import Needs
from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.interfaces import (
    CollectiveTeacher,
    DistantTeacher,
    Responses,
    Teacher,
    VisitingTeacher,
)
from video_opd.models.modes import call_through
from video_opd.models.teachers import join_logprobs
from video_opd.seeds import derive_seed
from video_opd.training.batches import Row, micro_batches
from video_opd.training.components import Components
from video_opd.training.loss_batch import (
    MicroBatch,
    ScoredBatch,
    check_ratio,
    check_sampler,
    make_trajectories,
    without_nonfinite,
)
from video_opd.training.rollout_records import RolloutRecord, make_records
from video_opd.training.sharding import Shards
from video_opd.training.step_metrics import Measured, measure, token_values
from video_opd.training.stopwatch import Stopwatch
from video_opd.types import Rollout, TokenLogprobs

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings that a step reads; :meth:`of` takes them from a recipe."""

    seed: int
    rollouts: int  # trajectories of a prompt
    temperature: float  # used for sampling and for the student's log-probs
    micro_batch_size: int  # prompts
    sampling_micro_batch_size: int | None  # prompts; None: each micro-batch is sampled by its first update
    teacher_micro_batch_size: int | None  # prompts; None: a micro-batch at a time
    overlaps: bool  # whether a micro-batch is sampled while a distant teacher scores the one before
    reduces_each_micro_batch: bool  # whether sharded gradients are; otherwise once a step
    gathers_by_layer: bool  # whether sharded layers are gathered one at a time
    prefix_engine: bool
    prefills: bool  # whether responses are sampled from a prefix, which the first update then continues
    distributions: bool  # whether student and teacher give distributions over the whole vocabulary
    reduction: Reduction
    nonfinite: Literal["raise", "mask"]
    clip: tuple[float, float] | None
    max_importance_weight: float | None
    ratio_tolerance: float
    low_precision: bool
    max_grad_norm: float
    thinking: bool
    shown_rollouts: int  # rollouts of a step that are recorded in full

    @classmethod
    def of(cls, recipe: Recipe, needs: Needs) -> StepSettings:
        return cls(
            seed=recipe.run.seed,
            rollouts=recipe.rollouts,
            temperature=recipe.temperature,
            micro_batch_size=recipe.optim.micro_batch_size,
            sampling_micro_batch_size=recipe.sampling_micro_batch_size,
            teacher_micro_batch_size=recipe.teacher.micro_batch_size,
            overlaps=recipe.overlaps_servers,
            reduces_each_micro_batch=recipe.model.reduce == "micro_batch",
            gathers_by_layer=recipe.model.gather == "layer",
            prefix_engine=recipe.model.engine == "prefix",
            prefills=needs.sampling and recipe.model.engine == "prefix" and not recipe.samples_with_vllm,
            distributions=needs.distributions or recipe.measures_analytic_kl,
            reduction=recipe.loss.reduction,
            nonfinite=recipe.loss.nonfinite,
            clip=recipe.loss.clip,
            max_importance_weight=recipe.loss.importance_limit,
            ratio_tolerance=recipe.ratio_tolerance,
            low_precision=recipe.low_precision,
            max_grad_norm=recipe.optim.max_grad_norm,
            thinking=recipe.prompt.thinking,
            shown_rollouts=recipe.run.log_rollouts,
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This process's rows of a global batch of ``planned`` prompts, in as many micro-batches as on every
    process. They are :class:`ScoredBatch` from the first update on (``scored``); one without rows stays as it
    is."""

    planned: int
    micro_batches: Sequence[MicroBatch]
    shown: frozenset[int]  # positions whose rollouts are recorded in full, should they be among the first
    scored: bool = False


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """``loss``, ``records`` and ``measured`` are of this process; ``grad_norm`` is global.

    ``batch`` holds what later updates on the same trajectories reuse. ``continued_prefill`` says that the
    forward with gradients continued the prefill of sampling.
    """

    batch: Batch
    loss: float
    records: Sequence[RolloutRecord]
    measured: Sequence[Measured]
    grad_norm: float
    updated: bool
    continued_prefill: bool

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """The token ids of this process's rollouts, prompt-major."""
        groups = [group for micro in self.batch.micro_batches for group in micro.groups or ()]
        return [rollout.token_ids for group in groups for rollout in group]


@dataclass(kw_only=True)
class _Sampled:
    """A micro-batch with its trajectories, and the prefix that its update's forward continues."""

    micro: MicroBatch
    prefix: Any

    def take_prefix(self) -> Any:
        """The prefix, which is nobody else's from then on: its memory is to end with the graph's."""
        prefix, self.prefix = self.prefix, None
        return prefix


@dataclass(frozen=True, kw_only=True)
class _Differentiated:
    """A micro-batch after its backward; ``loss`` is its share of the loss, over the assumed divisor."""

    batch: ScoredBatch
    loss: float
    records: Sequence[RolloutRecord]
    measured: Measured


class Stepper:
    """Cuts a batch into micro-batches, and updates on them. ``watch`` adds up the seconds of each stage."""

    def __init__(
        self, settings: StepSettings, accelerator: Accelerator, components: Components, watch: Stopwatch
    ) -> None:
        self.settings, self.accelerator, self.components = settings, accelerator, components
        self.watch = watch
        self.method, self.policy = components.method, components.policy
        self.shards = Shards(
            components.model,
            components.masters,
            each_micro_batch=settings.reduces_each_micro_batch,
            by_layer=settings.gathers_by_layer,
        )
        self._layers = self.shards.gathered_layers()
        alone = components.forward_module is components.model
        self._overlaps = settings.overlaps and alone and not self.shards.units
        # Whether the backward is cut at the prefix, which saves memory: not where activations are kept, nor
        # under DDP, which exchanges the gradients of a single backward.
        self._cuts = settings.prefix_engine and components.recompute and alone
        needs = self.method.needs
        scorers = ((needs.teacher, components.teacher), (needs.reference, components.reference))
        self._visiting = [
            scorer for needed, scorer in scorers if needed and isinstance(scorer, VisitingTeacher)
        ]
        # The prompts whose trajectories are made together, before the first micro-batch's update; None: each
        # micro-batch's are a part of its update. An annotation is there from the beginning, so a teacher that
        # comes to the device once scores them all.
        self._ahead = settings.sampling_micro_batch_size
        if self._visiting and not needs.sampling:
            self._ahead = settings.micro_batch_size

    def prepare(self, step: int, planned: int, rows: Sequence[Row]) -> Batch:
        """This process's ``rows`` of a global batch of ``planned`` prompts, in micro-batches.

        ``step`` (from 0) is the first optimiser step on them. Trajectories are sampled now if they are
        sampled in micro-batches of another size.
        """
        settings = self.settings
        rows = _by_length(rows)
        cut = self._cut(rows, planned)
        if self._ahead is None:
            batches = [MicroBatch(rows=some) for some in cut]
        else:
            size = self._ahead
            batches = self.together(lambda: self._sampled_ahead(step, rows, cut, size))
            batches = self._scored_in_one_turn(batches)
        # The first rollouts of the global batch are among the first ones of each process.
        positions = sorted(row.position for row in rows)
        shown = positions[: math.ceil(settings.shown_rollouts / settings.rollouts)]
        return Batch(planned=planned, micro_batches=batches, shown=frozenset(shown))

    def update(self, step: int, batch: Batch) -> StepResult:
        """One optimiser step.

        Raises :class:`UserError` for numbers that are not finite, unless ``loss.nonfinite`` masks them.
        """
        done: list[_Differentiated] = []
        scored: list[MicroBatch] = []
        following: _Sampled | None = None
        for i, micro in enumerate(batch.micro_batches):
            left = batch.micro_batches[i + 1 :]
            with self._exchanging_gradients(last=not left):
                if not micro.rows:
                    self._attend(micro, batch)
                    scored.append(micro)
                elif isinstance(micro, ScoredBatch):
                    done.append(self._differentiate_again(micro, batch))
                    scored.append(done[-1].batch)
                else:
                    sampled = following or self._sampled(step, micro)
                    following = None
                    if self._overlaps and left and left[0].rows:
                        following = self._sampled(step, left[0])
                    done.append(self._score_and_differentiate(sampled, batch))
                    scored.append(done[-1].batch)
            if self.shards.each_micro_batch:
                with self.watch.stage("update"):
                    self.shards.reduce()
        divisor = self._divisor(scored)
        factor = self._assumed_divisor(batch) / divisor if divisor else math.nan
        grad_norm, updated = self._apply(step, factor) if divisor else self._leave_out()
        if updated and self.components.sampler is not None:
            self.components.sampler.weights_changed()
        return StepResult(
            batch=Batch(planned=batch.planned, micro_batches=scored, shown=batch.shown, scored=True),
            loss=sum(each.loss for each in done) * factor if done else 0.0,
            records=[record for each in done for record in each.records],
            measured=[each.measured for each in done],
            grad_norm=grad_norm,
            updated=updated,
            continued_prefill=not batch.scored and self._continues_prefill,
        )

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, in which this process runs the student. Where its layers are gathered one
        at a time, all processes call it together."""
        return work() if self._layers is None else self._layers.together(work)

    def scores_before_update(
        self, planned: int, rows: Sequence[Row], responses: Mapping[str, Sequence[tuple[int, ...]]]
    ) -> dict[str, torch.Tensor]:
        """Scores responses by the forward of the first update, without its backward, for a check.

        ``responses`` holds those of some rows, by sample id. Their forward is one micro-batch of the update:
        its other rows, which it is padded with, are given the responses of the first. If the rows are in
        several micro-batches, the one that pads them most is taken. Returns the log-probs [G, T] of each of
        its rows that has responses, by sample id. Every process calls it, as a wrapper's forward asks for.
        """
        cuts = [cut for cut in self._cut(_by_length(rows), planned) if {*responses} & {*_ids(cut)}]
        with self.accelerator.no_sync(self.components.forward_module):
            if not cuts:
                self._forward_of_nothing()
                return {}
            micro = max(cuts, key=lambda cut: _padding(cut, responses))
            filler = next(iter(responses.values()))
            groups = [responses.get(name, filler) for name in _ids(micro)]
            prefix: Any = [row.prompt for row in micro]
            if self._continues_prefill:
                prefix = self.policy.prefill(prefix, grad=True)
            scores_BT = self._student_scores(prefix, groups).logprobs_BT.detach()
        split = scores_BT.split([len(group) for group in groups])
        return {name: s_GT for name, s_GT in zip(_ids(micro), split, strict=True) if name in responses}

    def _sampled(self, step: int, micro: MicroBatch) -> _Sampled:
        """The micro-batch with trajectories, about which a distant teacher has been asked."""
        if micro.groups is not None:
            return _Sampled(micro=micro, prefix=micro.prompts)
        prefix, groups = self.together(lambda: self._sample(step, micro.rows, grad=True))
        return _Sampled(micro=self._with_teacher_asked(replace(micro, groups=groups)), prefix=prefix)

    def _with_teacher_asked(self, micro: MicroBatch) -> MicroBatch:
        """The micro-batch, about which the teacher has been asked, if it is a distant one."""
        teacher = self.components.teacher
        if not (self.method.needs.teacher and isinstance(teacher, DistantTeacher) and micro.rows):
            return micro
        prompts, responses = micro.prompts, token_ids(micro.groups or ())
        size = self.settings.teacher_micro_batch_size or len(prompts)
        waits = [
            teacher.ask(
                prompts[i : i + size],
                responses[i : i + size],
                full=self.settings.distributions,
                temperature=1.0,
            )
            for i in range(0, len(prompts), size)
        ]
        return replace(micro, wait_for_teacher=lambda: join_logprobs([wait() for wait in waits]))

    def _score_and_differentiate(self, sampled: _Sampled, batch: Batch) -> _Differentiated:
        """The first update's share: the scores of teacher and reference, the student's forward, the signal,
        and the backward."""
        settings, micro, prefix = self.settings, sampled.micro, sampled.take_prefix()
        assert micro.groups is not None
        groups, responses = micro.groups, token_ids(micro.groups)
        teacher, reference = self._score(micro, responses)

        def update() -> _Differentiated:
            nonlocal prefix
            student, go_on = self._student_forward(prefix, responses)
            del prefix  # the graph keeps the keys and values that it needs
            if self.components.sampler is not None:
                check_sampler(micro.rows, groups, student, self.components.sampler.tolerance)
            trajectories = without_nonfinite(
                make_trajectories(
                    micro.rows, groups, student, teacher, reference, settings.max_importance_weight
                ),
                student,
                settings.nonfinite,
            )
            signal = self.method.signal(trajectories)
            check_ratio(trajectories, student, settings.ratio_tolerance, low_precision=settings.low_precision)
            scored = ScoredBatch(rows=micro.rows, groups=groups, trajectories=trajectories, signal=signal)
            return self._differentiate(scored, student, go_on, batch)

        with self.watch.stage("update"):
            return self.together(update)

    def _differentiate_again(self, scored: ScoredBatch, batch: Batch) -> _Differentiated:
        """A later update's share: the student's forward and the backward."""

        def update() -> _Differentiated:
            student, go_on = self._student_forward(scored.prompts, token_ids(scored.groups))
            return self._differentiate(scored, student, go_on, batch)

        with self.watch.stage("update"):
            return self.together(update)

    def _attend(self, micro: MicroBatch, batch: Batch) -> None:
        """Takes part in what other processes do with their rows of a micro-batch of which this one has
        none."""
        if not batch.scored:
            if self._ahead is None:
                self.together(lambda: None)
            self._score(micro, ())
        self.together(self._backward_of_nothing)

    def _differentiate(
        self,
        scored: ScoredBatch,
        student: TokenLogprobs,
        go_on: Callable[[], None],
        batch: Batch,
    ) -> _Differentiated:
        # An earlier update may have broken what was finite before it.
        trajectories = without_nonfinite(scored.trajectories, student, self.settings.nonfinite)
        loss = self.method.loss(student, trajectories, scored.signal, self._assumed_divisor(batch))
        # Data-parallel wrappers average over processes; the count is already global, so this undoes it.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        go_on()
        values = token_values(trajectories, student, scored.signal)
        return _Differentiated(
            batch=scored,
            loss=loss.item(),
            records=make_records(scored, values, self.settings.thinking, batch.shown),
            measured=measure(scored, values, self.settings.clip, self.settings.thinking),
        )

    def _sample(
        self, step: int, rows: Sequence[Row], *, grad: bool
    ) -> tuple[Any, Sequence[Sequence[Rollout]]]:
        """(prefix, the rollouts of each row); the prefix is the prompts themselves if none is prefilled.

        Draws depend on (seed, step, sample id, index) alone.
        """
        settings = self.settings
        prefix: Any = [row.prompt for row in rows]
        if settings.prefills:
            with self.watch.stage("prefill"):
                prefix = self.policy.prefill(prefix, grad=grad)
        seeds = [
            [derive_seed(settings.seed, "rollout", step, row.sample.id, g) for g in range(settings.rollouts)]
            for row in rows
        ]
        with self.watch.stage("sample"):
            sampler = self.components.sampler or self.policy
            groups = self.method.trajectories(sampler, prefix, [row.sample for row in rows], seeds)
        return prefix, groups

    def _sampled_ahead(
        self, step: int, rows: Sequence[Row], cut: Sequence[Sequence[Row]], size: int
    ) -> list[MicroBatch]:
        """The micro-batches of ``cut``, whose rows are sampled ``size`` prompts at a time. A distant teacher
        is asked about each as soon as it is complete."""

        def rollouts() -> Iterator[Sequence[Rollout]]:
            for i in range(0, len(rows), size):
                yield from self._sample(step, rows[i : i + size], grad=False)[1]

        groups = rollouts()
        return [
            self._with_teacher_asked(MicroBatch(rows=some, groups=[next(groups) for _ in some]))
            for some in cut
        ]

    def _student_forward(self, prefix: Any, responses: Responses) -> tuple[TokenLogprobs, Callable[[], None]]:
        """(the student's scores, with their graph, what has to be called after their backward)."""
        if not self._cuts:
            return self._student_scores(prefix, responses), lambda: None
        if isinstance(prefix, Sequence):
            prefix = self.policy.prefill(prefix, grad=True)
        ending, go_on = prefix.cut()
        return self._student_scores(ending, responses), go_on

    def _student_scores(self, prefix: Any, responses: Responses) -> TokenLogprobs:
        return self.policy.logprobs(
            prefix,
            responses,
            grad=True,
            full=self.settings.distributions,
            temperature=self.settings.temperature,
        )

    def _score(
        self, micro: MicroBatch, responses: Responses
    ) -> tuple[TokenLogprobs | None, TokenLogprobs | None]:
        """(the teacher's scores of the responses, the reference's); None where the method needs none of them.

        All processes call it for each of their micro-batches, those without rows, too.
        """
        settings, needs = self.settings, self.method.needs
        if micro.scored_ahead:
            return micro.teacher, micro.reference
        teacher = reference = None
        if micro.wait_for_teacher is not None:
            with self.watch.stage("teacher"):
                teacher = micro.wait_for_teacher()
        elif needs.teacher:
            with self.watch.stage("teacher"):
                # The teacher's distribution is never sharpened: its temperature is 1, of a distant one, too.
                teacher = self._scores(
                    self.components.teacher, micro, responses, full=settings.distributions, temperature=1.0
                )
        if needs.reference:
            with self.watch.stage("reference"):
                reference = self.together(  # it may be the student without its adapters
                    lambda: self._scores(
                        self.components.reference,
                        micro,
                        responses,
                        full=False,
                        temperature=settings.temperature,
                    )
                )
        return teacher, reference

    def _scores(
        self,
        scorer: Teacher | None,
        micro: MicroBatch,
        responses: Responses,
        *,
        full: bool,
        temperature: float,
    ) -> TokenLogprobs | None:
        """None if the micro-batch has no rows."""
        assert scorer is not None, "the method needs a model that was not built"
        prompts = micro.prompts
        # Calls of a teacher that processes hold together are as many on each of them.
        together = isinstance(scorer, CollectiveTeacher)
        count = self.settings.micro_batch_size if together else len(prompts)
        size = self.settings.teacher_micro_batch_size or max(1, count)
        scores = []
        for i in range(0, count, size):
            if asked := prompts[i : i + size]:
                given = responses[i : i + size]
                scores.append(scorer.logprobs(asked, given, full=full, temperature=temperature))
            else:
                assert isinstance(scorer, CollectiveTeacher)
                scorer.attend()
        if not scores:
            return None
        return scores[0] if len(scores) == 1 else join_logprobs(scores)

    @property
    def _continues_prefill(self) -> bool:
        """Whether the first update's forward continues the prefill that responses are sampled from."""
        return self.settings.prefills and self.settings.sampling_micro_batch_size is None

    def _cut(self, rows: Sequence[Row], planned: int) -> list[Sequence[Row]]:
        return micro_batches(rows, planned, self.accelerator.num_processes, self.settings.micro_batch_size)

    def _scored_in_one_turn(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with the scores of a teacher that takes up memory only during its turn; others
        score them later."""
        if not self._visiting:
            return batches
        with ExitStack() as turns:
            for scorer in self._visiting:
                turns.enter_context(scorer.turn())
            scores = [self._score(micro, token_ids(micro.groups or ())) for micro in batches]
        return [
            replace(micro, teacher=teacher, reference=reference, wait_for_teacher=None, scored_ahead=True)
            for micro, (teacher, reference) in zip(batches, scores, strict=True)
        ]

    def _exchanging_gradients(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are added up locally, and exchanged by the backward of the last micro-batch. Shards are
        reduced afterwards (:meth:`Shards.reduce`)."""
        if self.shards.units or not last:
            return self.accelerator.no_sync(self.components.forward_module)
        return nullcontext()

    def _backward_of_nothing(self) -> None:
        """A backward with zero gradients: other processes have rows left, and wait for this one's."""
        with self.watch.stage("update"):
            if (zero := self._forward_of_nothing()) is not None:
                self.accelerator.backward(zero)

    def _forward_of_nothing(self) -> torch.Tensor | None:
        """A zero that depends on every weight; None if no process waits for another's forward: there is one
        process, or the weights are sharded."""
        model, wrapper = self.components.model, self.components.forward_module
        if wrapper is model:
            return None

        def zero() -> torch.Tensor:
            return torch.stack([parameter.sum() for parameter in self.components.parameters]).sum() * 0.0

        return call_through(wrapper, model, zero)

    def _assumed_divisor(self, batch: Batch) -> float:
        """The planned number of rollouts. With reduction sum that is the divisor unless videos fail; with
        token_mean the divisor counts tokens."""
        return float(batch.planned * self.settings.rollouts)

    def _divisor(self, scored: Sequence[MicroBatch]) -> float:
        """The count that the loss is divided by, over all processes; 0 if there are no trajectories."""
        from accelerate.utils import gather_object

        rollouts = [rollout for micro in scored for group in micro.groups or () for rollout in group]
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        return sum(gather_object([loss_divisor(lengths, self.settings.reduction)]))

    def _apply(self, step: int, factor: float) -> tuple[float, bool]:
        """Clips and steps with ``factor`` times the gradients that were added up.

        Returns the global gradient norm before clipping, and whether the weights were updated.
        """
        optimizer = self.components.optimizer
        with self.watch.stage("update"):
            if not self.shards.each_micro_batch:
                self.shards.reduce()
            self.shards.to_shards()
            if factor != 1.0:
                for parameter in self.shards.parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            norm = self.shards.clip(self.accelerator, self.settings.max_grad_norm)
            finite = math.isfinite(norm)
            if not finite and self.settings.nonfinite == "raise":
                raise UserError(
                    f"step {step + 1}: the gradient norm is {norm}; lower optim.lr, or set loss.nonfinite "
                    "to mask, which leaves such a step out"
                )
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.shards.gather()
        return norm, finite

    def _leave_out(self) -> tuple[float, bool]:
        """As :meth:`_apply`, for a batch of which no video could be decoded: nothing is updated."""
        self.components.optimizer.zero_grad(set_to_none=True)
        return math.nan, False


def token_ids(groups: Sequence[Sequence[Rollout]]) -> Responses:
    return [[rollout.token_ids for rollout in group] for group in groups]


def _by_length(rows: Sequence[Row]) -> list[Row]:
    """Prompts of like length go together: a micro-batch is padded to its longest."""
    return sorted(rows, key=lambda row: row.prompt.length)


def _ids(rows: Sequence[Row]) -> list[str]:
    return [row.sample.id for row in rows]


def _padding(rows: Sequence[Row], names: Collection[str]) -> int:
    """How many tokens a micro-batch of ``rows`` pads the shortest of the named ones with."""
    lengths = {row.sample.id: row.prompt.length for row in rows}
    return max(lengths.values()) - min(length for name, length in lengths.items() if name in names)
