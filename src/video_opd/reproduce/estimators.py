"""Three estimators of Video-OPD's gradient, by steps, batch, rollouts and distance to the teacher.

The paper's estimator rewards the token that was sampled (eq 5). Its expectation at a state, taken away as a
baseline, leaves the expected gradient as it is and removes noise. The estimator full takes the expectation
itself: the whole reverse KL at each state that the student visits. Noise can also be averaged away, by more
steps, prompts or rollouts, which cost more; and near the teacher there is less to learn and as much noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from video_opd.jsonl import read_jsonl
from video_opd.reproduce.claims import Claim
from video_opd.reproduce.measurements import POOLED, differences, find, measure_runs, measured_shipped, spread
from video_opd.reproduce.places import BASE, Place, make_videos, shipped_stage, train_task
from video_opd.reproduce.rates import (
    BATCH_SIZE,
    STEPS,
    VIDEOS,
    chosen_rate,
    prepare_tuning,
    tuned,
    tuning_stage,
)
from video_opd.reproduce.tasks import Stage, Task

NAME = "estimators"
TITLE = "The estimator, by steps, batch, rollouts and distance"
SUITE = "studies"
SAMPLED, BASELINE, FULL = "video-opd", "video-opd-baseline", "video-opd-full"
ARMS = {SAMPLED: "sampled, as in the paper", BASELINE: "sampled, less its expectation", FULL: "full"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What differs from table 1's budget. ``near`` starts from the student that FULL made with more steps."""

    name: str
    steps: int = STEPS
    changes: dict[str, Any] = field(default_factory=dict)
    near: bool = False


CENTRE = Cell(name="as in table 1")
LONGER = Cell(name="twice the steps", steps=2 * STEPS)
CELLS = (
    CENTRE,
    LONGER,
    Cell(name="twice the prompts", changes={"optim.batch_size": 2 * BATCH_SIZE}),
    Cell(name="four rollouts", changes={"sampling.rollouts": 4}),
    Cell(name="near the teacher", near=True),
)


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, [0.0])


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    def runs(near: bool) -> list[Task]:
        return [
            train_task(
                place,
                run_of(place, arm, cell, seed),
                arm,
                data=place.pool(seed, 0.0),
                evaluate=place.tests,
                seed=seed,
                steps=cell.steps,
                changes=tuned(place, arm)
                | cell.changes
                | ({"model.path": run_of(place, FULL, LONGER, seed) / "model"} if near else {}),
            )
            for seed in seeds
            for cell in CELLS
            if cell.near == near
            for arm in ARMS
        ]

    return [[*shipped_stage(place), *tuning_stage(place, list(ARMS))], runs(near=False), runs(near=True)]


def run_of(place: Place, arm: str, cell: Cell, seed: int) -> Path:
    return place.runs(NAME) / f"{arm}-{cell.name.replace(' ', '-')}-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    base = measured_shipped(place)[BASE]
    cells = []
    for cell in CELLS:
        runs = {arm: [run_of(place, arm, cell, seed) for seed in seeds] for arm in ARMS}
        arms = {arm: measure_runs(place, found) for arm, found in runs.items()}
        before = [run_of(place, FULL, LONGER, seed) for seed in seeds]
        start = measure_runs(place, before) if cell.near else base
        cells.append(
            {
                "cell": cell.name,
                "start": start.means(),
                "mIoU": {arm: found.to_json() for arm, found in arms.items()},
                "seconds": {arm: _training_seconds(found) for arm, found in runs.items()},
                "differences": differences({"start": start, **arms}),
            }
        )
    return {
        "settings": {"videos": VIDEOS, "steps": STEPS, "optim.batch_size": BATCH_SIZE},
        "rates": {arm: chosen_rate(place, arm) for arm in ARMS},
        "cells": cells,
    }


def _training_seconds(runs: Sequence[Path]) -> float:
    """The median time of all steps of a run."""
    rows = [[row["time/step_s"] for _, row in read_jsonl(run / "metrics.jsonl")] for run in runs]
    return statistics.median(sum(found) for found in rows)


def claims(record: Mapping[str, Any]) -> list[Claim]:
    found = []
    for to, since in ((FULL, SAMPLED), (BASELINE, SAMPLED), (FULL, BASELINE)):
        found += [
            Claim(
                says=f"Estimator {ARMS[to]} is better than {ARMS[since]}",
                source="ours",
                where=cell["cell"],
                difference=find(cell, to, since),
            )
            for cell in record["cells"]
        ]
    return found


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: for each cell what the estimators reach, what they gain on their start, and their cost."""
    settings = record["settings"]
    rates = ", ".join(f"{ARMS[arm]} {rate:g}" for arm, rate in record["rates"].items())
    yield (
        f"{settings['videos']} videos a seed, {settings['steps']} steps of {settings['optim.batch_size']} "
        f"prompts with one rollout where nothing else is said; rates: {rates}. Mean IoU over all test sets, "
        "± the standard deviation over seeds; *seconds* are those of all steps, as two runs shared this "
        "machine:\n"
    )
    yield "| | estimator | start | mean IoU | rise [95%] | seconds |"
    yield "|---|---|---|---|---|---|"
    for cell in record["cells"]:
        for arm, name in ARMS.items():
            cells = (
                cell["cell"],
                name,
                spread(cell["start"]),
                spread(cell["mIoU"][arm][POOLED]),
                str(find(cell, arm, "start")),
                f"{cell['seconds'][arm]:.0f}",
            )
            yield f"| {' | '.join(cells)} |"
    yield ""
