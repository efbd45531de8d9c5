"""Each arm's learning rate, chosen on a validation set of its own: the same small grid for every method.

The rates are tried at a middle level of annotation noise and serve all levels, so that no method is better
tuned at one end than at the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce.measurements import measure, samples_of
from video_opd.reproduce.places import TUNING, Place, make_videos, predictions_of, train_task
from video_opd.reproduce.tasks import Stage

RATES = (1.5e-4, 3e-4, 6e-4)
NOISE = 0.5  # of the rows on which they are tried
VIDEOS = 100  # of a pool, with about 430 rows
STEPS, BATCH_SIZE = 30, 32  # of a run, where an experiment says nothing else
BATCH = {"optim.batch_size": BATCH_SIZE}
WITHOUT_ANNOTATIONS = ("video-opd", "video-opd-baseline", "video-opd-full")  # recipes whose signal needs none


def seen(arm: str, level: float) -> float:
    """The level of annotation noise that an arm sees: none if it does not look at annotations."""
    return 0.0 if arm in WITHOUT_ANNOTATIONS else level


def levels_of(arm: str, levels: Sequence[float]) -> list[float]:
    """The levels at which an arm has a run of its own."""
    return list(dict.fromkeys(seen(arm, level) for level in levels))


def prepare_tuning(place: Place) -> None:
    make_videos(place, [TUNING], VIDEOS, [0.0, NOISE])


def tuning_stage(place: Place, arms: Sequence[str]) -> Stage:
    """One run for each arm and rate, on the pool that is there for that."""
    return [
        train_task(
            place,
            rate_run(place, arm, rate),
            arm,
            data=place.pool(TUNING, seen(arm, NOISE)),
            evaluate=place.validation,
            seed=TUNING,
            steps=STEPS,
            changes=BATCH | {"optim.lr": rate},
        )
        for arm in arms
        for rate in RATES
    ]


def validation_mious(place: Place, arm: str) -> dict[float, float]:
    """The mean IoU on the validation set of each rate, in percent."""
    sets = samples_of(place.validation)

    def miou(rate: float) -> float:
        run = rate_run(place, arm, rate)
        return statistics.fmean(
            measure(
                sets, [{name: predictions_of(run, path) for name, path in place.validation.items()}]
            ).means()
        )

    return {rate: miou(rate) for rate in RATES}


def chosen_rate(place: Place, arm: str) -> float:
    """The rate with the best mean IoU on the validation set; of equals, the smallest."""
    found = validation_mious(place, arm)
    return max(sorted(found), key=lambda rate: found[rate])


def tuned(place: Place, arm: str) -> dict[str, Any]:
    """What every run of an arm has: the batch, and the chosen rate, asked for when the run starts."""
    return BATCH | {"optim.lr": lambda: chosen_rate(place, arm)}


def rate_run(place: Place, arm: str, rate: float) -> Path:
    return place.runs("rates") / f"{arm}-noise-{seen(arm, NOISE):g}-rate-{rate:g}"
