"""Figure 6: the arms share rows and steps, checkpoints are measured, and costs are the counted ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import ROOT
from reproduce_cases import make_place, predict, recipe_of, write_rows

from video_opd.cli.commands import parse_words
from video_opd.reproduce import figure_6, places, rates
from video_opd.reproduce.places import Place

SEEDS = [0, 1]
COUNTED = ROOT / "benchmarks" / "results" / "engine-operations.json"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """GRPO begins behind Video-OPD and ends before it; the estimator full is always right."""
    place = make_place(tmp_path)
    test = {"short": place.tests["short"]}
    predict(place.runs("shipped") / places.BASE, test, 3.0)
    for arm in figure_6.ARMS:
        for k, rate in enumerate(rates.RATES):
            predict(rates.rate_run(place, arm, rate), place.validation, 0.5 * k)
        for seed in SEEDS:
            run = figure_6.run_of(place, arm, seed)
            seconds = {"grpo": 4.0}.get(arm, 2.0)
            write_rows(
                run / "metrics.jsonl",
                [{"step": n, "time/step_s": 99 if n == 1 else seconds} for n in (1, 2, 3)],
            )
            for step in figure_6.steps():
                late = {"grpo": 2 - step / 40, "video-opd": 1.0, "video-opd-full": 0.0}[arm]
                predict(figure_6.answers_of(place, arm, seed, step), test, late)
    figure_6.counts_of(place).write_bytes(COUNTED.read_bytes())
    return place


def test_arms_share_rows_steps_and_checkpoints(place: Place) -> None:
    first, runs, measured = figure_6.stages(place, SEEDS)
    trained = [recipe_of(task) for task in runs]
    assert {
        (r.optim.max_steps, r.optim.schedule, r.run.save_every, r.run.keep_checkpoints) for r in trained
    } == {(60, "constant", 10, 6)}
    assert [r.method for r in trained] == ["grpo", "video-opd", "video-opd"] * len(SEEDS)
    assert len(measured) == len(SEEDS) * 3 * 6 == len({task.name for task in measured})
    for task in measured:
        words = [str(word) for word in task.words()]
        parse_words(words)
        run = Path(words[1]).parents[2]
        assert run in {Path(r.run.dir) for r in trained} and Path(words[1]).name == "model"
        assert (
            run not in Path(words[words.index("--out") + 1]).parents
        )  # checkpoints stay as they were written
    for task in first:
        parse_words([str(word) for word in task.words()])


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(figure_6.result(place, SEEDS)))
    assert record["step_s"] == {"grpo": 4.0, "video-opd": 2.0, "video-opd-full": 2.0}
    claims = {(claim.says, claim.where): claim for claim in figure_6.claims(record)}
    noise = "annotation noise 1"
    assert claims["Video-OPD is better than GRPO after 10 steps", noise].verdict == "holds"
    assert claims["Video-OPD is better than GRPO after 60 steps", noise].verdict == "does not hold"
    costs = "A step of Video-OPD costs less than one of GRPO"
    plain = claims[costs, "plain engine, prompts of 1,001 tokens"]
    counted = {
        o["job"]: o["ways"]
        for o in json.loads(COUNTED.read_text())["operations"]
        if o["prompt_tokens"] == 1001
    }
    ratio = (
        counted["video-opd"]["plain update"]["counted"]
        / counted["grpo, 8 rollouts"]["plain update"]["counted"]
    )
    assert plain.verdict == "holds" and plain.difference.rise == pytest.approx(100 - 100 * ratio)
    assert plain.difference.low == plain.difference.high and plain.difference.count_above == "exact"
    assert claims[costs, "prefix engine, prompts of 1,001 tokens"].verdict == "does not hold"
    text = "\n".join(figure_6.tables(record))
    assert "| 60 | " in text and "| 1,001 | plain | 117.5 | 24.9 | 79% |" in text
