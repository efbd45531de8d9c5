"""Tables 3 to 6: rounds with three teachers take the same rows and steps, and gaps are what files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reproduce_cases import make_place, predict, recipe_of

from video_opd.cli.commands import parse_words
from video_opd.config import load_recipe
from video_opd.reproduce import places, rates, table_3
from video_opd.reproduce.places import Place
from video_opd.world.shipped import shipped

SEEDS = [0, 1]
# Seconds by which an arm is late: the teachers, the largest being the best, and their students by round.
TEACHERS = dict(zip(table_3.TEACHERS, (2.0, 1.5, 0.5), strict=True))
STUDENTS = {"tiny-teacher-mini": (1.0, 1.0, 1.0), "tiny-teacher-small": (2.0, 1.5, 1.0)}
STUDENTS["tiny-teacher"] = (1.0, 0.5, 0.0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = make_place(tmp_path)
    for arm, best in (("video-opd-full", 2), ("sft", 1), ("grpo", 0)):
        for k, rate in enumerate(rates.RATES):
            predict(rates.rate_run(place, arm, rate), place.validation, 0.5 * abs(k - best))
    for model, late in ((places.BASE, 3.0), *TEACHERS.items()):
        predict(place.runs("shipped") / model, place.tests, late)
    for seed in SEEDS:
        predict(table_3.sft_grpo_of(place, seed), place.tests, 0.5)
        for teacher, students in STUDENTS.items():
            for n, late in enumerate(students, start=1):
                predict(table_3.round_of(place, teacher, seed, n), place.tests, late)
    return place


def test_rounds_differ_in_teacher_and_pool_alone(place: Place) -> None:
    first, trained, last = table_3.stages(place, SEEDS)
    assert len({task.name for task in (*first, *trained, *last)}) == len([*first, *trained, *last])
    recipes = []
    for task in trained:
        words = [str(word) for word in task.words()]
        arguments = parse_words(words)
        if words[0] == "rounds":
            recipes.append(load_recipe(arguments.recipe, arguments.overrides))
    assert len(recipes) == len(SEEDS) * 3
    for r in recipes:
        r.check_rounds()
        seed = r.run.seed
        assert r.data.train == str(place.pool(seed, 1.0, "large-pool"))
        assert (r.tvdf.k, r.rounds.count, r.optim.max_steps) == (160, 3, 80)
        assert r.optim.lr == rates.RATES[2]
        same = {"data.train": "d", "run.dir": "r", "run.seed": 0, "teacher.path": "t"}
        assert r.changed(**same) == recipes[0].changed(**same)
    assert {r.teacher.path for r in recipes} == {str(shipped(name)) for name in table_3.TEACHERS}
    assert not any(task.done() for task in trained)


def test_sft_and_then_grpo_take_as_many_steps_as_all_rounds(place: Place) -> None:
    _, trained, last = table_3.stages(place, SEEDS)
    sft = [recipe_of(task) for task in trained if "sft" in task.name]
    grpo = [recipe_of(task) for task in last if "sft-grpo" in task.name]
    assert len(sft) == len(grpo) == len(SEEDS)
    for a, b in zip(sft, grpo, strict=True):
        assert a.method == "sft" and b.method == "grpo"
        assert a.optim.max_steps + b.optim.max_steps == 3 * 80
        assert b.model.path == str(Path(a.run.dir) / "model") and a.model.path == str(shipped("tiny-base"))
        assert (a.optim.lr, b.optim.lr) == (rates.RATES[1], rates.RATES[0])
        assert not a.evaluate.data and len(b.evaluate.data) == 3
    for task in last:
        parse_words([str(word) for word in task.words()])


def test_the_result_and_its_claims(place: Place) -> None:
    record = json.loads(json.dumps(table_3.result(place, SEEDS)))
    claims = {(c.says, c.where): c.verdict for c in table_3.claims(record)}
    smaller, equal, larger = (f"teacher {size}" for size in table_3.TEACHERS.values())
    assert claims["One round surpasses the teacher", smaller] == "holds"
    assert claims["One round surpasses the teacher", equal] == "does not hold"
    assert claims["Three rounds surpass it", equal] == "holds"
    assert claims["One round surpasses the teacher", larger] == "does not hold"
    assert claims["Three rounds surpass it", larger] == "holds"
    assert claims["Round 2 is better than round 1", smaller] == "cannot be told at this size"
    assert claims["Round 3 is better than round 2", larger] == "holds"
    against = "A stronger teacher gives a better student"
    sizes = list(table_3.TEACHERS.values())
    assert claims[against, f"{sizes[1]} against {sizes[0]}"] == "does not hold"
    assert claims[against, f"{sizes[2]} against {sizes[1]}"] == "holds"
    assert claims["Three rounds are better than SFT and GRPO", "annotation noise 1"] == "holds"
    text = "\n".join(table_3.tables(record))
    assert "| … its student, round 3 | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 | +" in text
