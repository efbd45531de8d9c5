"""Video-OPD from end to end on the generated world, with nothing to prepare.

world → scores of a pool of rows → TVDF → Video-OPD → evaluation of base, student, teacher → report

Every stage runs the code of the command with its name, and is skipped if its files exist, so that a killed
demo continues. Only the inputs are special: generated videos, and the two tiny models that the package ships.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from video_opd.config import Recipe, SelectionConfig, load_recipe
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.locks import locked_folder
from video_opd.progress import log, track
from video_opd.types import Sample
from video_opd.world.measure import MAX_NEW_TOKENS, evaluate_model, make_test_sets
from video_opd.world.shipped import shipped

POOL_VIDEOS = 160  # videos of the training split, with about 690 rows: the pool
SELECTED = 448  # rows of the pool that are trained on at most, a few times each
# The pool's seed is this plus the demo's seed. No pool has a video that the tiny models were made on.
TRAIN_SEED = 100
TEACHER_K, STUDENT_K = 4, 2
SHOWN_VIDEOS, SHOWN_FRAMES = 6, 12
OPTIONS = {"optim.max_steps": "--steps", "run.seed": "--seed"}  # the demo's options for keys of its recipe


def run_demo(
    out: str | Path, *, seed: int = 0, steps: int | None = None, changes: Mapping[str, Any] | None = None
) -> Path:
    """Runs the demo in the folder ``out``, which becomes a run folder, and returns ``out``.

    ``steps`` is the number of optimiser steps, the recipe's if None. ``changes`` are other settings of the
    recipe, by their keys. Raises :class:`~video_opd.errors.UserError` if ``out`` cannot be written, and if it
    holds another demo or run, or one that is going on.
    """
    from video_opd.models.inference import with_video_form

    out = Path(out)
    recipe = with_video_form(demo_recipe(out, seed, steps).changed(**(changes or {})))  # as train writes it
    with locked_folder(out):
        _claim(out, recipe)
        _run(out, recipe)
    return out


def _run(out: Path, recipe: Recipe) -> None:
    seed = recipe.run.seed
    from video_opd.curriculum.pool import inference_configs, score_pool
    from video_opd.curriculum.scores import ScoreSettings
    from video_opd.curriculum.tvdf import select_file
    from video_opd.data.annotations import read_samples
    from video_opd.training.loop import train
    from video_opd.world.make import make_world

    pool = make_world(
        out / "world" / "train", videos={"train": POOL_VIDEOS}, seed=TRAIN_SEED + seed, track=track
    )
    tests = make_test_sets(out / "world" / "test")

    score_pool(
        *inference_configs(recipe),
        read_samples(pool["train"]),
        out / "scores.jsonl",
        settings=ScoreSettings(
            k=TEACHER_K, student_k=STUDENT_K, max_new_tokens=recipe.sampling.max_new_tokens, seed=seed
        ),
        batch_size=32,
        cache_dir=recipe.data.cache_dir,
    )
    _, summary = select_file(
        pool["train"],
        out / "scores.jsonl",
        SelectionConfig(k=SELECTED),
        seed=seed,
        out=out / "selected.jsonl",
    )
    log(
        f"TVDF: the pool has {summary.rows} rows, {summary.candidates} of them passed the gate (candidates), "
        f"{summary.selected} are selected"
    )
    write_text(out / "select.json", json.dumps(summary.to_json()) + "\n")
    train(recipe)

    models = {"base": Path(recipe.model.path), "student": out / "model", "teacher": Path(recipe.teacher.path)}
    for name, path in models.items():
        for split, data in tests.items():
            evaluate_model(name, path, split, data, out / "eval")
    write_timelines(tests["short"], list(models), out / "eval")
    _record_failures(models["student"], models["teacher"], tests, out)


def _record_failures(student: Path, teacher: Path, tests: Mapping[str, Path], out: Path) -> None:
    """Writes some of the student's failures on each test set, for the report."""
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.failure_records import explainer, write_failures
    from video_opd.evaluation.predict import GenerationSettings
    from video_opd.evaluation.predictions import read_predictions
    from video_opd.models.alternatives import text_of_token
    from video_opd.models.inference import load_inference_model, read_inference_config
    from video_opd.models.teachers import LocalTeacher

    asked, scoring = (
        load_inference_model(read_inference_config(str(path), []), cache_dir=out / "clips")
        for path in (student, teacher)
    )
    explain = explainer(
        asked.policy,
        LocalTeacher(scoring.policy),
        text_of_token(asked.policy.processor),
        GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
    )
    for split, data in tests.items():
        write_failures(
            read_samples(data),
            read_predictions(out / "eval" / f"predictions-student-{split}.jsonl"),
            out / "eval" / f"failures-{split}.jsonl",
            asked.prompts,
            explain,
        )


def _claim(out: Path, recipe: Recipe) -> None:
    """Claims the folder ``out`` before anything is made in it; errors name the demo's own options."""
    from video_opd.training.run_folder import FolderInUse, RunFolder

    try:
        RunFolder(out).claim(recipe)
    except FolderInUse as error:
        option = OPTIONS.get(error.key or "")
        if option is None:
            raise UserError(f"{out} holds {error.holds}: give the demo another --out") from error
        raise UserError(
            f"{out} holds a demo with {option} {error.stored}, and this one has {error.given}: "
            f"give {option} {error.stored} to continue that one, or another --out"
        ) from error


def demo_recipe(out: Path, seed: int, steps: int | None) -> Recipe:
    """The recipe ``recipes/tiny/video-opd.yaml``, with the shipped models and with the files of ``out``."""
    changes: dict[str, Any] = {
        "model.path": str(shipped("tiny-base")),
        "teacher.path": str(shipped("tiny-teacher")),
        "data.train": str(out / "selected.jsonl"),
        "data.cache_dir": str(out / "clips"),
        "run.dir": str(out),
        "run.seed": seed,
    }
    if steps is not None:
        changes["optim.max_steps"] = steps
    path = Path(str(resources.files("video_opd.world") / "recipes" / "video-opd.yaml"))
    return load_recipe(path).changed(**changes)


def write_timelines(data: Path, models: Sequence[str], out: Path) -> None:
    """Writes the report's timelines: annotation, predictions and frames of one query of the first videos."""
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.predictions import read_predictions
    from video_opd.jsonl import write_jsonl

    predictions = {name: read_predictions(out / f"predictions-{name}-{data.stem}.jsonl") for name in models}
    first_of_each: dict[Path, Sample] = {}
    for sample in read_samples(data):
        first_of_each.setdefault(sample.video, sample)
    shown = list(first_of_each.values())[:SHOWN_VIDEOS]
    write_jsonl(out / "timelines.jsonl", [_timeline(sample, predictions) for sample in shown])


def _timeline(sample: Sample, predictions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    from video_opd.config import VideoConfig
    from video_opd.data.stills import jpeg_uri
    from video_opd.data.video import load_clip

    clip = load_clip(sample.video, VideoConfig(min_frame_tokens=9, max_frame_tokens=16))
    pictures, times = [], []
    for i in range(SHOWN_FRAMES):
        k = i * (len(clip.frames) - 1) // (SHOWN_FRAMES - 1)
        pictures.append(jpeg_uri(clip.frames[k]))
        times.append(float(clip.times_s[k]))
    return {
        "id": sample.id,
        "video": sample.video.name,
        "query": sample.query,
        "duration": clip.duration_s,
        "truth": sample.spans,
        "answers": {
            name: rows[sample.id].spans[0] if sample.id in rows else None
            for name, rows in predictions.items()
        },
        "frames": pictures,
        "frame_times_s": times,
    }
