"""The rows that each step and each process takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import encode
from training_cases import make_recipe, sample

from video_opd.errors import UserError
from video_opd.training.batches import BatchPlan, BatchStream, micro_batches

PROMPT = encode("when does the red circle appear?")


def plan_of(rows: int, **optim: Any) -> BatchPlan:
    recipe = make_recipe(Path("run"), optim={"micro_batch_size": 1, **optim})
    return BatchPlan.of(recipe, [sample(i) for i in range(rows)])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 30), batch=st.integers(1, 9), epochs=st.integers(1, 3), start=st.integers(0, 8))
def test_each_epoch_has_each_row_once_and_a_resume_sees_the_same(
    rows: int, batch: int, epochs: int, start: int
):
    plan = plan_of(rows, batch_size=batch, epochs=epochs)
    batches = [[s.id for s in step] for step in plan.batches()]
    assert len(batches) == plan.total_steps == epochs * math.ceil(rows / batch)
    ids = [i for step in batches for i in step]
    everything = sorted(f"s{i}" for i in range(rows))
    for epoch in range(epochs):
        assert sorted(ids[epoch * rows : (epoch + 1) * rows]) == everything
    assert [[s.id for s in step] for step in plan.batches(start)] == batches[start:]


def test_the_order_changes_with_epoch_and_seed_and_not_without_shuffling():
    plan = plan_of(20, batch_size=20, epochs=2)
    first, second = ([s.id for s in step] for step in plan.batches())
    assert first != second and sorted(first) == sorted(second)
    in_order = make_recipe(Path("run"), data={"shuffle": False})
    assert BatchPlan.of(in_order, [sample(i) for i in range(20)]).order(1) == list(range(20))


def test_max_steps_goes_through_the_data_as_often_as_it_takes():
    plan = plan_of(5, batch_size=4, max_steps=7)
    sizes = [len(step) for step in plan.batches()]
    assert sizes == [4, 1, 4, 1, 4, 1, 4]
    with pytest.raises(UserError, match=r"train\.jsonl has no rows"):
        plan_of(0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 13),
    batch=st.integers(1, 5),
    world=st.integers(1, 3),
    broken=st.sets(st.integers(0, 12)),
)
def test_ranks_share_a_batch_and_a_broken_video_moves_nobody(
    rows: int, batch: int, world: int, broken: set[int]
):
    plan = plan_of(rows, batch_size=batch, epochs=2)
    bad = {f"s{i}" for i in broken}
    streams = []
    for rank in range(world):
        stream = BatchStream(plan, 0, rank, world)
        loader = ((s, PROMPT) for s in stream.wanted() if s.id not in bad)
        streams.append(list(stream.batches(loader)))
    for step, planned in enumerate(plan.batches()):
        got = {row.position: row.sample.id for stream in streams for row in stream[step][1]}
        assert got == {i: s.id for i, s in enumerate(planned) if s.id not in bad}
        pieces = [micro_batches(stream[step][1], stream[step][0], world, 2) for stream in streams]
        assert len({len(piece) for piece in pieces}) == 1  # in lockstep
        assert all(
            [row for part in piece for row in part] == stream[step][1]
            for piece, stream in zip(pieces, streams, strict=True)
        )


def test_a_loader_is_asked_only_for_what_a_step_needs():
    asked = []

    def loader(samples: Any) -> Any:
        for s in samples:
            asked.append(s.id)
            yield s, PROMPT

    stream = BatchStream(plan_of(8, batch_size=4), 0)
    steps = stream.batches(loader(stream.wanted()))
    assert len(next(steps)[1]) == 4 and len(asked) == 4
