"""Table 1 again from a student that is nearer to its teacher: the map's other axis.

The student that the arms start from has been trained by Video-OPD before, on videos of its own. What a method
can still give is then smaller, and what loose annotations take is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce import table_1
from video_opd.reproduce.claims import Claim
from video_opd.reproduce.measurements import POOLED, find, measure_runs, measured_shipped, spread
from video_opd.reproduce.places import TEACHER, TUNING, Place, make_videos, shipped_stage, train_task
from video_opd.reproduce.rates import (
    BATCH,
    STEPS,
    VIDEOS,
    chosen_rate,
    prepare_tuning,
    tuned,
    tuning_stage,
)
from video_opd.reproduce.table_1 import ARMS
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
    before = {"model.path": start_of(place) / "model"}
    return [first, [start], table_1.runs_of_arms(place, NAME, seeds, LEVELS, before)]


def start_of(place: Place) -> Path:
    return place.runs(NAME) / START


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    start = measure_runs(place, [start_of(place)])
    return {
        "settings": {"videos": VIDEOS, "steps": STEPS, "start_steps": START_STEPS, **BATCH},
        "rates": {arm: chosen_rate(place, arm) for arm in ARMS},
        "shipped": {name: found.to_json() for name, found in measured_shipped(place).items()},
        "start": start.to_json(),
        "levels": table_1.measured_levels(place, NAME, seeds, LEVELS, {START: start}),
    }


def claims(record: Mapping[str, Any]) -> list[Claim]:
    return table_1.claims(record, ", nearer to the teacher")


def leaders(record: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """As :func:`table_1.leaders`."""
    return table_1.leaders(record, record["start"])


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: mean IoU of each arm, and its rise from the start."""
    settings, levels = record["settings"], record["levels"]
    yield (
        f"The arms start from a student with mean IoU {spread(record['start'][POOLED])}, which Video-OPD "
        f"made in {settings['start_steps']} steps on other videos; the teacher has "
        f"{spread(record['shipped'][TEACHER][POOLED])}. Everything else is as in table 1. Mean IoU over the "
        "rows of all test sets, ± the standard deviation over seeds, and the rise from the start:\n"
    )
    yield "| | " + " | ".join(f"noise {level['noise']:g} | rise [95%]" for level in levels) + " |"
    yield "|---|" + "---|---|" * len(levels)
    for arm, name in ARMS.items():
        cells = [f"{spread(level['mIoU'][arm][POOLED])} | {find(level, arm, START)}" for level in levels]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
