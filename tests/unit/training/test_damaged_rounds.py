"""Damage to the files by which rounds go on. Models are pretended: their scores are functions of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fuzz_cases import annotation_rows, lines_of
from fuzz_runs import pretended_scores, pretended_training, rounds_recipe

from video_opd.errors import UserError
from video_opd.training import rounds
from video_opd.training.rounds import run_rounds


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished rounds of two rows each."""
    monkeypatch.setattr(rounds, "score_pool", pretended_scores)
    monkeypatch.setattr(rounds, "train", pretended_training)
    (tmp_path / "pool.jsonl").write_text(lines_of(annotation_rows()))
    path = tmp_path / "run"
    run_rounds(rounds_recipe(path))
    return path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("changes", [{"selected": 0}, {"rows": 7}, {"failed_gate": "1"}, {"digest": "0"}])
def test_a_changed_count_of_a_selection_is_made_again(
    folder: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With 0 rows selected, the rounds would have ended there."""
    before = {name: (folder / name).read_bytes() for name in ("rounds.json", "round-2/select.json")}
    (folder / "rounds.json").unlink()
    edit(folder / "round-2" / "select.json", **changes)
    run_rounds(rounds_recipe(folder))
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "select.json is damaged: it is made again" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "changes",
    [{"rounds": []}, {"rounds": [1]}, {"rounds": [{"model": 3}]}, {"ended": "no"}, {"base": {"x": 1}}],
)
@pytest.mark.parametrize("earlier", [True, False])
def test_a_changed_summary_is_made_again(folder: Path, changes: dict[str, Any], earlier: bool) -> None:
    """Earlier versions wrote no digest: there, only what cannot be used is found."""
    summary = folder / "rounds.json"
    before = summary.read_bytes()
    edit(summary, **changes)
    if earlier:
        content = json.loads(summary.read_text())
        del content["digest"]
        summary.write_text(json.dumps(content))
    result = run_rounds(rounds_recipe(folder))
    assert result.model == folder / "round-2" / "model"
    assert (summary.read_bytes() == before) == (not earlier or "rounds" in changes)


@pytest.mark.parametrize("row", [{"query": "no id"}, {"id": 3}, {"id": "s9", "video": 4, "query": "q"}])
def test_selected_rows_without_a_digest_are_read_as_data(folder: Path, row: dict[str, Any]) -> None:
    """An earlier version's ``select.json`` says nothing of ``selected.jsonl``."""
    selection = folder / "round-1" / "select.json"
    record = json.loads(selection.read_text())
    selection.write_text(json.dumps({key: record[key] for key in record.keys() - {"sha256", "digest"}}))
    with (folder / "round-1" / "selected.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    (folder / "rounds.json").unlink()
    with pytest.raises(UserError, match=r"selected\.jsonl:3"):
        run_rounds(rounds_recipe(folder))


def test_a_damaged_result_of_finished_rounds_is_made_again(folder: Path) -> None:
    weights = folder / "round-2" / "model" / "weights"
    before = weights.read_text()
    weights.write_text("others")
    assert run_rounds(rounds_recipe(folder)).model == weights.parent and weights.read_text() == before
