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
from video_opd.training.loop import train
from video_opd.training.sharding import check_processes


@pytest.mark.parametrize(
    "processes, sections, named",
    [
        (1, {"teacher": {"placement": "sharded"}}, "teacher.placement is sharded"),
        (2, {"optim": {"offload": True}}, "optim.offload with 2 processes"),
    ],
)
def test_what_the_number_of_processes_rules_out_is_refused(
    processes: int,
    sections: dict[str, Any],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=named):
        check_processes(make_recipe(tmp_path, **sections))
    check_processes(make_recipe(tmp_path))
    if processes == 1:
        check_processes(make_recipe(tmp_path, optim={"offload": True}))
        return
    check_processes(make_recipe(tmp_path, model={"sharding": "fsdp2"}, **sections))


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
