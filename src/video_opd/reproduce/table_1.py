"""Table 1: five methods from one base, at three levels of annotation noise.

The paper trains on loose annotations and tests on corrected ones, so its order of methods is a statement
about one level of noise. Every arm takes the same number of steps with the same number of prompts a step,
from the same rows of a seed, at a learning rate that was chosen for it. Video-OPD sees no annotation, so one
run of a seed stands for all levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce.claims import Claim
from video_opd.reproduce.measurements import (
    POOLED,
    Measured,
    differences,
    find,
    measure_runs,
    measured_shipped,
    spread,
)
from video_opd.reproduce.places import BASE, TEACHER, Place, make_videos, shipped_stage, train_task
from video_opd.reproduce.rates import (
    BATCH,
    NOISE,
    RATES,
    STEPS,
    VIDEOS,
    chosen_rate,
    levels_of,
    prepare_tuning,
    seen,
    tuned,
    tuning_stage,
    validation_mious,
)
from video_opd.reproduce.tasks import Stage

NAME = "table-1"
TITLE = "Table 1: methods and annotation noise"
SUITE = "tables"
LEVELS = (0.0, 0.5, 1.0)
ARMS = {
    "sft": "SFT",
    "op-rkd": "OP-RKD",
    "op-fkd": "OP-FKD",
    "grpo": "GRPO",
    "video-opd": "Video-OPD",
    "video-opd-full": "Video-OPD, estimator full",
}
OURS = ("video-opd", "video-opd-full")
BASELINES = tuple(arm for arm in ARMS if arm not in OURS)


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, LEVELS)


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    return [
        [*shipped_stage(place), *tuning_stage(place, list(ARMS))],
        runs_of_arms(place, NAME, seeds, LEVELS),
    ]


def runs_of_arms(
    place: Place,
    experiment: str,
    seeds: Sequence[int],
    levels: Sequence[float],
    changes: Mapping[str, Any] | None = None,
) -> Stage:
    """A run of every arm, level and seed; ``changes`` are settings of all of them."""
    return [
        train_task(
            place,
            run_of(place, arm, level, seed, experiment),
            arm,
            data=place.pool(seed, level),
            evaluate=place.tests,
            seed=seed,
            steps=STEPS,
            changes=tuned(place, arm) | dict(changes or {}),
        )
        for seed in seeds
        for arm in ARMS
        for level in levels_of(arm, levels)
    ]


def run_of(place: Place, arm: str, level: float, seed: int, experiment: str = NAME) -> Path:
    return place.runs(experiment) / f"{arm}-noise-{seen(arm, level):g}-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    shipped = measured_shipped(place)
    return {
        "settings": {"videos": VIDEOS, "steps": STEPS, **BATCH, "rates": RATES, "rates_noise": NOISE},
        "rates": {arm: chosen_rate(place, arm) for arm in ARMS},
        "validation": {
            arm: {f"{rate:g}": miou for rate, miou in validation_mious(place, arm).items()} for arm in ARMS
        },
        "shipped": {model: found.to_json() for model, found in shipped.items()},
        "levels": measured_levels(place, NAME, seeds, LEVELS, {BASE: shipped[BASE]}),
    }


def measured_levels(
    place: Place,
    experiment: str,
    seeds: Sequence[int],
    levels: Sequence[float],
    start: Mapping[str, Measured],
) -> list[dict[str, Any]]:
    """What the arms reached at each level, and all differences of them and of what they started from."""
    records = []
    for level in levels:
        arms = {
            arm: measure_runs(place, [run_of(place, arm, level, seed, experiment) for seed in seeds])
            for arm in ARMS
        }
        records.append(
            {
                "noise": level,
                "mIoU": {arm: found.to_json() for arm, found in arms.items()},
                "differences": differences({**start, **arms}),
            }
        )
    return records


def claims(record: Mapping[str, Any], where: str = "") -> list[Claim]:
    """The order of the methods at each level; ``where`` is added to the place of each claim."""
    return [
        Claim(
            says=f"{ARMS[ours]} is better than {ARMS[other]}",
            source="table 1",
            where=f"annotation noise {level['noise']:g}{where}",
            difference=find(level, ours, other),
        )
        for ours in OURS
        for other in BASELINES
        for level in record["levels"]
    ]


def best(level: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The arm with the highest pooled mean IoU at a level, and those that cannot be told from it."""

    def mean(arm: str) -> float:
        found = level["mIoU"][arm][POOLED]
        return sum(found) / len(found)

    first = max(ARMS, key=mean)
    near = [arm for arm in ARMS if arm != first and find(level, first, arm).low <= 0]
    return first, sorted(near, key=mean, reverse=True)


def leaders(record: Mapping[str, Any], start: Mapping[str, Any] | None = None) -> Iterator[Sequence[str]]:
    """A row of the map for each level: the student's mean IoU before, the level, the best arm, its mean IoU,
    and the arms that its intervals do not tell from it. ``start`` is the student's record, if not the base's.
    """
    before = spread((start or record["shipped"][BASE])[POOLED])
    for level in record["levels"]:
        first, near = best(level)
        others = "; ".join(ARMS[arm] for arm in near) or "none"
        yield before, f"{level['noise']:g}", ARMS[first], spread(level["mIoU"][first][POOLED]), others


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: mean IoU of each arm at each level, the rates that were chosen, by test set, too."""
    settings, levels = record["settings"], record["levels"]
    yield (
        f"{settings['videos']} training videos a seed, {settings['steps']} steps of "
        f"{settings['optim.batch_size']} prompts, each arm at the rate that was "
        f"best on the validation set with annotation noise {settings['rates_noise']:g}. Mean IoU over the "
        "rows of all test sets, ± the standard deviation over seeds:\n"
    )
    yield "| | rate | " + " | ".join(f"noise {level['noise']:g}" for level in levels) + " |"
    yield "|---|---|" + "---|" * len(levels)
    for model in (BASE, TEACHER):
        value = spread(record["shipped"][model][POOLED])
        yield f"| {model} | | " + " | ".join(value for _ in levels) + " |"
    for arm, name in ARMS.items():
        cells = [spread(level["mIoU"][arm][POOLED]) for level in levels]
        yield f"| {name} | {record['rates'][arm]:g} | " + " | ".join(cells) + " |"
    yield "\nMean IoU on the validation set by rate:\n"
    rates = list(next(iter(record["validation"].values())))
    yield "| | " + " | ".join(rates) + " |"
    yield "|---|" + "---|" * len(rates)
    for arm, name in ARMS.items():
        yield f"| {name} | " + " | ".join(f"{record['validation'][arm][r]:.1f}" for r in rates) + " |"
    yield "\nBy test set:\n"
    sets = [name for name in levels[0]["mIoU"][next(iter(ARMS))] if name != POOLED]
    yield "| | noise | " + " | ".join(sets) + " |"
    yield "|---|---|" + "---|" * len(sets)
    for arm, name in ARMS.items():
        for level in levels:
            cells = [spread(level["mIoU"][arm][testset]) for testset in sets]
            yield f"| {name} | {level['noise']:g} | " + " | ".join(cells) + " |"
    yield ""
