"""Where frozen models and the optimiser are held: what is chosen, what is refused, how often weights move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from training_cases import Build, assert_equal_to_rounding, make_recipe

from video_opd.errors import UserError
from video_opd.models.placed_teachers import OffloadedTeacher
from video_opd.planning.plan import make_plan
from video_opd.training.loop import train
from video_opd.training.rounds import run_rounds

BFLOAT16: dict[str, Any] = {"model": {"weights": "bfloat16", "dtype": "bfloat16"}}
VLLM: dict[str, Any] = {"sampling": {"engine": "vllm"}, "loss": {"max_importance_weight": 2.0}}


@pytest.mark.parametrize(
    "processes, sections, named",
    [
        (1, {"teacher": {"placement": "sharded"}}, "teacher.placement is sharded"),
        (2, {"optim": {"offload": True}}, "optim.offload with 2 processes"),
        (8, BFLOAT16, "model.weights bfloat16 with 8 processes"),
        (8, VLLM, "sampling.engine vllm with 8 processes"),
    ],
)
def test_what_the_number_of_processes_rules_out_is_refused_alike(
    processes: int,
    sections: dict[str, Any],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a plan, by a run and by rounds, which would have scored the pool before they train."""
    recipe = make_recipe(tmp_path, **sections)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    said = []
    for refuses in (lambda: make_plan(recipe, processes), lambda: train(recipe), lambda: run_rounds(recipe)):
        with pytest.raises(UserError, match=named) as refusal:
            refuses()
        said.append(str(refusal.value))
    assert len(set(said)) == 1 and not list(tmp_path.iterdir())
    recipe.check_processes(2 if processes == 1 else 1)
    make_recipe(tmp_path).check_processes(processes)


def test_the_optimiser_of_several_processes_is_on_the_cpu_in_shards(tmp_path: Path) -> None:
    sharded = make_recipe(tmp_path, model={"sharding": "fsdp2"}, optim={"offload": True})
    sharded.check_processes(1)
    sharded.check_processes(2)


def test_gradients_are_not_reduced_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.sharding"):
        make_recipe(tmp_path, model={"reduce": "micro_batch"})


@pytest.mark.parametrize(
    "method, sections, turns",
    [
        ("video-opd", {}, 8),  # one a micro-batch
        ("video-opd", {"sampling": {"micro_batch_size": 4}}, 4),
        ("op-fkd", {}, 4),
    ],
)
def test_the_optimiser_on_the_cpu_and_a_teacher_that_visits_change_nothing(
    method: str, sections: dict[str, Any], turns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps on two batches of four, in micro-batches of two. The annotations of ``op-fkd`` and
    trajectories that were sampled ahead are scored in one turn."""
    optim = {"max_steps": 4, "updates_per_batch": 1}
    one = train(make_recipe(tmp_path / "one", method, optim=optim, **sections), Build())
    moved: list[int] = []
    turn = OffloadedTeacher.turn

    @contextmanager
    def counting(teacher: OffloadedTeacher) -> Iterator[None]:
        moved.append(not teacher._present)
        with turn(teacher):
            yield

    monkeypatch.setattr(OffloadedTeacher, "turn", counting)
    given = {**sections, "teacher": {"placement": "cpu"}, "optim": {**optim, "offload": True}}
    other = train(make_recipe(tmp_path / "other", method, **given), Build())
    assert sum(moved) == turns
    assert_equal_to_rounding(one.path, other.path)
