"""Figure 4: what post-training for grounding does to other abilities.

The base was taught to answer four kinds of general questions, too (:mod:`video_opd.world.questions`). Every
arm of table 1 is trained from it, on grounding alone and on loose annotations, at the rate that table 1 chose
for the method, and then asked the questions about the videos of the test sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.reproduce.claims import ACCURACY, Claim
from video_opd.reproduce.measurements import (
    POOLED,
    differences,
    find,
    measure_questions,
    measure_runs,
    measured_shipped,
    spread,
)
from video_opd.reproduce.places import (
    GENERAL_BASE,
    GENERAL_TEACHER,
    Place,
    make_videos,
    questions_task,
    shipped_stage,
    train_task,
)
from video_opd.reproduce.rates import (
    BATCH,
    STEPS,
    VIDEOS,
    chosen_rate,
    prepare_tuning,
    seen,
    tuned,
    tuning_stage,
)
from video_opd.reproduce.table_1 import ARMS
from video_opd.reproduce.tasks import Stage
from video_opd.world.questions import ABILITIES
from video_opd.world.shipped import shipped

NAME = "figure-4"
TITLE = "Figure 4: other abilities after post-training"
SUITE = "figures"
NOISE = 1.0
OFF_POLICY = ("op-rkd", "op-fkd")
ON_POLICY = ("grpo", "video-opd", "video-opd-full")
MODELS = MORE_MODELS = (GENERAL_BASE, GENERAL_TEACHER)


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, [0.0, NOISE])


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    first = [
        *shipped_stage(place, MODELS),
        *(questions_task(place, place.runs("shipped") / model, shipped(model)) for model in MODELS),
        *tuning_stage(place, list(ARMS)),
    ]
    runs = {
        run_of(place, arm, seed): train_task(
            place,
            run_of(place, arm, seed),
            arm,
            data=place.pool(seed, seen(arm, NOISE)),
            evaluate=place.tests,
            seed=seed,
            steps=STEPS,
            changes=tuned(place, arm) | models_of(arm),
        )
        for seed in seeds
        for arm in ARMS
    }
    asked = [questions_task(place, run, run / "model").waiting_for(made) for run, made in runs.items()]
    return [first, [*runs.values()], asked]


def models_of(arm: str) -> dict[str, Any]:
    """The settings of a recipe that name the general base, and the general teacher where there is one."""
    settings = {"model.path": shipped(GENERAL_BASE)}
    return settings if arm in ("sft", "grpo") else settings | {"teacher.path": shipped(GENERAL_TEACHER)}


def run_of(place: Place, arm: str, seed: int) -> Path:
    return place.runs(NAME) / f"{arm}-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    runs = {arm: [run_of(place, arm, seed) for seed in seeds] for arm in ARMS}
    folders = {model: [place.runs("shipped") / model] for model in MODELS}
    answered = {arm: measure_questions(place, found) for arm, found in (folders | runs).items()}
    grounded = measured_shipped(place, MODELS)
    grounded |= {arm: measure_runs(place, found) for arm, found in runs.items()}
    against = [(arm, GENERAL_BASE) for arm in ARMS] + [(GENERAL_BASE, arm) for arm in ARMS]
    pairs = [*against, *((ours, other) for ours in ARMS for other in ARMS if ours != other)]
    return {
        "settings": {"videos": VIDEOS, "noise": NOISE, "steps": STEPS, **BATCH},
        "rates": {arm: chosen_rate(place, arm) for arm in ARMS},
        "accuracy": {arm: found.to_json() for arm, found in answered.items()},
        "differences": differences(answered, pairs),
        "mIoU": {arm: found.to_json() for arm, found in grounded.items()},
    }


def claims(record: Mapping[str, Any]) -> list[Claim]:
    def claim(says: str, to: str, since: str) -> Claim:
        return Claim(
            says=says,
            source="figure 4",
            where=f"annotation noise {record['settings']['noise']:g}",
            difference=find(record, to, since),
            score=ACCURACY,
        )

    found = [claim(f"{ARMS[arm]} loses other abilities", GENERAL_BASE, arm) for arm in OFF_POLICY]
    found += [claim(f"{ARMS[arm]} gains in other abilities", arm, GENERAL_BASE) for arm in ON_POLICY]
    return found + [
        claim(f"{ARMS[ours]} keeps more than {ARMS[other]}", ours, other)
        for ours in ("video-opd", "video-opd-full")
        for other in ("sft", *OFF_POLICY, "grpo")
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: the accuracy of each arm by ability, its change, and how well it grounds."""
    settings = record["settings"]
    abilities = [name for name in ABILITIES if name in record["accuracy"][GENERAL_BASE]]
    yield (
        f"Trained on grounding alone: {settings['videos']} videos a seed with annotation noise "
        f"{settings['noise']:g}, {settings['steps']} steps of {settings['optim.batch_size']} prompts at the "
        "rates of table 1. Accuracy in percent on general questions about the videos of the test sets, ± "
        "the standard deviation over seeds:\n"
    )
    yield "| | " + " | ".join(abilities) + " | all | change [95%] | mean IoU |"
    yield "|---|" + "---|" * (len(abilities) + 3)
    for arm, name in ({GENERAL_BASE: "base", GENERAL_TEACHER: "teacher"} | ARMS).items():
        accuracy = record["accuracy"][arm]
        cells = [spread(accuracy[ability]) for ability in (*abilities, POOLED)]
        cells.append(str(find(record, arm, GENERAL_BASE)) if arm in ARMS else "")
        cells.append(spread(record["mIoU"][arm][POOLED]))
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
