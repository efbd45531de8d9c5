"""Table 1 again from a student that is nearer to its teacher: the map's other axis.

The student that the arms start from has been trained by Video-OPD before, on videos of its own. What a method
can still give is then smaller, and what loose annotations take is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce.claims import Claim, interval
from video_opd.reproduce.measurements import differences, find, spread
from video_opd.reproduce.places import (
    TEACHER,
    TUNING,
    Place,
    make_videos,
    measure_runs,
    measured_shipped,
    shipped_stage,
    train_task,
)
from video_opd.reproduce.rates import (
    BATCH,
    STEPS,
    VIDEOS,
    chosen_rate,
    levels_of,
    prepare_tuning,
    seen,
    tuned,
    tuning_stage,
)
from video_opd.reproduce.table_1 import ARMS, BASELINES, OURS, leaders
from video_opd.reproduce.tasks import Stage

NAME = "distance"
TITLE = "Nearer to the teacher: methods and annotation noise"
SUITE = "studies"
LEVELS = (0.0, 1.0)
START, START_RECIPE, START_STEPS = "start", "video-opd-full", 60


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, LEVELS)


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    first = [*shipped_stage(place), *tuning_stage(place, list(ARMS))]
    start = train_task(
        place,
        start_of(place),
        START_RECIPE,
        data=place.pool(TUNING, 0.0),
        evaluate=place.tests,
        seed=TUNING,
        steps=START_STEPS,
        changes=tuned(place, START_RECIPE),
    )
    runs = [
        train_task(
            place,
            run_of(place, arm, level, seed),
            arm,
            data=place.pool(seed, level),
            evaluate=place.tests,
            seed=seed,
            steps=STEPS,
            changes=tuned(place, arm) | {"model.path": start_of(place) / "model"},
        )
        for seed in seeds
        for arm in ARMS
        for level in levels_of(arm, LEVELS)
    ]
    return [first, [start], runs]


def start_of(place: Place) -> Path:
    return place.runs(NAME) / START


def run_of(place: Place, arm: str, level: float, seed: int) -> Path:
    return place.runs(NAME) / f"{arm}-noise-{seen(arm, level):g}-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    start = measure_runs(place, [start_of(place)])
    levels = []
    for level in LEVELS:
        arms = {arm: measure_runs(place, [run_of(place, arm, level, seed) for seed in seeds]) for arm in ARMS}
        levels.append(
            {
                "noise": level,
                "mIoU": {arm: found.to_json() for arm, found in arms.items()},
                "differences": differences({START: start, **arms}),
            }
        )
    return {
        "settings": {"videos": VIDEOS, "steps": STEPS, "start_steps": START_STEPS, **BATCH},
        "rates": {arm: chosen_rate(place, arm) for arm in ARMS},
        "shipped": {name: found.to_json() for name, found in measured_shipped(place).items()},
        "start": start.to_json(),
        "levels": levels,
    }


def claims(record: Mapping[str, Any]) -> list[Claim]:
    return [
        Claim(
            says=f"{ARMS[ours]} is better than {ARMS[other]}",
            source="table 1",
            where=f"annotation noise {level['noise']:g}, nearer to the teacher",
            difference=find(level, ours, other),
        )
        for ours in OURS
        for other in BASELINES
        for level in record["levels"]
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: mean IoU of each arm, its rise from the start, and who leads where."""
    settings, levels = record["settings"], record["levels"]
    yield (
        f"The arms start from a student with mean IoU {spread(record['start']['all'])}, which Video-OPD made "
        f"in {settings['start_steps']} steps on other videos; the teacher has "
        f"{spread(record['shipped'][TEACHER]['all'])}. Everything else is as in table 1. Mean IoU over the "
        "rows of all test sets, ± the standard deviation over seeds, and the rise from the start:\n"
    )
    yield "| | " + " | ".join(f"noise {level['noise']:g} | rise [95%]" for level in levels) + " |"
    yield "|---|" + "---|---|" * len(levels)
    for arm, name in ARMS.items():
        cells = [
            f"{spread(level['mIoU'][arm]['all'])} | {interval(find(level, arm, START))}" for level in levels
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    yield from leaders(levels)
