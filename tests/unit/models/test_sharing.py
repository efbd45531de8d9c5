"""Queries on one video share its prefill: the ``prefix`` engine against the ``plain`` one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from model_cases import QUERIES, encode, mixed_prompts, model, processor

from video_opd.models.policy import HFPolicy
from video_opd.models.sharing import find_trunks
from video_opd.types import EncodedPrompt, Rollout

FIVE = (*QUERIES, "red", "the yellow triangle, which is small, moves up and then left")
MANY = "find the event: " + "the red circle moves left and the blue square moves up, " * 3
CASES = ("mixed", "pair", "twins", "same prompt", "with a text")


@cache
def prompts_of(case: str) -> tuple[EncodedPrompt, ...]:
    pair = tuple(encode(q, frames=6, video_seed=3) for q in QUERIES[:2])
    if case == "pair":
        return pair
    if case == "same prompt":
        return (pair[0], pair[1], replace(pair[0], sample_id="again"))
    if case == "twins":  # two clips of the same length and size: only their pixels differ
        twin = tuple(encode(q, frames=6, video_seed=4) for q in QUERIES[:2])
        assert torch.equal(pair[0].input_ids, twin[0].input_ids)
        return (pair[0], twin[1], twin[0], pair[1])
    if case == "with a text":
        text = "the red circle moves left"
        ids = torch.tensor([processor().tokenizer(text)["input_ids"]])
        types = {"mm_token_type_ids": torch.zeros_like(ids)}
        return (*pair, replace(pair[0], sample_id="text", input_ids=ids, tensors=types, video_tokens=0))
    five = [encode(q, frames=4, height_px=64, width_px=96, video_seed=1) for q in FIVE]
    alone = encode(MANY, frames=10, height_px=96, width_px=64, video_seed=2)
    return (five[0], pair[0], five[1], alone, five[2], five[3], pair[1], five[4])


def policy(engine: Any = "prefix", **options: Any) -> HFPolicy:
    return HFPolicy(model(sharpness=20), processor(), engine, **options)


def seeds_of(count: int, n: int) -> list[list[int]]:
    return [[100 * i + j for j in range(n)] for i in range(count)]


def flat(rollouts: list[list[Rollout]]) -> list[Rollout]:
    return [rollout for group in rollouts for rollout in group]


def responses_of(count: int) -> list[list[tuple[int, ...]]]:
    """One to three responses a prompt, of one to five tokens."""
    return [[tuple(range(9 + i + j, 10 + i + 2 * j + i % 3)) for j in range(1 + i % 3)] for i in range(count)]


def shapes_of(student: HFPolicy) -> tuple[list[int], list[tuple[int, int]]]:
    """Two lists that grow: the patches of each forward of the tower, (rows, columns) of the transformer's."""
    patches: list[int] = []
    columns: list[tuple[int, int]] = []
    student.model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    student.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return patches, columns


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.9}])
def test_shared_videos_are_answered_as_by_the_plain_engine(settings: dict[str, Any], n: int) -> None:
    prompts = prompts_of("mixed")
    tree, plain = (
        flat(
            policy(engine).sample(prompts, n=n, max_new_tokens=6, seeds=seeds_of(len(prompts), n), **settings)
        )
        for engine in ("prefix", "plain")
    )
    assert [r.token_ids for r in tree] == [r.token_ids for r in plain]
    assert len({r.token_ids for r in tree}) > len(prompts) / 2
    for got, expected in zip(tree, plain, strict=True):
        torch.testing.assert_close(
            torch.tensor(got.recorded), torch.tensor(expected.recorded), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_plain_engine(case: str) -> None:
    prompts = prompts_of(case)
    assert find_trunks(prompts, model().config.video_token_id) is not None
    responses = responses_of(len(prompts))
    got, expected = (
        policy(engine).logprobs(prompts, responses, full=True, temperature=0.8)
        for engine in ("prefix", "plain")
    )
    torch.testing.assert_close(got.logprobs_BT, expected.logprobs_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.full_BTV, expected.full_BTV, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_plain_engine(case: str) -> None:
    prompts = prompts_of(case)
    found = []
    for engine in ("prefix", "plain"):
        student = policy(engine)
        logprobs_BT = student.logprobs(prompts, responses_of(len(prompts)), grad=True).logprobs_BT
        (logprobs_BT * torch.linspace(-1, 1, logprobs_BT.numel()).view_as(logprobs_BT)).sum().backward()
        found.append({name: p.grad for name, p in student.model.named_parameters() if p.grad is not None})
    got, expected = found
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_clip_goes_once_through_the_vision_tower_and_the_transformer() -> None:
    prompts, student = prompts_of("mixed"), policy()
    patches, columns = shapes_of(student)
    prefix = student.prefill(prompts)
    distinct = {p.clip_digest: p for p in prompts}
    assert patches == [sum(len(p.tensors["pixel_values_videos"]) for p in distinct.values())]
    (videos, trunk), (rows, branch) = columns
    assert (videos, rows) == (len(distinct), len(prompts)) == (3, 8)
    assert trunk + branch == prefix.cache.get_seq_length() == prefix.attention_mask_BP.shape[1]
    five = [p.input_ids[0].tolist() for p in prompts if p.clip_digest == prompts[0].clip_digest]
    assert trunk == prompts[3].length - 1  # alone on its clip: all but one token
    common = next(i for i, tokens in enumerate(zip(*five, strict=False)) if len(set(tokens)) > 1)
    assert branch == max(map(len, five)) - common
    # Sampling and scoring on this prefix prefill nothing again.
    student.sample(prefix, n=2, max_new_tokens=2, temperature=0)
    student.logprobs(prefix, responses_of(len(prompts)))
    assert len(patches) == 1 and columns[2:] == [(8, 2), (8, 3 * 4)]  # side by side


def test_trunks_are_counted_by_hand() -> None:
    prompts, video = prompts_of("mixed"), model().config.video_token_id
    trunks = find_trunks(prompts, video)
    assert trunks is not None and trunks.of_prompt == (0, 1, 0, 2, 0, 0, 1, 0)
    for trunk, length in enumerate(trunks.lengths):
        members = [p for p, t in zip(prompts, trunks.of_prompt, strict=True) if t == trunk]
        assert len({tuple(p.input_ids[0, :length].tolist()) for p in members}) == 1
        longer = {tuple(p.input_ids[0, : length + 1].tolist()) for p in members}
        assert len(longer) > 1 or length == members[0].length - 1
        assert all(video not in p.input_ids[0, length:] for p in members)


def test_other_leading_tokens_or_another_clip_share_nothing() -> None:
    video = model().config.video_token_id
    first, second = prompts_of("pair")
    changed = second.input_ids.clone()
    changed[0, 0] += 1
    assert find_trunks((first, replace(second, input_ids=changed)), video) is None
    assert find_trunks((first, replace(second, clip_digest="another")), video) is None
    end = int((first.input_ids[0] == video).nonzero()[-1]) + 1
    cut = replace(first, input_ids=first.input_ids[:, :end])
    assert find_trunks((cut, cut), video) is None
    assert find_trunks((first, second), video) is not None


def test_prompts_on_different_clips_are_prefilled_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward of the whole prompts gives the same bits as without sharing."""
    prompts = [p for p in mixed_prompts() if p is not mixed_prompts()[2]]
    student = policy()
    _, columns = shapes_of(student)
    prefix = student.prefill(prompts)
    assert columns == [(2, max(p.length for p in prompts))]
    monkeypatch.setattr("video_opd.models.forward_passes.find_trunks", lambda *_: None)
    before = student.prefill(prompts)
    assert torch.equal(prefix.last_hidden_BD, before.last_hidden_BD)
    assert all(
        torch.equal(a.keys, b.keys) for a, b in zip(prefix.cache.layers, before.cache.layers, strict=True)
    )


# ------------------------------------------------------------------------------------- scoring on a prefix


@pytest.mark.parametrize("case", [*CASES, "different clips"])
def test_scores_on_a_prefix_are_scores_on_its_prompts(case: str) -> None:
    prompts = mixed_prompts()[:2] if case == "different clips" else prompts_of(case)
    student, responses = policy(), responses_of(len(prompts))
    prefix = student.prefill(prompts)
    student.sample(prefix, n=2, max_new_tokens=3, temperature=0)
    patches, columns = shapes_of(student)
    for _ in range(2):  # and it can be used again
        got = student.logprobs(prefix, responses, full=True, temperature=0.7)
        assert patches == [] and len(columns) == 1
        columns.clear()
    expected = student.logprobs(prompts, responses, full=True, temperature=0.7)
    assert torch.equal(got.logprobs_BT, expected.logprobs_BT)
    assert got.full_BTV is not None and expected.full_BTV is not None
    assert torch.equal(got.full_BTV, expected.full_BTV) and torch.equal(got.mask_BT, expected.mask_BT)
    plain = HFPolicy(student.model, processor(), "plain").logprobs(prefix, responses, temperature=0.7)
    torch.testing.assert_close(got.logprobs_BT, plain.logprobs_BT, atol=1e-5, rtol=0)


def test_a_selection_of_a_prefix_answers_for_its_prompts() -> None:
    prompts, student = prompts_of("mixed"), policy()
    rows = [6, 0, 3]
    part = student.prefill(prompts).select(rows)
    assert [p.sample_id for p in part.prompts] == [prompts[row].sample_id for row in rows]
    got = student.sample(part, n=2, max_new_tokens=4, seeds=[seeds_of(8, 2)[row] for row in rows])
    whole = student.sample(prompts, n=2, max_new_tokens=4, seeds=seeds_of(8, 2))
    assert [r.token_ids for r in flat(got)] == [r.token_ids for row in rows for r in whole[row]]


def test_a_prefix_is_of_one_model_and_has_no_gradients() -> None:
    prefix = policy().prefill(prompts_of("pair"))
    with pytest.raises(ValueError, match="prefilled without gradients"):
        policy().logprobs(prefix, [[(9,)], [(9,)]], grad=True)
    with pytest.raises(AssertionError, match="another model"):
        policy().logprobs(prefix, [[(9,)], [(9,)]])
    with pytest.raises(AssertionError, match="another model"):
        policy().sample(prefix, max_new_tokens=1, temperature=0)


def test_positions_after_the_video_are_the_prompts_own() -> None:
    """Padding between trunk and branch moves no rotary position."""
    prompts, student = prompts_of("mixed"), policy()
    prefix = student.prefill(prompts)
    padding = Counter((prefix.attention_mask_BP == 0).sum(1).tolist())
    assert len(padding) > 2  # rows differ in it
    for row, prompt in enumerate(prompts):
        assert prefix.attention_mask_BP[row].sum() == prompt.length
        alone = student.prefill([prompt])
        assert alone.next_position_B[0] == prefix.next_position_B[row]
        torch.testing.assert_close(alone.last_hidden_BD[0], prefix.last_hidden_BD[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("case", ["mixed", "pair"])
def test_chunks_of_a_prefill_are_the_prefill(case: str, size: int) -> None:
    """Every chunk answers as the whole does, and no clip is prefilled again for the next chunk."""
    prompts, student = prompts_of(case), policy()
    whole = student.sample(student.prefill(prompts), max_new_tokens=6, temperature=0)
    patches, columns = shapes_of(student)
    assert torch.is_grad_enabled()
    chunks = []
    for chunk in student.prefill_chunks(prompts, size):
        assert torch.is_grad_enabled()  # the caller's own state, between the chunks
        chunks.append(chunk)
    clips = len({prompt.clip_digest for prompt in prompts})
    assert len(patches) == 1 and [rows for rows, _ in columns[:1]] == [clips]
    assert [len(chunk) for chunk in chunks] == [
        len(prompts[i : i + size]) for i in range(0, len(prompts), size)
    ]
    assert [p for chunk in chunks for p in chunk.prompts] == list(prompts)
    got = [group for chunk in chunks for group in student.sample(chunk, max_new_tokens=6, temperature=0)]
    assert [r.token_ids for r in flat(got)] == [r.token_ids for r in flat(whole)]
    for ours, expected in zip(flat(got), flat(whole), strict=True):
        torch.testing.assert_close(
            torch.tensor(ours.recorded), torch.tensor(expected.recorded), atol=1e-5, rtol=0
        )


def test_prompts_without_a_common_video_are_prefilled_chunk_by_chunk() -> None:
    prompts, student = mixed_prompts()[:2], policy()
    patches, _ = shapes_of(student)
    chunks = student.prefill_chunks(prompts, 1)
    next(chunks)
    assert len(patches) == 1  # the second video waits
    got = [
        student.sample(chunk, max_new_tokens=6, temperature=0)[0][0]
        for chunk in student.prefill_chunks(prompts, 1)
    ]
    expected = flat(student.sample(prompts, max_new_tokens=6, temperature=0))
    assert [r.token_ids for r in got] == [r.token_ids for r in expected]
