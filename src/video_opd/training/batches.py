"""The rows of each step, and their order. Both are functions of the recipe alone.

Step k therefore has the same rows whether the run was killed, resumed, or split over processes. A row whose
video cannot be decoded leaves its place empty: its batch is one smaller, and all others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.seeds import derive_seed
from video_opd.types import EncodedPrompt, Sample


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The rows of every optimiser step. The last batch of an epoch may be smaller; no row is dropped."""

    samples: Sequence[Sample]
    batch_size: int  # prompts, over all processes
    total_steps: int  # optimiser steps
    updates_per_batch: int  # optimiser steps on one batch
    seed: int
    shuffle: bool

    @classmethod
    def of(cls, recipe: Recipe, samples: Sequence[Sample]) -> BatchPlan:
        """Raises :class:`UserError` when there is nothing to train on."""
        samples = samples[: recipe.data.limit]
        if not samples:
            raise UserError(f"{recipe.data.train} has no rows: nothing to train on")
        updates = recipe.optim.updates_per_batch
        steps = updates * recipe.optim.epochs * -(-len(samples) // recipe.optim.batch_size)
        return cls(
            samples=samples,
            batch_size=recipe.optim.batch_size,
            total_steps=recipe.optim.max_steps or steps,
            updates_per_batch=updates,
            seed=recipe.run.seed,
            shuffle=recipe.data.shuffle,
        )

    def order(self, epoch: int) -> list[int]:
        """The positions in ``samples`` in the order of ``epoch``, a function of (seed, epoch)."""
        count = len(self.samples)
        if not self.shuffle:
            return list(range(count))
        return (
            np.random.Generator(np.random.Philox(derive_seed(self.seed, "order", epoch)))
            .permutation(count)
            .tolist()
        )

    def batches(self, start: int = 0) -> Iterator[list[Sample]]:
        """The global batches from step ``start`` to the last; ``start`` is the first step on its batch."""
        assert start % self.updates_per_batch == 0, "a resume starts with a new batch"
        batches_an_epoch = -(-len(self.samples) // self.batch_size)
        order: list[int] = []
        for step in range(start, self.total_steps, self.updates_per_batch):
            epoch, place = divmod(step // self.updates_per_batch, batches_an_epoch)
            if place == 0 or not order:
                order = self.order(epoch)
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [self.samples[row] for row in rows]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt of a batch; ``position`` is its place in the global batch."""

    position: int
    sample: Sample
    prompt: EncodedPrompt


class BatchStream:
    """This process's rows of each batch, from a loader that decodes ahead.

    The loader yields ``(sample, prompt)`` for the samples of :meth:`wanted`, in order, without those whose
    video could not be decoded.
    """

    def __init__(self, plan: BatchPlan, start: int, rank: int = 0, world: int = 1) -> None:
        self.plan, self.start, self.rank, self.world = plan, start, rank, world

    def wanted(self) -> list[Sample]:
        """Every sample that this process will need, in order."""
        return [
            sample for batch in self.plan.batches(self.start) for sample in batch[self.rank :: self.world]
        ]

    def batches(self, loader: Iterable[tuple[Sample, EncodedPrompt]]) -> Generator[tuple[int, list[Row]]]:
        """``(size of the planned global batch, this process's rows)`` for each batch."""
        source = iter(loader)
        head: tuple[Sample, EncodedPrompt] | None = None
        for batch in self.plan.batches(self.start):
            rows = []
            for position in range(self.rank, len(batch), self.world):
                # Taken from the loader only now, so that the wait for decoding counts for this step.
                head = next(source, None) if head is None else head
                if head is not None and head[0].id == batch[position].id:
                    rows.append(Row(position=position, sample=head[0], prompt=head[1]))
                    head = None
            yield len(batch), rows


def micro_batches(rows: Sequence[Row], planned: int, world: int, size: int) -> list[Sequence[Row]]:
    """``rows`` in micro-batches of ``size``, as many on every process.

    A process with fewer rows than others (end of an epoch, videos that cannot be decoded) gets empty ones.
    """
    count = math.ceil(math.ceil(planned / world) / size)
    return [rows[i * size : (i + 1) * size] for i in range(count)]
