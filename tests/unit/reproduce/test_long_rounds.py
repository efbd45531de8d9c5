"""Long rounds: as many steps with a curriculum as without, and gaps are what files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reproduce_cases import make_place, predict, recipe_of

from video_opd.cli.commands import parse_words
from video_opd.config import load_recipe
from video_opd.reproduce import long_rounds, places, rates
from video_opd.reproduce.places import Place
from video_opd.world.shipped import shipped

SEEDS = [0, 1]
ROUNDS = (1.5, 1.0, 0.0)  # seconds by which the student is late after each


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for k, rate in enumerate(rates.RATES):
        predict(rates.rate_run(place, "video-opd-full", rate), place.validation, 0.5 * abs(k - 2))
    for model, late in ((places.BASE, 3.0), (long_rounds.TEACHER, 0.5)):
        predict(place.runs("shipped") / model, place.tests, late)
    for seed in SEEDS:
        predict(long_rounds.run_of(place, seed), place.tests, 0.5)
        for n, late in enumerate(ROUNDS, start=1):
            predict(long_rounds.round_of(place, seed, n), place.tests, late)
    return place


def test_both_arms_take_as_many_steps_from_one_pool(place: Place) -> None:
    first, trained, last = long_rounds.stages(place, SEEDS)
    assert first and len(trained) == 2 * len(SEEDS)
    for task in trained:
        words = [str(word) for word in task.words()]
        arguments = parse_words(words)
        r: Any = load_recipe(arguments.recipe, arguments.overrides)
        assert r.data.train == str(place.pool(r.run.seed, 1.0, "largest-pool"))
        assert r.teacher.path == str(shipped("tiny-teacher-small")) and r.optim.lr == rates.RATES[2]
        assert (r.optim.batch_size, r.loss.estimator) == (32, "full")
        if words[0] == "rounds":
            r.check_rounds()
            assert (r.rounds.count, r.optim.max_steps, r.tvdf.k) == (3, 160, 640)
        else:
            assert r.optim.max_steps == 3 * 160 and len(recipe_of(task).evaluate.data) == 3
    for task in last:
        parse_words([str(word) for word in task.words()])


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(long_rounds.result(place, SEEDS)))
    claims = {claim.says: claim.verdict for claim in long_rounds.claims(record)}
    assert claims == {
        "Three longer rounds surpass the teacher": "holds",
        "Longer round 2 is better than round 1": "holds",
        "Longer round 3 is better than round 2": "holds",
        "Longer rounds are better than as many steps on all rows": "holds",
        "As many steps on all rows surpass the teacher": "cannot be told at this size",
    }
    rows = [line for line in long_rounds.tables(record) if line.startswith("|")]
    gaps = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows[2:]}
    assert gaps["tiny-base"] == gaps["tiny-teacher-small"] == ""
    assert gaps["round 1"].startswith("-") and gaps["round 3"].startswith("+")
    assert gaps["all rows"].startswith("+0.0")
