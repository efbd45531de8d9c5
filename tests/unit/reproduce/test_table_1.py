"""Table 1: every arm has the same budget, commands are valid, and the result is what the predictions say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import make_place, predict, recipe_of

from video_opd.cli.commands import parse_words
from video_opd.reproduce import places, rates, table_1
from video_opd.reproduce.measurements import find
from video_opd.reproduce.places import Place

SEEDS = [0, 1]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def made_runs(place: Place) -> None:
    """SFT's best rate is the largest, that of others the smallest. Noise spoils SFT, and OP-RKD is right."""
    for arm in table_1.ARMS:
        for k, rate in enumerate(rates.RATES):
            late = float(abs(k - 2) if arm == "sft" else k)
            predict(rates.rate_run(place, arm, rate), place.validation, 0.5 * late)
        for level in rates.levels_of(arm, table_1.LEVELS):
            for seed in SEEDS:
                late = {"sft": 4 * level, "op-rkd": 0.0}.get(arm, 1.0)
                predict(table_1.run_of(place, arm, level, seed), place.tests, late)
    for model, late in ((places.BASE, 3.0), (places.TEACHER, 0.5)):
        predict(place.runs("shipped") / model, place.tests, late)


def test_every_arm_has_the_same_budget_at_the_rate_that_was_chosen_for_it(place: Place) -> None:
    made_runs(place)
    first, runs = table_1.stages(place, SEEDS)
    trained = [recipe_of(task) for task in runs]
    assert {(r.optim.max_steps, r.optim.batch_size, r.optim.schedule) for r in trained} == {
        (30, 32, "linear")
    }
    assert {r.optim.lr for r in trained if r.method == "sft"} == {6e-4}
    assert {r.optim.lr for r in trained if r.method != "sft"} == {1.5e-4}
    # SFT, OP-RKD, OP-FKD and GRPO at three levels; Video-OPD looks at no annotation.
    assert len(runs) == len(SEEDS) * (4 * 3 + 2) == len({task.name for task in runs})
    assert len({r.run.dir for r in trained}) == len(runs)
    for r in trained:
        assert r.data.train == str(place.pool(r.run.seed, float(r.run.dir.split("noise-")[1].split("-")[0])))
        assert [Path(path) for path in r.evaluate.data] == list(place.tests.values())
    tried = [recipe_of(task) for task in first if task.name.startswith("rates")]
    assert {r.optim.lr for r in tried} == set(rates.RATES)
    assert {Path(p) for r in tried for p in r.evaluate.data} == set(place.validation.values())
    assert not {r.run.seed for r in tried} & set(SEEDS)
    for task in first:
        parse_words([str(word) for word in task.words()])


def test_pools_of_all_levels_share_their_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(places, "make_question_set", lambda out: None)
    monkeypatch.setattr(places, "make_world", lambda out, **more: asked.append((out.name, more["seed"])))
    place = Place(out=tmp_path)
    for seed in (0, 1):
        place.pool(seed, 0).parent.mkdir()
    places.make_videos(place, [0, 1], 5, [0.0, 1.0])
    assert asked == [("validation", 50), ("pool-0", 300), ("pool-1", 301)]
    exact, noisy = (
        [json.loads(line) for line in place.pool(1, level).read_text().splitlines()] for level in (0, 1)
    )
    assert [row["video"] for row in exact] == [row["video"] for row in noisy]
    assert all(row["spans"] == row["true_spans"] for row in exact)
    assert any(row["spans"] != row["true_spans"] for row in noisy)


def test_the_result_and_its_claims(place: Place) -> None:
    made_runs(place)
    record = json.loads(json.dumps(table_1.result(place, SEEDS)))
    exact, half, noisy = record["levels"]
    assert record["rates"]["sft"] == 6e-4 and record["rates"]["grpo"] == 1.5e-4
    assert list(record["validation"]["sft"]) == ["0.00015", "0.0003", "0.0006"]
    assert exact["mIoU"]["sft"]["all"] == pytest.approx([100, 100])
    assert noisy["mIoU"]["sft"]["all"][0] < half["mIoU"]["sft"]["all"][0] < 100
    assert noisy["mIoU"]["video-opd"] == exact["mIoU"]["video-opd"]
    claims = {(c.says, c.where): c for c in table_1.claims(record)}
    assert len(claims) == 2 * 4 * 3
    said = "Video-OPD is better than SFT"
    verdicts = [claims[said, f"annotation noise {level}"].verdict for level in ("0", "0.5", "1")]
    assert verdicts == ["does not hold", "holds", "holds"]
    assert (
        claims["Video-OPD is better than GRPO", "annotation noise 0"].verdict == "cannot be told at this size"
    )
    assert find(exact, "tiny-base", "sft").rise < 0 < find(exact, "sft", "tiny-base").rise
    assert table_1.best(noisy)[0] == "op-rkd" and table_1.best(exact)[0] == "sft"
    assert table_1.best(exact)[1] == ["op-rkd"]
