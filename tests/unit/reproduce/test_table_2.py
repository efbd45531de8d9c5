"""Tables 2 and 7: arms differ in the rows that they choose, and the result is what files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import make_place, predict, recipe_of, write_rows

from video_opd.cli.commands import parse_words
from video_opd.reproduce import places, rates, table_2
from video_opd.reproduce.places import Place
from video_opd.world.make import rows
from video_opd.world.scene import compose

SEEDS = [0, 1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The best rate is the last one. Top-k is right, all other arms are a second late."""
    place = make_place(tmp_path)
    for k, rate in enumerate(rates.RATES):
        predict(rates.rate_run(place, table_2.RECIPE, rate), place.validation, 0.5 * (2 - k))
    for model in (places.BASE, places.TEACHER):
        predict(place.runs("shipped") / model, place.tests, 2.0)
    for seed in SEEDS:
        for level in table_2.LEVELS:
            found = [row for i in range(4) for row in rows(compose("train", seed, i), annotation_noise=level)]
            write_rows(place.pool(seed, level, table_2.POOL), found)
            for arm in table_2.ARMS:
                chosen = [row for row in found if row["annotation"] == "exact"] if arm == "trpv" else found
                write_rows(table_2.rows_of(place, arm, level, seed), chosen)
                predict(table_2.run_of(place, arm, level, seed), place.tests, float(arm != "topk"))
    return place


def test_arms_differ_in_their_rows_alone(place: Place) -> None:
    first, selections, runs = table_2.stages(place, SEEDS)
    assert len(selections) == len(runs) == len(SEEDS) * 2 * 7
    for task in (*first, *selections):
        parse_words([str(word) for word in task.words()])
    scorings = [task for task in first if "scores" in task.name]
    assert len(scorings) == len(SEEDS) and not any(task.done() for task in scorings)
    trained = [recipe_of(task) for task in runs]
    assert len({r.data.train for r in trained}) == len({r.run.dir for r in trained}) == len(runs)
    assert {r.optim.lr for r in trained} == {rates.RATES[-1]}
    for r in trained:
        same = {"data.train": "d", "run.dir": "r", "run.seed": 0}
        assert r.changed(**same) == trained[0].changed(**same)
    assert len({task.name for task in (*first, *selections, *runs)}) == len([*first, *selections, *runs])


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(table_2.result(place, SEEDS)))
    exact, noisy = record["levels"]
    assert exact["annotation_iou"]["pool"] == [1.0, 1.0]
    assert noisy["annotation_iou"]["pool"] == noisy["annotation_iou"]["random"] != [1.0, 1.0]
    assert noisy["annotation_iou"]["trpv"] == [1.0, 1.0]
    verdicts = {claim.says: claim.verdict for claim in table_2.claims(record)}
    assert {says for says, verdict in verdicts.items() if verdict != "holds"} == {
        "The gate alone is better than random rows", "Disagreement alone is better than random rows",
    }  # fmt: skip
    text = "\n".join(table_2.tables(record))
    assert "| TRPV + DBTP: largest δ behind the gate | 100.0 ± 0.0 | 1.00 ± 0.00 | 100.0 ± 0.0 | 0." in text
