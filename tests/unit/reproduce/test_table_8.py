"""Table 8: the arms differ in thinking alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import make_place, predict, recipe_of

from video_opd.cli.commands import parse_words
from video_opd.reproduce import rates, table_8
from video_opd.reproduce.places import Place

SEEDS = [0, 1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for k, rate in enumerate(rates.RATES):
        predict(rates.rate_run(place, table_8.RECIPE, rate), place.validation, 0.5 * k)
    for mode, late in (("thinking", 1.0), ("no-thinking", 0.5)):
        for model in table_8.MODELS:
            predict(table_8.shipped_of(place, model, mode), place.tests, 2.0)
        for seed in SEEDS:
            predict(table_8.run_of(place, mode, seed), place.tests, late)
    return place


def test_arms_differ_in_thinking_alone(place: Place) -> None:
    first, runs = table_8.stages(place, SEEDS)
    trained = [recipe_of(task) for task in runs]
    assert [r.prompt.thinking for r in trained] == [False, True] * len(SEEDS)
    assert {r.sampling.max_new_tokens for r in trained if r.prompt.thinking} == {64}
    assert {r.evaluate.max_new_tokens for r in trained if r.prompt.thinking} == {64}
    for r in trained:
        same = {
            "prompt.thinking": False, "sampling.max_new_tokens": 16, "evaluate.max_new_tokens": 16,
            "run.dir": "r", "run.seed": 0, "data.train": "d",
        }  # fmt: skip
        assert r.changed(**same) == trained[0].changed(**same)
    thinking = 0
    for task in first:
        words = [str(word) for word in task.words()]
        parse_words(words)
        thinking += words[-4:] == ["--prompt.thinking", "true", "--max-new-tokens", "64"]
    assert thinking == 2 * 3


def test_the_result_and_its_claim(place: Place) -> None:
    record = json.loads(json.dumps(table_8.result(place, SEEDS)))
    (claim,) = table_8.claims(record)
    assert claim.verdict == "holds"
    text = "\n".join(table_8.tables(record))
    assert "| student, thinking |" in text and "| base, no-thinking |" in text
