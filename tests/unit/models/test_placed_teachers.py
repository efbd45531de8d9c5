"""A teacher in shards, or on the CPU between its turns, scores as the whole one does, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from model_cases import QUERIES, encode, mixed_prompts, model, processor
from torch import distributed
from torch.distributed.tensor import DTensor
from training_cases import finish, fork, free_port

from video_opd.models.interfaces import CollectivePolicy, CollectiveTeacher, VisitingTeacher
from video_opd.models.placed_teachers import OffloadedTeacher, ShardedPolicy, ShardedTeacher
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher, RoutedTeacher
from video_opd.types import EncodedPrompt

CPU = torch.device("cpu")
Call: TypeAlias = tuple[Sequence[EncodedPrompt], list[list[tuple[int, ...]]]]


def policy(seed: int = 1, engine: Any = "prefix") -> HFPolicy:
    return HFPolicy(model(seed, sharpness=8.0), processor(), engine)


def on_two(work: Callable[[int], None]) -> None:
    """``work(rank)`` in two processes that are connected by gloo; it ends without an error in both."""
    port = free_port()
    assert finish([fork(joined, work, rank, port) for rank in range(2)]) == [0, 0]


def joined(work: Callable[[int], None], rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"}
    distributed.init_process_group("gloo")
    work(rank)
    distributed.barrier()
    distributed.destroy_process_group()


def calls() -> list[Call]:
    """Prompts that share a video and that do not, a single token, several responses to one prompt, none."""
    alone, one, other = mixed_prompts()
    return [
        ([alone, one, other], [[(9, 10, 11)], [(12, 13)], [(14,)]]),
        ([alone], [[(9,)]]),
        ([], []),
        ([one], [[(9, 10), (11,), (12, 13, 14, 15)]]),
    ]


def test_processes_with_different_calls_hold_half_of_a_teacher_each() -> None:
    def work(rank: int) -> None:
        for engine in ("prefix", "plain"):
            whole = LocalTeacher(policy(engine=engine))
            sharded = ShardedTeacher(policy(engine=engine), device=CPU)
            counts = [
                sum(weight.to_local().numel() for weight in sharded.policy.model.parameters()),
                sum(weight.numel() for weight in whole.policy.model.parameters()),
            ]
            assert abs(counts[0] / counts[1] - 0.5) < 0.01
            mine = calls()[::-1] if rank else calls()
            for prompts, responses in [*mine, calls()[2]]:
                if not prompts:
                    sharded.attend()
                    continue
                expected = whole.logprobs(prompts, responses, full=True, temperature=0.7)
                got = sharded.logprobs(prompts, responses, full=True, temperature=0.7)
                assert got.full_BTV is not None and expected.full_BTV is not None
                assert torch.equal(got.full_BTV, expected.full_BTV)
                assert torch.equal(got.logprobs_BT, expected.logprobs_BT)
                assert torch.equal(got.mask_BT, expected.mask_BT)
                layer = sharded.policy.model.model.language_model.layers[0].mlp.up_proj.weight
                assert isinstance(layer, DTensor)  # freed again

    on_two(work)


def written(policy: HFPolicy, prompts: Sequence[EncodedPrompt], most: int, *, first: bool) -> list[Any]:
    """Responses, sampled from a prefix or from the prompts, and their log-probs at another temperature."""
    given: Any = policy.prefill(prompts) if first else prompts
    seeds = [[3 * i, 3 * i + 1] for i in range(len(prompts))]
    groups = policy.sample(given, n=2, max_new_tokens=most, seeds=seeds)
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    return [groups, policy.logprobs(given, responses, temperature=0.7).logprobs_BT.tolist()]


@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_processes_write_what_they_like_with_a_policy_in_shards(engine: Any) -> None:
    """One writes longer and oftener than the other, which has no prompts at all the second time."""

    def work(rank: int) -> None:
        whole = policy(engine=engine)
        shards = ShardedPolicy(model(1, sharpness=8.0), processor(), engine, device=CPU)
        assert isinstance(shards, CollectivePolicy) and not isinstance(whole, CollectivePolicy)
        alone, one, other = mixed_prompts()
        for jobs in ([[([alone, one, other], 3)], [([alone], 5), ([one, other], 2)]], [[([one], 4)], []]):
            mine = jobs[rank]
            expected = [written(whole, *job, first=first) for first in (True, False) for job in mine]
            got = shards.together(
                lambda: [written(shards, *job, first=first) for first in (True, False) for job in mine]  # noqa: B023
            )
            assert got == expected
        assert all(isinstance(weight, DTensor) for weight in shards.model.parameters())  # freed again
        with pytest.raises(AssertionError, match="inside of together"):
            shards.prefill([alone])

    on_two(work)


def test_a_routed_teacher_asks_all_shards_in_each_call() -> None:
    """In the second call no process has a prompt for b, and in the third one process has none at all."""

    def work(rank: int) -> None:
        prompts = [*mixed_prompts(), encode(QUERIES[0], video_seed=9)]
        names = {prompt.sample_id: name for prompt, name in zip(prompts, "abab", strict=True)}

        def route(prompt: EncodedPrompt) -> str:
            return names[prompt.sample_id]

        whole = RoutedTeacher({"a": LocalTeacher(policy(0)), "b": LocalTeacher(policy(1))}, route)
        teachers = {name: ShardedTeacher(policy(seed), device=CPU) for seed, name in enumerate("ab")}
        sharded = RoutedTeacher(teachers, route)
        asked = [[[0, 1], [0], [1, 3]], [[2, 3], [2], []]][rank]
        for rows in asked:
            if rows:
                given = [prompts[row] for row in rows], [[(9, 10, 11 + row)] for row in rows]
                assert torch.equal(whole.logprobs(*given).logprobs_BT, sharded.logprobs(*given).logprobs_BT)
            else:
                sharded.attend()

    on_two(work)


def test_a_teacher_visits_the_device_for_its_turn() -> None:
    whole, visiting = LocalTeacher(policy()), OffloadedTeacher(policy(), device=CPU)
    assert isinstance(visiting, VisitingTeacher) and not isinstance(visiting, CollectiveTeacher)
    weight = visiting.policy.model.lm_head.weight
    home, seen = weight.data_ptr(), []
    visiting.policy.model.model.register_forward_hook(lambda *_: seen.append(weight.data_ptr()))
    (prompts, responses), *_ = calls()
    assert torch.equal(
        whole.logprobs(prompts, responses).logprobs_BT, visiting.logprobs(prompts, responses).logprobs_BT
    )
    assert home not in seen and weight.data_ptr() == home
    seen.clear()
    with visiting.turn():
        visiting.logprobs(prompts[:1], responses[:1])
        again = visiting.logprobs(prompts, responses)
    assert len(set(seen)) == 1 and home not in seen and weight.data_ptr() == home
    assert torch.equal(whole.logprobs(prompts, responses).logprobs_BT, again.logprobs_BT)
