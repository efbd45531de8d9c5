"""Table 8: Video-OPD with and without thinking before the answer.

The base and the teacher were taught to say when an object is on screen, between ``<think>`` and
``</think>``, before they say when its event happens. Both arms begin with the same base and see the same
rows; the teacher's distributions are those of a teacher that thinks, or that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce.claims import Claim
from video_opd.reproduce.figure_4 import models_of
from video_opd.reproduce.measurements import POOLED, differences, find, measure_runs, spread
from video_opd.reproduce.places import (
    GENERAL_BASE,
    GENERAL_TEACHER,
    Place,
    make_videos,
    predict_task,
    train_task,
)
from video_opd.reproduce.rates import BATCH, STEPS, VIDEOS, chosen_rate, prepare_tuning, tuned, tuning_stage
from video_opd.reproduce.tasks import Stage
from video_opd.world.shipped import shipped

NAME = "table-8"
TITLE = "Table 8: thinking before the answer"
SUITE = "tables"
RECIPE = "video-opd-full"
MAX_NEW_TOKENS = 64  # a thought and an answer are about 35
MODES = {"no-thinking": [], "thinking": ["--prompt.thinking", "true", "--max-new-tokens", MAX_NEW_TOKENS]}
MORE_MODELS = (GENERAL_BASE, GENERAL_TEACHER)
MODELS = {"base": GENERAL_BASE, "teacher": GENERAL_TEACHER}


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, [0.0])


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    first = [
        predict_task(shipped_of(place, model, mode), shipped(MODELS[model]), data, flags)
        for model in MODELS
        for mode, flags in MODES.items()
        for data in place.tests.values()
    ]
    runs = [
        train_task(
            place,
            run_of(place, mode, seed),
            RECIPE,
            data=place.pool(seed, 0.0),
            evaluate=place.tests,
            seed=seed,
            steps=STEPS,
            changes=tuned(place, RECIPE)
            | models_of(RECIPE)
            | ({"prompt.thinking": "true", "sampling.max_new_tokens": MAX_NEW_TOKENS} if flags else {}),
        )
        for seed in seeds
        for mode, flags in MODES.items()
    ]
    return [[*first, *tuning_stage(place, [RECIPE])], runs]


def shipped_of(place: Place, model: str, mode: str) -> Path:
    return place.runs(NAME) / f"{model}-{mode}"


def run_of(place: Place, mode: str, seed: int) -> Path:
    return place.runs(NAME) / f"{mode}-seed-{seed}"


def arm_of(model: str, mode: str) -> str:
    return f"{model}, {mode}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    arms = {
        arm_of(model, mode): measure_runs(place, [shipped_of(place, model, mode)])
        for model in MODELS
        for mode in MODES
    }
    arms |= {
        arm_of("student", mode): measure_runs(place, [run_of(place, mode, seed) for seed in seeds])
        for mode in MODES
    }
    modes = [(arm_of(name, "no-thinking"), arm_of(name, "thinking")) for name in (*MODELS, "student")]
    rises = [(arm_of("student", mode), arm_of("base", mode)) for mode in MODES]
    return {
        "settings": {"videos": VIDEOS, "steps": STEPS, "max_new_tokens": MAX_NEW_TOKENS, **BATCH},
        "rate": chosen_rate(place, RECIPE),
        "mIoU": {arm: found.to_json() for arm, found in arms.items()},
        "differences": differences(arms, [*modes, *rises]),
    }


def claims(record: Mapping[str, Any]) -> list[Claim]:
    return [
        Claim(
            says="Video-OPD without thinking is better than with it",
            source="table 8",
            where="any annotation noise",
            difference=find(record, arm_of("student", "no-thinking"), arm_of("student", "thinking")),
        )
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: base, student and teacher in both modes."""
    settings, mious = record["settings"], record["mIoU"]
    sets = [name for name in next(iter(mious.values())) if name != POOLED]
    yield (
        f"{settings['videos']} training videos a seed, {settings['steps']} steps of "
        f"{settings['optim.batch_size']} prompts, estimator full at rate {record['rate']:g}. Mean IoU, ± the "
        "standard deviation over seeds:\n"
    )
    yield "| | " + " | ".join(sets) + " | all |"
    yield "|---|" + "---|" * (len(sets) + 1)
    for name in ("base", "student", "teacher"):
        for mode in MODES:
            cells = [spread(mious[arm_of(name, mode)][s]) for s in (*sets, POOLED)]
            yield f"| {name}, {mode} | " + " | ".join(cells) + " |"
    yield ""
