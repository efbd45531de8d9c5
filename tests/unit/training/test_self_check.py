"""The check before the first step finds a broken path by name, costs one forward, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Build, assert_same_run, finish, free_port, make_recipe, start

from video_opd.models import recompute
from video_opd.training.checkpoint import intact_checkpoints, load_training_state
from video_opd.training.loop import RunResult, train
from video_opd.training.self_check import CheckError

UPDATE = "the update's forward against sampling"
# Rows 0 and 2 are shorter than row 1: whichever comes first, it is padded or pads another.
SECTIONS: dict[str, Any] = {"optim": {"batch_size": 3, "micro_batch_size": 3, "max_steps": 1}}


def run(path: Path, build: Build, *, check: bool, **sections: Any) -> RunResult:
    sections = {**SECTIONS, **sections, "run": {"dir": str(path), "check": check, "save_every": 1}}
    return train(make_recipe(path, **sections), build)


class Broken(Build):
    """A policy whose log-probs are shifted where ``condition(prompts, grad)`` holds; it counts forwards."""

    def __init__(self, condition: Any) -> None:
        super().__init__(rows=3)
        self.condition = condition
        self.with_grad: list[tuple[int, int]] = []  # prompts and responses of each forward with gradients
        self.prefills_with_grad = 0

    def __call__(self, *arguments: Any) -> Any:
        components = super().__call__(*arguments)
        logprobs, prefill = components.policy.logprobs, components.policy.prefill

        def shifted(prompts: Any, responses: Any, *, grad: bool = False, **options: Any) -> Any:
            scores = logprobs(prompts, responses, grad=grad, **options)
            if grad:
                self.with_grad.append((len(prompts), sum(map(len, responses))))
            if self.condition(getattr(prompts, "prompts", prompts), grad):
                with torch.no_grad():
                    scores.logprobs_BT.add_(0.01)
            return scores

        def counted(prompts: Any, *, grad: bool = False) -> Any:
            self.prefills_with_grad += grad
            return prefill(prompts, grad=grad)

        components.policy.logprobs = shifted  # type: ignore[method-assign]
        components.policy.prefill = counted  # type: ignore[method-assign]
        return components


CONDITIONS = {
    "with gradients": (lambda prompts, grad: grad, UPDATE),
    "padded": (lambda prompts, grad: grad and len({prompt.length for prompt in prompts}) > 1, UPDATE),
    "scoring": (lambda prompts, grad: not grad, "self-distillation"),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_broken_path_is_named_before_the_first_step(name: str, tmp_path: Path) -> None:
    condition, said = CONDITIONS[name]
    with pytest.raises(CheckError, match=rf"before the first step: {said}.* is 0\.01 nats"):
        run(tmp_path / "run", Broken(condition), check=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_log_prob_that_is_no_number_fails_the_check(tmp_path: Path) -> None:
    """One of the last prompt's, behind gaps that are numbers."""

    class Spoilt(Build):
        def __call__(self, *arguments: Any) -> Any:
            components = super().__call__(*arguments)
            logprobs = components.policy.logprobs

            def nan(*given: Any, **options: Any) -> Any:
                scores = logprobs(*given, **options)
                with torch.no_grad():
                    scores.logprobs_BT[-1, 1] = torch.nan
                return scores

            components.policy.logprobs = nan  # type: ignore[method-assign]
            return components

    with pytest.raises(CheckError, match="is nan nats"):
        run(tmp_path / "run", Spoilt(rows=3), check=True)


def test_annotations_do_not_hide_a_broken_forward(tmp_path: Path) -> None:
    """Their first step checks no ratio, because nothing was sampled."""
    with pytest.raises(CheckError, match=UPDATE):
        run(tmp_path / "run", Broken(CONDITIONS["with gradients"][0]), check=True, method="sft")


def test_a_recomputed_forward_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(forward: Any, hidden_states: torch.Tensor, **inputs: Any) -> Any:
        return own(forward, hidden_states * 1.01 if torch.is_grad_enabled() else hidden_states, **inputs)

    own = recompute._checkpointed
    monkeypatch.setattr(recompute, "_checkpointed", wrong)
    with pytest.raises(CheckError, match=UPDATE):
        run(tmp_path / "run", Build(rows=3), check=True, model={"gradient_checkpointing": True})


def test_it_costs_one_forward_and_changes_nothing(tmp_path: Path) -> None:
    builds = [Broken(lambda prompts, grad: False) for _ in range(2)]
    sections = {"model": {"gradient_checkpointing": True}}
    checked = run(tmp_path / "checked", builds[0], check=True, **sections)
    unchecked = run(tmp_path / "unchecked", builds[1], check=False, **sections)
    assert builds[0].with_grad == [(3, 3), *builds[1].with_grad]
    assert builds[0].prefills_with_grad == builds[1].prefills_with_grad + 1
    assert_same_run(checked.path, unchecked.path)
    states = [
        [load_training_state(found) for found in intact_checkpoints(result.path / "checkpoints")]
        for result in (checked, unchecked)
    ]
    for mine, theirs in zip(*states, strict=True):
        for a, b in zip(mine["random"], theirs["random"], strict=True):
            assert_equal_states(a, b)


def assert_equal_states(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_states(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_states(x, y)
    else:
        assert a == b


def test_a_process_without_rows_takes_part(tmp_path: Path) -> None:
    """The wrapper's forward exchanges buffers, so a process without it would stop the other."""
    recipe = make_recipe(tmp_path / "two", optim={"max_steps": 1}, run={"check": True})
    port = free_port()
    assert finish([start(rank, 2, port, recipe, Build(rows=1)) for rank in range(2)]) == [0, 0]
