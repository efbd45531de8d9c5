"""Figure 4: every arm starts from the general base, and accuracies are what the responses say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import answer, make_place, predict, recipe_of

from video_opd.cli.commands import parse_words
from video_opd.reproduce import figure_4, rates, table_1
from video_opd.reproduce.places import Place
from video_opd.world.shipped import shipped

SEEDS = [0, 1]
WRONG = {"sft": 1.0, "op-rkd": 0.5, "op-fkd": 0.5, "video-opd-full": 0.0}  # shares of wrong answers


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for arm in table_1.ARMS:
        for k, rate in enumerate(rates.RATES):
            predict(rates.rate_run(place, arm, rate), place.validation, 0.5 * (k != 1))
        for seed in SEEDS:
            run = figure_4.run_of(place, arm, seed)
            predict(run, place.tests, 1.0)
            answer(run, place.questions, WRONG.get(arm, 0.25))
    for model, wrong in zip(figure_4.MODELS, (0.25, 0.0), strict=True):
        predict(place.runs("shipped") / model, place.tests, 2.0)
        answer(place.runs("shipped") / model, place.questions, wrong)
    return place


def test_every_arm_starts_from_the_general_base_with_the_budget_of_table_1(place: Place) -> None:
    first, runs, asked = figure_4.stages(place, SEEDS)
    trained = [recipe_of(task) for task in runs]
    assert len(runs) == len(asked) == len(SEEDS) * len(table_1.ARMS)
    assert {r.model.path for r in trained} == {str(shipped("tiny-general-base"))}
    taught = {r.teacher.path for r in trained if r.method not in ("sft", "grpo")}
    assert taught == {str(shipped("tiny-general-teacher"))}
    assert {(r.optim.max_steps, r.optim.batch_size, r.optim.lr) for r in trained} == {
        (rates.STEPS, rates.BATCH_SIZE, rates.RATES[1])
    }
    for r in trained:
        noise = 0 if "video-opd" in r.run.dir else 1
        assert r.data.train == str(place.pool(r.run.seed, noise))
    for task, run in zip(asked, runs, strict=True):
        words = [str(word) for word in task.words()]
        parse_words(words)
        assert words[1].startswith(recipe_of(run).run.dir) and words[2] == str(place.questions)
        assert words[-2:] == ["--prompt.style", "question"]
    for task in first:
        parse_words([str(word) for word in task.words()])


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(figure_4.result(place, SEEDS)))
    assert record["accuracy"]["sft"]["all"] == [0.0, 0.0]
    assert record["accuracy"]["tiny-general-teacher"]["all"] == [100.0]
    claims = {claim.says: claim for claim in figure_4.claims(record)}
    assert {claim.score for claim in claims.values()} == {"accuracy"}
    assert claims["OP-RKD loses other abilities"].verdict == "holds"
    assert claims["GRPO gains in other abilities"].verdict == "cannot be told at this size"
    assert claims["Video-OPD, estimator full gains in other abilities"].verdict == "holds"
    assert claims["Video-OPD keeps more than SFT"].verdict == "holds"
    assert claims["Video-OPD keeps more than GRPO"].verdict == "cannot be told at this size"
    text = "\n".join(figure_4.tables(record))
    assert "| SFT | 0.0 ± 0.0 |" in text and "| -75.0 [" in text
