"""Long rounds: whether a student can surpass a teacher of its own size when it is given the time.

The rounds of table 3 end while the student still rises. Here each of three rounds takes twice as many steps,
on four times as many new rows of a pool that is four times as large. Beside them stands one run of as many
steps on all rows of the pool, which no curriculum has chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce.claims import Claim
from video_opd.reproduce.measurements import differences, find, gap_table, measure_runs, measured_shipped
from video_opd.reproduce.places import (
    BASE,
    QUERIES,
    Place,
    make_videos,
    predict_task,
    rounds_task,
    shipped_stage,
    train_task,
)
from video_opd.reproduce.rates import BATCH, chosen_rate, prepare_tuning, tuned, tuning_stage
from video_opd.reproduce.table_3 import NOISE, RECIPE, ROUNDS
from video_opd.reproduce.tasks import Stage
from video_opd.world.shipped import shipped

NAME = "long-rounds"
TITLE = "Long rounds: can a student surpass its teacher?"
SUITE = "studies"
TEACHER = "tiny-teacher-small"  # as large as the student
POOL = "largest-pool"
VIDEOS = 1280  # of a pool, with about 5,500 rows
ROWS, STEPS = 640, 160  # rows and steps of a round
RESPONSES = {"tvdf.teacher_k": 2, "tvdf.student_k": 2}
ALL_ROWS = "all rows"
SENTENCES = (  # what the paper says or implies, its table, and the arms of which the first should be better
    ("Three longer rounds surpass the teacher", "table 6", f"round {ROUNDS}", TEACHER),
    *(
        (f"Longer round {n} is better than round {n - 1}", "figure 5", f"round {n}", f"round {n - 1}")
        for n in range(2, ROUNDS + 1)
    ),
    ("Longer rounds are better than as many steps on all rows", "table 2", f"round {ROUNDS}", ALL_ROWS),
    ("As many steps on all rows surpass the teacher", "ours", ALL_ROWS, TEACHER),
)


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, [NOISE], POOL)


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    rounds = {
        seed: rounds_task(
            place,
            rounds_of(place, seed),
            RECIPE,
            data=place.pool(seed, NOISE, POOL),
            rows=QUERIES * VIDEOS,
            teacher=shipped(TEACHER),
            seed=seed,
            rounds=ROUNDS,
            steps=STEPS,
            changes=tuned(place, RECIPE) | RESPONSES | {"tvdf.k": ROWS},
        )
        for seed in seeds
    }
    all_rows = [
        train_task(
            place,
            run_of(place, seed),
            RECIPE,
            data=place.pool(seed, NOISE, POOL),
            evaluate=place.tests,
            seed=seed,
            steps=ROUNDS * STEPS,
            changes=tuned(place, RECIPE) | {"teacher.path": shipped(TEACHER)},
        )
        for seed in seeds
    ]
    last = [
        predict_task(round_of(place, seed, n), round_of(place, seed, n) / "model", data).waiting_for(made)
        for seed, made in rounds.items()
        for n in range(1, ROUNDS + 1)
        for data in place.tests.values()
    ]
    first = [*shipped_stage(place, (BASE, TEACHER)), *tuning_stage(place, [RECIPE])]
    return [first, [*rounds.values(), *all_rows], last]


def rounds_of(place: Place, seed: int) -> Path:
    return place.runs(NAME) / f"rounds-seed-{seed}"


def round_of(place: Place, seed: int, number: int) -> Path:
    return rounds_of(place, seed) / f"round-{number}"


def run_of(place: Place, seed: int) -> Path:
    """The run on all rows."""
    return place.runs(NAME) / f"all-rows-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    arms = measured_shipped(place, (BASE, TEACHER))
    for n in range(1, ROUNDS + 1):
        arms[f"round {n}"] = measure_runs(place, [round_of(place, seed, n) for seed in seeds])
    arms[ALL_ROWS] = measure_runs(place, [run_of(place, seed) for seed in seeds])
    gaps = [(arm, TEACHER) for arm in arms if arm not in (BASE, TEACHER)]
    pairs = dict.fromkeys([*((to, since) for *_, to, since in SENTENCES), *gaps])
    return {
        "settings": {
            "videos": VIDEOS,
            "noise": NOISE,
            "rounds": ROUNDS,
            "rows": ROWS,
            "steps": STEPS,
            **BATCH,
        },
        "rate": chosen_rate(place, RECIPE),
        "mIoU": {arm: found.to_json() for arm, found in arms.items()},
        "differences": differences(arms, pairs),
    }


def claims(record: Mapping[str, Any]) -> list[Claim]:
    where = f"teacher as large as the student, {record['settings']['steps']} steps a round"
    return [
        Claim(says=says, source=source, where=where, difference=find(record, to, since))
        for says, source, to, since in SENTENCES
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: the teacher, its student after each round and on all rows, and the gap between them."""
    settings = record["settings"]
    yield (
        f"A pool of {settings['videos']} videos a seed with annotation noise {settings['noise']:g}; each "
        f"round takes {settings['rows']} new rows and {settings['steps']} steps of "
        f"{settings['optim.batch_size']} prompts at rate {record['rate']:g}; *all rows* is one run of "
        f"{settings['rounds'] * settings['steps']} steps without a selection. Mean IoU, ± the standard "
        "deviation over seeds; the gap is student minus teacher over all rows of the test sets:\n"
    )
    gaps = {arm: "" if arm in (BASE, TEACHER) else str(find(record, arm, TEACHER)) for arm in record["mIoU"]}
    yield from gap_table(record["mIoU"], [(arm, arm, gap) for arm, gap in gaps.items()])
