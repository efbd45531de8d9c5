"""The study of estimators: one thing differs in each cell, and costs are the runs' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import make_place, predict, recipe_of, write_rows

from video_opd.cli.commands import parse_words
from video_opd.reproduce import estimators, places, rates
from video_opd.reproduce.places import Place

SEEDS = [0, 1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for model in (places.BASE, places.TEACHER):
        predict(place.runs("shipped") / model, place.tests, 3.0)
    late = dict(zip(estimators.ARMS, (1.0, 0.5, 0.0), strict=True))
    for n, arm in enumerate(estimators.ARMS):
        for k, rate in enumerate(rates.RATES):
            predict(rates.rate_run(place, arm, rate), place.validation, 0.5 * abs(k - n))
        for cell in estimators.CELLS:
            for seed in SEEDS:
                run = estimators.run_of(place, arm, cell, seed)
                predict(run, place.tests, 0.0 if cell is estimators.LONGER else late[arm])
                write_rows(run / "metrics.jsonl", [{"step": s, "time/step_s": 2.0 + n} for s in (1, 2, 3)])
    return place


def test_one_thing_differs_in_each_cell(place: Place) -> None:
    first, runs, near = estimators.stages(place, SEEDS)
    trained = {task.name: recipe_of(task) for task in (*runs, *near)}
    assert len(trained) == len(SEEDS) * 3 * 5
    for task in first:
        parse_words([str(word) for word in task.words()])
    for seed in SEEDS:
        for arm, rate in zip(estimators.ARMS, rates.RATES, strict=True):
            centre, *others = (
                trained[f"estimators-{estimators.run_of(place, arm, cell, seed).name}"]
                for cell in estimators.CELLS
            )
            assert centre.optim.lr == rate and centre.run.seed == seed
            differ = [
                {"optim.max_steps": 30}, {"optim.batch_size": 32}, {"sampling.rollouts": 1},
                {"model.path": centre.model.path},
            ]  # fmt: skip
            for other, key in zip(others, differ, strict=True):
                assert other != centre
                assert other.changed(**key, **{"run.dir": centre.run.dir, "run.save_every": 30}) == centre
    kinds = {(r.loss.estimator, r.loss.baseline) for r in trained.values()}
    assert kinds == {("sampled", "none"), ("sampled", "kl"), ("full", "none")}
    starts = {r.model.path for name, r in trained.items() if "near" in name}
    assert starts == {
        str(estimators.run_of(place, "video-opd-full", estimators.LONGER, seed) / "model") for seed in SEEDS
    }


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(estimators.result(place, SEEDS)))
    claims = {(claim.says, claim.where): claim.verdict for claim in estimators.claims(record)}
    says = "Estimator full is better than sampled, as in the paper"
    assert claims[says, "as in table 1"] == "holds"
    assert claims[says, "twice the steps"] == "cannot be told at this size"
    assert claims[says, "near the teacher"] == "holds"
    near = record["cells"][-1]
    assert near["start"] == [100.0, 100.0] and near["seconds"]["video-opd"] == 6.0
    text = "\n".join(estimators.tables(record))
    assert "| near the teacher | full | 100.0 ± 0.0 | 100.0 ± 0.0 | +0.0 [+0.0, +0.0] | 12 |" in text
