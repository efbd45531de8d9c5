"""Outputs that were killed within a block of batches, and repeated, end with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from answer_cases import FakeLoader, FakePolicy, make_samples

from video_opd.config import recipe_from_dict
from video_opd.curriculum.scores import ScoreSettings, score
from video_opd.processes import Processes
from video_opd.training.final_evaluation import evaluate_student
from video_opd.training.run_folder import RunFolder


class Telling(FakePolicy):
    """A response tells its batch, as the last digits of a real one do; may be killed at its n-th batch."""

    def __init__(self, killed_at: int | None = None) -> None:
        super().__init__(lambda sample_id, seed: f"{sample_id} of {self.calls[-1]['ids']}")
        self.killed_at = killed_at

    def sample(self, *arguments: Any, **settings: Any) -> Any:
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        return super().sample(*arguments, **settings)


def killed_and_repeated(
    tmp_path: Path, killed_at: int, run: Callable[[Path, Telling], Path]
) -> tuple[Path, Path]:
    """Two outputs of ``run(folder, policy)``: one undisturbed, one killed on the way and repeated."""
    whole = run(tmp_path / "whole", Telling())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Telling(killed_at))
    cut = tmp_path / "cut" / whole.relative_to(tmp_path / "whole")
    if cut.exists():  # not only between batches: within a row, too
        with cut.open("ab") as file:
            file.write(b'{"id": "s24", "query": "query 24", "torn')
    run(tmp_path / "cut", Telling())
    assert not list(cut.parent.glob("*.window"))
    return whole, cut


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("killed_at", range(8))
def test_a_block_of_scores_that_was_cut_off_is_made_again(tmp_path: Path, killed_at: int) -> None:
    """25 rows, one of which fails, are three blocks of at most four batches of three. Lengths differ, so
    that the rest of a block would be batched otherwise."""

    def run(folder: Path, student: Telling) -> Path:
        out = folder / "s.jsonl"
        score(
            student,
            Telling(),
            make_samples(25),
            FakeLoader(failing=["s4"]),
            out,
            provenance={"student": "s", "teacher": "t", "input": {}},
            settings=ScoreSettings(k=1),
            batch_size=3,
            repeatable=True,
        )
        return out

    whole, cut = killed_and_repeated(tmp_path, killed_at, run)
    assert cut.read_bytes() == whole.read_bytes() and len(ids(cut)) == 24


@pytest.mark.parametrize("killed_at", [1, 6])
def test_an_evaluation_that_was_cut_off_ends_with_the_same_bytes(tmp_path: Path, killed_at: int) -> None:
    data = tmp_path / "test.jsonl"
    row = {"video": "v.mp4", "duration": 20.0, "spans": [[5, 10]]}
    rows = [{"id": f"s{i}", "query": f"query {i}", **row} for i in range(25)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder: Path, student: Telling) -> Path:
        tree: dict[str, Any] = {"method": "sft", "data": {"train": "unused"}}
        recipe = recipe_from_dict({**tree, "evaluate": {"data": [str(data)], "batch_size": 3}})
        (folder / "model").mkdir(parents=True, exist_ok=True)
        evaluate_student(recipe, student, FakeLoader(failing=["s4"]), RunFolder(folder), Processes())
        return folder / "eval" / "student-test.jsonl"

    whole, cut = killed_and_repeated(tmp_path, killed_at, run)
    assert cut.read_bytes() == whole.read_bytes() and len(ids(cut)) == 24
    assert cut.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
