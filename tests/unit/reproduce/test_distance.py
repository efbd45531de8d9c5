"""The map's other axis: table 1's arms, from a student that was trained before on other videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import make_place, predict, recipe_of

from video_opd.reproduce import distance, places, rates, table_1
from video_opd.reproduce.measurements import spread
from video_opd.reproduce.places import Place

SEEDS = [0, 1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    predict(distance.start_of(place), place.tests, 1.0)
    for model in (places.BASE, places.TEACHER):
        predict(place.runs("shipped") / model, place.tests, 3.0)
    for arm in table_1.ARMS:
        for k, rate in enumerate(rates.RATES):
            predict(rates.rate_run(place, arm, rate), place.validation, 0.5 * k)
        for level in rates.levels_of(arm, distance.LEVELS):
            for seed in SEEDS:
                predict(table_1.run_of(place, arm, level, seed, distance.NAME), place.tests, level * 2 + 0.5)
    return place


def test_arms_are_those_of_table_1_from_another_start(place: Place) -> None:
    first, (start,), runs = distance.stages(place, SEEDS)
    before = recipe_of(start)
    of_table_1 = {
        recipe_of(task).run.dir.split("/")[-1]: recipe_of(task) for task in table_1.stages(place, SEEDS)[1]
    }
    assert len(runs) == len(SEEDS) * (4 * 2 + 2)
    for task in runs:
        r = recipe_of(task)
        assert r.model.path == str(Path(before.run.dir) / "model")
        other = of_table_1[Path(r.run.dir).name]
        same = {"model.path": other.model.path, "run.dir": other.run.dir}
        assert r.changed(**same) == other
        assert r.data.train != before.data.train and r.run.seed != before.run.seed
    assert first


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(distance.result(place, SEEDS)))
    claims = {(claim.says, claim.where): claim.verdict for claim in distance.claims(record)}
    assert len(claims) == 2 * 4 * 2
    says = "Video-OPD is better than SFT"
    assert claims[says, "annotation noise 1, nearer to the teacher"] == "holds"
    assert claims[says, "annotation noise 0, nearer to the teacher"] == "cannot be told at this size"
    text = "\n".join(distance.tables(record))
    assert "| SFT | " in text
    start = spread(record["start"]["all"])
    (_, exact), (_, noisy) = ((row[0], row) for row in distance.leaders(record))
    assert exact[0] == noisy[0] == start and (exact[1], noisy[1]) == ("0", "1")
    assert noisy[2] == "Video-OPD" and noisy[4] == "Video-OPD, estimator full"
