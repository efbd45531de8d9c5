"""Tables 3 to 6 and figure 5: teachers of three sizes, three rounds with each, and SFT followed by GRPO.

Annotations are loose, as the paper's are, so the gate has something to find. Each round selects rows that
were not trained on before, and trains the last student on them with the estimator full. In table 4 a model
that was trained by SFT and then by GRPO stands against Video-OPD; here it takes as many steps as all rounds
together, on all rows of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from video_opd.reproduce.claims import Claim
from video_opd.reproduce.measurements import differences, find, gap_table, measure_runs, measured_shipped
from video_opd.reproduce.places import (
    BASE,
    QUERIES,
    TEACHER,
    Place,
    make_videos,
    predict_task,
    rounds_task,
    shipped_stage,
    train_task,
)
from video_opd.reproduce.rates import BATCH, chosen_rate, prepare_tuning, tuned, tuning_stage
from video_opd.reproduce.table_2 import POOL, VIDEOS
from video_opd.reproduce.tasks import Stage
from video_opd.world.shipped import shipped

NAME = "table-3"
TITLE = "Tables 3 to 6 and figure 5: teachers of three sizes, and rounds"
SUITE = "tables"
NOISE = 1.0
RECIPE = "video-opd-full"
ROUNDS, ROWS, STEPS = 3, 160, 80  # rows and steps of a round
TEACHERS = {
    "tiny-teacher-mini": "smaller than the student",
    "tiny-teacher-small": "as large as the student",
    TEACHER: "larger than the student",
}
MORE_MODELS = ("tiny-teacher-mini",)
SFT_GRPO = "sft-grpo"
SFT_STEPS, GRPO_STEPS = STEPS, (ROUNDS - 1) * STEPS


def arm_of(teacher: str, number: int) -> str:
    """The student of a teacher after a number of rounds."""
    return f"{teacher}, round {number}"


def _sentences() -> Iterator[tuple[str, str, str, str, str]]:
    """What the paper says, its table, where, and the two arms of which the first should be better."""
    for teacher, size in TEACHERS.items():
        where = f"teacher {size}"
        for number, says in ((1, "One round surpasses the teacher"), (ROUNDS, "Three rounds surpass it")):
            yield says, "table 5" if number == 1 else "table 6", where, arm_of(teacher, number), teacher
        for number in range(2, ROUNDS + 1):
            yield (
                f"Round {number} is better than round {number - 1}",
                "figure 5",
                where,
                arm_of(teacher, number),
                arm_of(teacher, number - 1),
            )
    sizes = list(TEACHERS)
    for smaller, larger in pairwise(sizes):
        yield (
            "A stronger teacher gives a better student",
            "table 3",
            f"{TEACHERS[larger]} against {TEACHERS[smaller]}",
            arm_of(larger, 1),
            arm_of(smaller, 1),
        )
    yield "Three rounds are better than SFT and GRPO", "table 4", "", arm_of(TEACHER, ROUNDS), SFT_GRPO


SENTENCES = tuple(_sentences())


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, [NOISE], POOL)


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    first = [*shipped_stage(place, (BASE, *TEACHERS)), *tuning_stage(place, [RECIPE, "sft", "grpo"])]
    rounds = {
        (seed, teacher): rounds_task(
            place,
            rounds_of(place, teacher, seed),
            RECIPE,
            data=place.pool(seed, NOISE, POOL),
            rows=QUERIES * VIDEOS,
            teacher=shipped(teacher),
            seed=seed,
            rounds=ROUNDS,
            steps=STEPS,
            changes=tuned(place, RECIPE) | {"tvdf.k": ROWS},
        )
        for seed in seeds
        for teacher in TEACHERS
    }
    sft = {
        seed: train_task(
            place,
            sft_of(place, seed),
            "sft",
            data=place.pool(seed, NOISE, POOL),
            evaluate={},
            seed=seed,
            steps=SFT_STEPS,
            changes=tuned(place, "sft"),
        )
        for seed in seeds
    }
    last = [
        train_task(
            place,
            sft_grpo_of(place, seed),
            "grpo",
            data=place.pool(seed, NOISE, POOL),
            evaluate=place.tests,
            seed=seed,
            steps=GRPO_STEPS,
            changes=tuned(place, "grpo") | {"model.path": sft_of(place, seed) / "model"},
        ).waiting_for(sft[seed])
        for seed in seeds
    ]
    last += [
        predict_task(
            round_of(place, teacher, seed, n), round_of(place, teacher, seed, n) / "model", data
        ).waiting_for(made)
        for (seed, teacher), made in rounds.items()
        for n in range(1, ROUNDS + 1)
        for data in place.tests.values()
    ]
    return [first, [*rounds.values(), *sft.values()], last]


def rounds_of(place: Place, teacher: str, seed: int) -> Path:
    return place.runs(NAME) / f"{teacher}-seed-{seed}"


def round_of(place: Place, teacher: str, seed: int, number: int) -> Path:
    return rounds_of(place, teacher, seed) / f"round-{number}"


def sft_of(place: Place, seed: int) -> Path:
    return place.runs(NAME) / f"sft-seed-{seed}"


def sft_grpo_of(place: Place, seed: int) -> Path:
    return place.runs(NAME) / f"{SFT_GRPO}-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    arms = measured_shipped(place, (BASE, *TEACHERS))
    arms |= {
        arm_of(teacher, n): measure_runs(place, [round_of(place, teacher, seed, n) for seed in seeds])
        for teacher in TEACHERS
        for n in range(1, ROUNDS + 1)
    }
    arms[SFT_GRPO] = measure_runs(place, [sft_grpo_of(place, seed) for seed in seeds])
    gaps = [(arm_of(teacher, n), teacher) for teacher in TEACHERS for n in range(1, ROUNDS + 1)]
    pairs = dict.fromkeys([*((to, since) for *_, to, since in SENTENCES), *gaps])
    return {
        "settings": {
            "videos": VIDEOS,
            "noise": NOISE,
            "rounds": ROUNDS,
            "rows": ROWS,
            "steps": STEPS,
            "sft_steps": SFT_STEPS,
            "grpo_steps": GRPO_STEPS,
            **BATCH,
        },
        "rates": {arm: chosen_rate(place, arm) for arm in (RECIPE, "sft", "grpo")},
        "mIoU": {arm: found.to_json() for arm, found in arms.items()},
        "differences": differences(arms, pairs),
    }


def claims(record: Mapping[str, Any]) -> list[Claim]:
    return [
        Claim(
            says=says,
            source=source,
            where=where or f"annotation noise {record['settings']['noise']:g}",
            difference=find(record, to, since),
        )
        for says, source, where, to, since in SENTENCES
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: each teacher, its student after each round, and the gap between them."""
    settings = record["settings"]
    yield (
        f"A pool of {settings['videos']} videos a seed with annotation noise {settings['noise']:g}; each "
        f"round takes {settings['rows']} new rows and {settings['steps']} steps of "
        f"{settings['optim.batch_size']} prompts at rate {record['rates'][RECIPE]:g}. *SFT, then GRPO* "
        f"takes {settings['sft_steps']} and {settings['grpo_steps']} steps on all rows. Mean IoU, ± the "
        "standard deviation over seeds; the gap is student minus teacher over all rows:\n"
    )
    rows = [("base", BASE, "")]
    for teacher, size in TEACHERS.items():
        rows.append((f"teacher, {size}", teacher, ""))
        for n in range(1, settings["rounds"] + 1):
            arm = arm_of(teacher, n)
            rows.append((f"… its student, round {n}", arm, str(find(record, arm, teacher))))
    rows.append(("SFT, then GRPO", SFT_GRPO, ""))
    yield from gap_table(record["mIoU"], rows)
