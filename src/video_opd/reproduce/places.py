"""Where an experiment's videos, rows and runs are, and the commands that make them.

Every experiment uses the same generated videos: a pool for each seed, one more for choosing learning rates,
the three exact test sets, and a validation set. Rows at several levels of annotation noise share the videos.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from video_opd.data.annotations import read_samples
from video_opd.jsonl import read_jsonl, write_jsonl
from video_opd.progress import track
from video_opd.reproduce.tasks import Stage, Task, settings_words
from video_opd.world.make import TEST_SPLITS, make_world, rows
from video_opd.world.measure import MAX_NEW_TOKENS, TEST_VIDEOS, make_question_set
from video_opd.world.scene import compose
from video_opd.world.shipped import shipped

BASE, TEACHER = "tiny-base", "tiny-teacher"
GENERAL_BASE, GENERAL_TEACHER = "tiny-general-base", "tiny-general-teacher"
POOL_SEED = 300  # + the run's seed; no test set and no tiny model has a video of it
VALIDATION_SEED = 50
VALIDATION_VIDEOS = {split: count // 2 for split, count in TEST_VIDEOS.items()}
TUNING = 99  # the seed of the pool on which learning rates are chosen
START_SECONDS = 1.0  # until a command has its models
EVALUATION_SECONDS = 0.03  # for a row, on one thread
QUERIES = 4  # on a video, about
STEP_SECONDS = {  # for 32 prompts of the generated world, on one thread
    "sft": 1.5,
    "op-rkd": 2.3,
    "op-fkd": 2.0,
    "grpo": 2.4,
    "video-opd": 2.4,
    "video-opd-baseline": 2.4,
    "video-opd-full": 2.4,
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of all experiments."""

    out: Path

    @property
    def tests(self) -> dict[str, Path]:
        """The data file of each test set."""
        return {split: self.out / "test" / f"{split}.jsonl" for split in TEST_SPLITS}

    @property
    def validation(self) -> dict[str, Path]:
        return {split: self.out / "validation" / f"{split}.jsonl" for split in TEST_SPLITS}

    @property
    def questions(self) -> Path:
        """The data file of the general questions about the test sets' videos."""
        return self.out / "test" / "questions.jsonl"

    @property
    def clips(self) -> Path:
        return self.out / "clips"

    def runs(self, experiment: str) -> Path:
        return self.out / experiment

    def pool(self, seed: int, noise: float, name: str = "pool") -> Path:
        """The data file of a seed's training rows at a level of annotation noise."""
        return self.out / f"{name}-{seed}" / f"noise-{noise:g}.jsonl"


def recipe(name: str) -> Path:
    """A recipe that the package holds; ``recipes/reproduce`` of the repository shows the same files."""
    return Path(str(resources.files("video_opd.reproduce") / "recipes" / f"{name}.yaml"))


def make_videos(
    place: Place, seeds: Sequence[int], videos: int, levels: Sequence[float], name: str = "pool"
) -> None:
    """Makes the test sets, the validation set, and each seed's pool at each level. What exists is kept."""
    make_question_set(place.out / "test")
    make_world(place.out / "validation", videos=VALIDATION_VIDEOS, seed=VALIDATION_SEED, track=track)
    for seed in seeds:
        make_world(
            place.pool(seed, 0, name).parent, videos={"train": videos}, seed=POOL_SEED + seed, track=track
        )
        scenes = [compose("train", POOL_SEED + seed, i) for i in range(videos)]
        for level in levels:
            found = [row for scene in scenes for row in rows(scene, annotation_noise=level)]
            write_jsonl(place.pool(seed, level, name), found)


def train_task(
    place: Place,
    folder: Path,
    name: str,
    *,
    data: Path,
    evaluate: Mapping[str, Path],
    seed: int,
    steps: int,
    changes: Mapping[str, Any] | None = None,
) -> Task:
    """``video-opd train`` on ``data`` with the recipe ``name``, evaluated on the sets of ``evaluate``.

    A change whose value is callable is asked for its value when the task starts.
    """
    fixed: dict[str, Any] = {
        "data.train": data,
        "data.cache_dir": place.clips,
        "data.workers": 1,
        "model.path": shipped(BASE),
        "optim.max_steps": steps,
        "run.seed": seed,
        "run.dir": folder,
        "run.save_every": steps,
        "run.trackers": "[]",
        "evaluate.data": json.dumps([str(path) for path in evaluate.values()]),
        "evaluate.batch_size": 32,
    }
    if name not in ("sft", "grpo"):
        fixed["teacher.path"] = shipped(TEACHER)

    return Task(
        name=f"{folder.parent.name}-{folder.name}",
        words=lambda: ["train", recipe(name), *settings_words(fixed | asked(changes or {}))],
        done=lambda: is_finished(folder, evaluate),
        seconds=START_SECONDS
        + steps * STEP_SECONDS[name]
        + EVALUATION_SECONDS * QUERIES * sum(TEST_VIDEOS.values()),
    )


def is_finished(run: Path, evaluate: Mapping[str, Path]) -> bool:
    """Whether a run has its last step, and predictions for every row that it is evaluated on."""
    from video_opd.training.run_folder import RunFolder

    folder = RunFolder(run)
    return folder.finished and all(has_all_rows(folder.predictions(path), path) for path in evaluate.values())


def are_finished(rounds: Path) -> bool:
    """Whether a folder of several rounds has all of them."""
    from video_opd.training.run_folder import read_record

    return (read_record(rounds / "rounds.json") or {}).get("finished") is True


def predictions_of(run: Path, data: Path) -> Path:
    from video_opd.training.run_folder import RunFolder

    return RunFolder(run).predictions(data)


def rounds_task(
    place: Place,
    folder: Path,
    name: str,
    *,
    data: Path,
    rows: int,
    teacher: Path,
    seed: int,
    rounds: int,
    steps: int,
    changes: Mapping[str, Any],
) -> Task:
    """``video-opd rounds`` with the recipe ``name``: ``steps`` steps in each round.

    ``rows`` is about the number of rows of the pool ``data``, for the estimate of time.
    """
    fixed: dict[str, Any] = {
        "data.train": data,
        "data.cache_dir": place.clips,
        "data.workers": 1,
        "model.path": shipped(BASE),
        "teacher.path": teacher,
        "optim.max_steps": steps,
        "run.seed": seed,
        "run.dir": folder,
        "run.save_every": steps,
        "run.trackers": "[]",
        "tvdf.batch_size": 32,
        "rounds.count": rounds,
    }
    return Task(
        name=f"{folder.parent.name}-{folder.name}",
        words=lambda: ["rounds", recipe(name), *settings_words(fixed | asked(changes))],
        done=lambda: are_finished(folder),
        seconds=START_SECONDS
        + (2 + rounds) * EVALUATION_SECONDS * rows
        + rounds * steps * STEP_SECONDS[name],
    )


def asked(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with those that are callable asked for their value."""
    return {key: value() if callable(value) else value for key, value in changes.items()}


def predict_task(folder: Path, model: Path, data: Path, flags: Sequence[Any] = ()) -> Task:
    """``video-opd predict`` of a model, into the files that a run has of its student."""
    out = predictions_of(folder, data)
    words = ["predict", model, data, "--out", out, "--batch-size", 32]
    if "--max-new-tokens" not in flags:
        words += ["--max-new-tokens", MAX_NEW_TOKENS]
    return Task(
        name=f"{folder.parent.name}-{folder.name}-{data.stem}",
        words=lambda: [*words, *flags],
        done=lambda: has_all_rows(out, data),
        seconds=START_SECONDS
        + EVALUATION_SECONDS * QUERIES * TEST_VIDEOS.get(data.stem, sum(TEST_VIDEOS.values())),
    )


def questions_task(place: Place, folder: Path, model: Path) -> Task:
    """``video-opd predict`` on the general questions about the videos of the test sets."""
    return predict_task(folder, model, place.questions, ["--prompt.style", "question"])


def has_all_rows(path: Path, data: Path) -> bool:
    """Whether a file has a row for each row of a data file."""
    return path.exists() and {row.get("id") for _, row in read_jsonl(path)} >= {
        sample.id for sample in read_samples(data)
    }


def shipped_stage(place: Place, models: Sequence[str] = (BASE, TEACHER)) -> Stage:
    """The responses of shipped models to the test sets."""
    return [
        predict_task(place.runs("shipped") / model, shipped(model), data)
        for model in models
        for data in place.tests.values()
    ]
