"""The method on real tiny models, its tensors, and which rows a step takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import encode, model, processor
from training_cases import make_recipe, sample

from video_opd.algorithms.method import Trajectories
from video_opd.algorithms.video_opd import VideoOPD
from video_opd.config import ModelConfig, OnPolicySamplingConfig
from video_opd.errors import UserError
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.training.batches import BatchPlan, BatchStream, Row, micro_batches
from video_opd.training.components import freeze
from video_opd.training.loss_batch import check_ratio, make_trajectories, without_nonfinite
from video_opd.types import Rollout, TokenLogprobs


def rollout(*logprobs: float) -> Rollout:
    return Rollout(token_ids=tuple(range(len(logprobs))), logprobs=logprobs, text="", truncated=False)


def scores(values: list[list[float]], lengths: list[int]) -> TokenLogprobs:
    logprobs = torch.tensor(values)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(lengths)[:, None]
    return TokenLogprobs(logprobs_BT=torch.where(mask, logprobs, 0.0), mask_BT=mask)


PROMPT = encode("when does the red circle appear?")
ROWS = [Row(position=i, sample=sample(i), prompt=PROMPT) for i in range(2)]
GROUPS = [[rollout(-1.0, -2.0)], [rollout(-0.5)]]


def test_signal_and_loss_by_hand():
    student = scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1])
    teacher = scores([[-2.0, -0.5], [-0.25, 0.0]], [2, 1])
    batch = make_trajectories(ROWS, GROUPS, student, teacher)
    method = VideoOPD(OnPolicySamplingConfig())
    signal = method.signal(batch)
    assert signal.token_reward_BT is signal.advantage_BT is not None
    assert signal.advantage_BT.tolist() == [[-1.0, 1.5], [0.25, 0.0]]
    loss = method.loss(student, batch, signal, divisor=2.0)
    assert math.isclose(loss.item(), -(-1.0 + 1.5 + 0.25) / 2)


def test_one_step_on_tiny_models_has_the_gradient_of_eq_6():
    """The gradient of the method equals Σ −r_t·∇log π_θ(a_t), with r_t from two stock forwards."""
    student, teacher = model(0, sharpness=4.0), model(1, sharpness=4.0)
    policy = HFPolicy(student, processor())
    method = VideoOPD(OnPolicySamplingConfig(max_new_tokens=4, rollouts=2))
    ((a, b),) = groups = method.trajectories(policy, [PROMPT], [sample(0)], [[1, 2]])
    responses = [[a.token_ids, b.token_ids]]
    scored = policy.logprobs([PROMPT], responses, grad=True)
    judged = LocalTeacher(HFPolicy(teacher, processor())).logprobs([PROMPT], responses)
    batch = make_trajectories(ROWS[:1], groups, scored, judged)
    check_ratio(batch, scored, 1e-3)
    method.loss(scored, batch, method.signal(batch), 2.0).backward()
    ours = student.lm_head.weight.grad.clone()

    student.zero_grad()
    for answer in (a, b):
        tokens = torch.tensor([answer.token_ids])

        def logp(net: Any, tokens: torch.Tensor = tokens) -> torch.Tensor:
            types = torch.cat([PROMPT.tensors["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
            out = net(
                input_ids=torch.cat([PROMPT.input_ids, tokens], dim=1),
                **{**PROMPT.tensors, "mm_token_type_ids": types},
            )
            logits = out.logits[:, PROMPT.length - 1 : -1, : policy.vocabulary.size]
            logits = logits + policy.vocabulary.logit_bias(logits.device)
            return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)

        with torch.no_grad():
            r = logp(teacher) - logp(student)
        (-(r * logp(student)).sum() / 2.0).backward()
    assert torch.allclose(ours, student.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
    assert ours.abs().max() > 1e-3


def test_what_the_teacher_masked_is_masked():
    student = scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1])
    teacher = TokenLogprobs(
        logprobs_BT=torch.zeros(2, 2), mask_BT=torch.tensor([[True, False], [True, False]])
    )
    batch = make_trajectories(ROWS, GROUPS, student, teacher)
    assert batch.mask_BT.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("which", "who"),
    [("student", "the student's"), ("old", "the student's recorded"), ("teacher", "the teacher's")],
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_numbers_that_are_not_finite(which: str, who: str, value: float):
    student, teacher = (
        scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1]),
        scores([[-1.0, -1.0], [-1.0, 0.0]], [2, 1]),
    )
    groups = GROUPS
    if which == "old":
        groups = [GROUPS[0], [rollout(value)]]
    else:
        (student if which == "student" else teacher).logprobs_BT[1, 0] = value
    batch = make_trajectories(ROWS, groups, student, teacher)
    with pytest.raises(UserError, match=f"sample 's1': {who} log-prob of response token 0"):
        without_nonfinite(batch, student, "raise")
    masked = without_nonfinite(batch, student, "mask")
    assert masked.mask_BT.tolist() == [[True, True], [False, False]]
    method = VideoOPD(OnPolicySamplingConfig())
    assert math.isclose(method.loss(student, masked, method.signal(masked), 2.0).item(), -(0.0 + 1.0) / 2)


def test_a_ratio_off_one_names_the_token():
    student = scores([[-1.0, -2.5], [-0.5, 0.0]], [2, 1])
    batch: Trajectories = make_trajectories(ROWS, GROUPS, student, None)
    with pytest.raises(AssertionError, match=r"sample 's0', response token 1: .* is 0\.393"):
        check_ratio(batch, student, 0.3)
    check_ratio(batch, student, 0.4)


def test_a_method_without_a_teacher_says_so():
    batch = make_trajectories(ROWS, GROUPS, scores([[-1.0, -2.0], [-0.5, 0.0]], [2, 1]), None)
    with pytest.raises(AssertionError, match="needs the teacher"):
        VideoOPD(OnPolicySamplingConfig()).signal(batch)


# ----------------------------------------------------------------------------------------------- batches


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


# ------------------------------------------------------------------------------------------------ freezing


@pytest.mark.parametrize(
    ("names", "trained", "frozen"),
    [
        (
            ("vision",),
            ("visual.merger", "language_model", "lm_head"),
            ("visual.blocks", "visual.patch_embed"),
        ),
        (("merger",), ("visual.blocks",), ("visual.merger", "deepstack_merger_list")),
        (("language", "lm_head"), ("visual.blocks", "visual.merger"), ("language_model", "lm_head")),
    ],
)
def test_parts_of_the_model_can_be_frozen(names: Any, trained: tuple[str, ...], frozen: tuple[str, ...]):
    student = model(0)
    freeze(student, ModelConfig(freeze=names))
    for name, parameter in student.named_parameters():
        if any(part in name for part in frozen):
            assert not parameter.requires_grad, name
        elif any(part in name for part in trained):
            assert parameter.requires_grad, name


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(model(0), ModelConfig(freeze=("vision", "merger", "language", "lm_head")))
