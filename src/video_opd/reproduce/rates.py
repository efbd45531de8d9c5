"""Each arm's learning rate, chosen on a validation set of its own: the same small grid for every method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from video_opd.reproduce.measurements import measure
from video_opd.reproduce.places import TUNING, Place, predictions_of, samples_of, train_task
from video_opd.reproduce.tasks import Stage

RATES = (1.5e-4, 3e-4, 6e-4)
STEPS, BATCH_SIZE = 30, 32  # of every run
BATCH = {"optim.batch_size": BATCH_SIZE}
WITHOUT_ANNOTATIONS = ("video-opd", "video-opd-full")  # recipes whose signal needs none


def seen(arm: str, level: float) -> float:
    """The level of annotation noise that an arm sees: none if it does not look at annotations."""
    return 0.0 if arm in WITHOUT_ANNOTATIONS else level


def levels_of(arm: str, levels: Sequence[float]) -> list[float]:
    """The levels at which an arm has a run of its own."""
    return list(dict.fromkeys(seen(arm, level) for level in levels))


def tuning_stage(place: Place, arms: Sequence[str], levels: Sequence[float]) -> Stage:
    """One run for each arm, level of annotation noise and rate, on the pool that is there for that."""
    return [
        train_task(
            place,
            _run(place, arm, level, rate),
            arm,
            data=place.pool(TUNING, level),
            evaluate=place.validation,
            seed=TUNING,
            steps=STEPS,
            changes=BATCH | {"optim.lr": rate},
        )
        for arm in arms
        for level in levels_of(arm, levels)
        for rate in RATES
    ]


def validation_mious(place: Place, arm: str, level: float) -> dict[float, float]:
    """The mean IoU on the validation set of each rate, in percent."""
    sets = samples_of(place.validation)

    def miou(rate: float) -> float:
        run = _run(place, arm, level, rate)
        return statistics.fmean(
            measure(
                sets, [{name: predictions_of(run, path) for name, path in place.validation.items()}]
            ).means()
        )

    return {rate: miou(rate) for rate in RATES}


def chosen_rate(place: Place, arm: str, level: float) -> float:
    """The rate with the best mean IoU on the validation set; of equals, the smallest."""
    found = validation_mious(place, arm, level)
    return max(sorted(found), key=lambda rate: found[rate])


def _run(place: Place, arm: str, level: float, rate: float) -> Path:
    return place.runs("rates") / f"{arm}-noise-{seen(arm, level):g}-rate-{rate:g}"
