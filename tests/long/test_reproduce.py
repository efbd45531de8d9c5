"""``video-opd reproduce`` with real commands, in small: it ends, and repeated it runs nothing again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from video_opd.reproduce import places, rates, table_1
from video_opd.reproduce.document import document, read_results
from video_opd.reproduce.reproduce import reproduce
from video_opd.world import measure

pytestmark = [pytest.mark.slow]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods at two levels of noise, and steps of two prompts."""
    few = dict.fromkeys(places.VALIDATION_VIDEOS, 1)
    monkeypatch.setattr(measure, "TEST_VIDEOS", few)
    monkeypatch.setattr(places, "VALIDATION_VIDEOS", few)
    monkeypatch.setattr(table_1, "VIDEOS", 2)
    monkeypatch.setattr(table_1, "LEVELS", (0.0, 1.0))
    monkeypatch.setattr(table_1, "ARMS", {arm: table_1.ARMS[arm] for arm in ("sft", "video-opd")})
    monkeypatch.setattr(table_1, "OURS", ("video-opd",))
    monkeypatch.setattr(table_1, "BASELINES", ("sft",))
    for module in (rates, table_1):
        monkeypatch.setattr(module, "RATES", (1e-4, 3e-4))
        monkeypatch.setattr(module, "STEPS", 1)
        monkeypatch.setattr(module, "BATCH", {"optim.batch_size": 2, "optim.micro_batch_size": 2})


def test_an_experiment_runs_to_its_end_and_is_not_run_again(small: None, tmp_path: Path) -> None:
    out, results = tmp_path / "out", tmp_path / "results"
    reproduce([table_1], out, results, seeds=2, jobs=2)
    first = (results / "table-1.json").read_bytes()
    record = json.loads(first)
    assert [level["noise"] for level in record["result"]["levels"]] == [0.0, 1.0]
    made = {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()}
    # Shipped models on three sets; two rates of each method; runs of two seeds: a level of noise changes none
    # of Video-OPD's. Beside what each command said stands how it was made.
    assert len(made) == 2 * (2 * 3 + 2 * 2 + 2 * (2 + 1))
    reproduce([table_1], out, results, seeds=2, jobs=2)
    assert {path: path.stat().st_mtime_ns for path in (out / "logs").iterdir()} == made
    assert (results / "table-1.json").read_bytes() == first
    text = document(read_results(results, {"table-1": table_1}), {"table-1": table_1})
    assert "| Video-OPD is better than SFT | table 1 | annotation noise 1 |" in text
