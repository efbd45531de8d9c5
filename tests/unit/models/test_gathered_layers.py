"""Layers that are gathered one at a time: uneven work of two processes, and what is whole at any moment."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import model, processor
from torch import distributed
from torch.distributed.tensor import DTensor
from training_cases import launched, prompt

from video_opd.models.collective_passes import units_of
from video_opd.models.policy import HFPolicy
from video_opd.training.sharding import Shards, shard, whole

CPU = torch.device("cpu")
RESPONSES = [[[5, 6, 7], [8]], [[9, 10, 11, 12], [13, 14]]]  # two to each of two prompts


class WholeLayers:
    """Counts the layers that are whole whenever a layer computes."""

    def __init__(self, student: Any) -> None:
        self.layers, self.counts = units_of(student), set[int]()
        for layer in self.layers:
            assert isinstance(layer.mlp, torch.nn.Module)
            layer.mlp.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.counts.add(sum(not isinstance(next(layer.parameters()), DTensor) for layer in self.layers))


def loss_of(policy: HFPolicy, numbers: list[int], responses: Any, *, cut: bool) -> None:
    """Differentiates the summed log-probs of responses, as a step does or in one backward."""
    prompts = [prompt(number) for number in numbers]
    if not cut:
        policy.logprobs(prompts, responses, grad=True).logprobs_BT.sum().backward()
        return
    ending, go_on = policy.prefill(prompts, grad=True).cut()
    policy.logprobs(ending, responses, grad=True).logprobs_BT.sum().backward()
    go_on()


def work_of(rank: int, policy: HFPolicy, *, cut: bool) -> None:
    """The first process has two losses; the other has one, and samples."""
    if rank == 0:
        loss_of(policy, [0, 1], RESPONSES, cut=cut)  # a trunk and two branches: one video
        loss_of(policy, [2], RESPONSES[1:], cut=cut)
    else:
        policy.sample([prompt(4)], max_new_tokens=6, temperature=0.0)
        loss_of(policy, [5], [[[5]]], cut=cut)  # one token: nothing goes through the decoder behind a prompt


def compare(folder: Path, frozen: str) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    student = model(0, sharpness=8.0)
    if frozen:
        student.get_submodule(frozen).requires_grad_(False)
    alone = HFPolicy(copy.deepcopy(student), processor(), "plain")
    for each in range(2):
        work_of(each, alone, cut=False)
    expected = {name: weight.grad for name, weight in alone.model.named_parameters()}
    shard(student, torch.float32, CPU, lambda weight: weight.dtype)
    shards = Shards(student, by_layer=True)
    layers, watched = shards.gathered_layers(), WholeLayers(student)
    assert layers is not None
    policy = HFPolicy(student, processor(), "prefix")
    layers.together(lambda: work_of(rank, policy, cut=True))
    if rank == 0:
        layers.together(lambda: loss_of(policy, [3], RESPONSES[:1], cut=True))
    else:
        layers.together(lambda: None)
    loss_of(alone, [3], RESPONSES[:1], cut=False)
    # None is left at a whole weight, where FSDP2 of torch before 2.15 takes those of bfloat16 away.
    assert all(weight.grad is None for weight in student.parameters() if not isinstance(weight, DTensor))
    shards.reduce()
    shards.to_shards()
    worst = 0.0
    for name, weight in student.named_parameters():
        grad = expected[name]
        assert (grad is None) == (weight.grad is None), name
        if grad is not None and weight.grad is not None:
            off = (whole(weight.grad) - grad / 2).norm() / (grad.norm() / 2 + 1e-12)
            worst = max(worst, off.item())
    (folder / f"{rank}.json").write_text(json.dumps({"worst": worst, "whole": sorted(watched.counts)}))
    distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", ["", "model.visual", "model.language_model"])
def test_uneven_work_gives_the_mean_gradient_with_one_layer_whole_at_a_time(frozen: str, tmp_path: Path):
    launched(2, lambda: compare(tmp_path, frozen))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["worst"] < 1e-4 and found["whole"] == [1]


def test_a_pass_outside_of_together_is_refused(tmp_path: Path):
    launched(2, lambda: refused(tmp_path))
    assert (tmp_path / "refused").exists()


def refused(folder: Path) -> None:
    distributed.init_process_group("gloo")
    student = model(0)
    shard(student, torch.float32, CPU, lambda weight: weight.dtype)
    assert Shards(student, by_layer=True).gathered_layers() is not None
    with pytest.raises(AssertionError, match="inside of together"):
        HFPolicy(student, processor()).prefill([prompt(0)])
    (folder / "refused").touch()
    distributed.destroy_process_group()
