"""Decoding by a CUDA graph. A recording is replaced by one that runs the same work again and, as a graph
does, gives every result in the same memory; the GPU check records real ones."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import SEEDS, mixed_prompts, mixture, model, old_logprobs, processor, tokens_of
from training_cases import finish, fork

from video_opd.models import captured_decoding, kv_cache
from video_opd.models import policy as policies
from video_opd.models.policy import HFPolicy

Work = Callable[[], torch.Tensor]


class Recorder:
    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, work: Work, device: torch.device) -> Work:
        assert device == torch.device("cpu")
        self.recordings += 1
        memory: list[torch.Tensor] = []

        def replay() -> torch.Tensor:
            self.replays += 1
            found = work()
            memory[:] = memory or [torch.empty_like(found)]
            return memory[0].copy_(found)

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(captured_decoding, "record", made)
    monkeypatch.setattr(policies, "can_capture", lambda model: True)
    return made


def policy(attn: str = "sdpa", capture: bool = True, **options: Any) -> HFPolicy:
    made = model(sharpness=20)
    made.set_attn_implementation({"text_config": attn})
    found = HFPolicy(made, processor(), "prefix", **options)
    found.passes.capture = capture
    return found


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("n", [1, 3])
def test_rollouts_are_those_of_the_growing_cache(
    n: int, attn: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "CACHE_ROOM", 5)
    seeds = [row[:n] for row in SEEDS]
    plain = policy(attn, capture=False).sample(mixed_prompts(), n=n, max_new_tokens=13, seeds=seeds)
    assert recorder.recordings == 0
    student = policy(attn)
    prefix = student.prefill(mixed_prompts())
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
    found = student.sample(prefix, n=n, max_new_tokens=13, seeds=seeds)
    assert tokens_of(found) == tokens_of(plain)
    torch.testing.assert_close(old_logprobs(found, 13), old_logprobs(plain, 13), atol=1e-5, rtol=0)
    # 12 tokens go on top of the prefix, 5 of them in each room: one warms up, the others are repetitions.
    assert (recorder.recordings, recorder.replays) == (3, 9)
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_under_autocast_they_are_those_of_the_growing_cache(recorder: Recorder) -> None:
    """Float32 weights: keys and values are held in float32, and computed in bfloat16."""
    found, plain = (
        policy(capture=capture, compute_dtype=torch.bfloat16).sample(
            mixed_prompts(), n=3, max_new_tokens=8, seeds=SEEDS
        )
        for capture in (True, False)
    )
    assert recorder.replays and tokens_of(found) == tokens_of(plain)
    torch.testing.assert_close(old_logprobs(found, 8), old_logprobs(plain, 8), atol=1e-2, rtol=0)


def test_short_responses_and_the_plain_engine_record_nothing(recorder: Recorder) -> None:
    policy().sample(mixed_prompts(), n=3, max_new_tokens=3, seeds=SEEDS)
    HFPolicy(model(), processor(), "plain").sample(mixed_prompts(), n=3, max_new_tokens=6, seeds=SEEDS)
    assert recorder.recordings == 0


def test_a_model_on_a_cpu_is_not_recorded() -> None:
    assert not captured_decoding.can_capture(model())


def test_a_model_that_fsdp_manages_is_not_recorded_while_it_is_whole() -> None:
    # In a process of its own: once FSDP was used, a backward starts threads, and then no fork can do one.
    assert finish([fork(whole_under_fsdp)]) == [0]


def whole_under_fsdp() -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    made = model()
    assert not captured_decoding.in_shards(made)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    layer = fully_shard(made.model.language_model.layers[0], mesh=mesh, reshard_after_forward=False)
    layer.unshard()
    assert not any(isinstance(weight, DTensor) for weight in made.parameters())
    assert captured_decoding.in_shards(made)
    distributed.destroy_process_group()


def test_a_recording_that_fails_is_told_once(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(work: Work, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured_decoding, "record", fail)
    student = policy()
    found = [student.sample(mixed_prompts(), n=3, max_new_tokens=8, seeds=SEEDS) for _ in range(2)]
    plain = policy(capture=False).sample(mixed_prompts(), n=3, max_new_tokens=8, seeds=SEEDS)
    assert [tokens_of(rollouts) for rollouts in found] == [tokens_of(plain)] * 2
    [warning] = caplog.messages
    assert "not permitted when stream is capturing)" in warning and "more" not in warning


def test_a_full_gpu_is_cleared_once_and_other_responses_are_recorded(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory for a recording may be there again for the next prompts, unlike what cannot be recorded."""
    failures, cleared = [2, 1, 0], []

    def fail(work: Work, device: torch.device) -> Work:
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recorder(work, device)

    monkeypatch.setattr(captured_decoding, "record", fail)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(1))
    plain = policy(capture=False).sample(mixed_prompts(), n=3, max_new_tokens=8, seeds=SEEDS)
    student = policy()
    for recordings in (0, 1, 2):  # it failed twice, once, not at all
        found = student.sample(mixed_prompts(), n=3, max_new_tokens=8, seeds=SEEDS)
        assert tokens_of(found) == tokens_of(plain) and recorder.recordings == recordings
        failures.pop(0)
    assert len(cleared) == 2 and not caplog.messages


def test_experts_in_float32_are_not_recorded() -> None:
    """transformers reads on the host how many tokens each of them has."""
    experts = mixture()
    assert captured_decoding.asks_host(experts) and not captured_decoding.asks_host(model())
    assert not captured_decoding.asks_host(experts.bfloat16())


def test_a_cache_that_is_lengthened_is_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = policy().prefill(mixed_prompts()).cache
    columns = torch.zeros(4, dtype=torch.long)
    kv_cache.lengthen(cache, 4, columns)  # from now on the layers are this cache's own
    before = weakref.WeakSet(cache.layers)
    held = []

    def pad(tensor: torch.Tensor, widths: Any) -> torch.Tensor:
        held.append(len(before))
        return torch.nn.functional.pad(tensor, widths)

    monkeypatch.setattr(kv_cache, "pad", pad)
    kv_cache.lengthen(cache, 4, columns)
    count = len(cache.layers)
    assert count > 1 and held == [count - done for done in range(count) for _ in ("keys", "values")]
