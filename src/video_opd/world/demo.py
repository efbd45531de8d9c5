"""The main job from end to end on the generated world, with nothing to prepare.

world → scores of a candidate pool → TVDF → Video-OPD → evaluation of base, student, teacher → report

Every stage is the one that the commands of the same name run, and is skipped when its files are there: a demo
that was killed continues. Only the inputs are special: generated videos, and the two tiny models that are
shipped with the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from video_opd.config import Recipe, SelectionConfig, load_recipe
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.progress import log, track
from video_opd.types import Sample
from video_opd.world.measure import evaluate_model, make_test_sets

POOL_VIDEOS = 160  # of the training split: about 690 candidates
SELECTED = 448  # of them, the most that are trained on; a few passes over them
TRAIN_SEED = 100  # + the demo's seed: other videos for every seed, never those the models were made on
TEACHER_K, STUDENT_K = 4, 2
SHOWN_VIDEOS, SHOWN_FRAMES = 6, 12


def shipped(name: str) -> Path:
    """The folder of a shipped model: ``"tiny-base"``, ``"tiny-teacher"``, ``"tiny-teacher-small"``."""
    return Path(str(resources.files("video_opd.world") / "checkpoints" / name))


def run_demo(out: str | Path, *, seed: int = 0, steps: int | None = None) -> Path:
    """Runs the demo in the folder ``out``, which becomes a run folder; returns it.

    ``steps`` is the number of optimiser steps (the recipe's own when None). Raises
    :class:`~video_opd.errors.UserError` when ``out`` cannot be written or holds another demo.
    """
    out = Path(out)
    recipe = demo_recipe(out, seed, steps)
    _claim(out, recipe)

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
    log(f"TVDF: {summary.selected} of {summary.rows} candidates; {summary.candidates} passed the gate")
    write_text(out / "select.json", json.dumps(summary.to_json()) + "\n")
    train(recipe)

    models = {"base": Path(recipe.model.path), "student": out / "model", "teacher": Path(recipe.teacher.path)}
    for name, path in models.items():
        for split, data in tests.items():
            evaluate_model(name, path, split, data, out / "eval")
    write_timelines(tests["short"], list(models), out / "eval")
    return out


def _claim(out: Path, recipe: Recipe) -> None:
    """Makes ``out`` this demo's folder before anything is made in it, or says what it holds in the demo's own
    options."""
    from video_opd.training.run_folder import RunFolder

    folder = RunFolder(out)
    try:
        folder.claim(recipe)
    except UserError as error:
        before: dict[str, Any] = {}
        if folder.recipe.exists() and not folder.round(1).exists():
            before = yaml.safe_load(folder.recipe.read_text(encoding="utf-8")) or {}
        for option, (section, key), new in (
            ("--steps", ("optim", "max_steps"), recipe.optim.max_steps),
            ("--seed", ("run", "seed"), recipe.run.seed),
        ):
            old = before.get(section, {}).get(key, new)
            if old != new:
                raise UserError(
                    f"{out} holds a demo with {option} {old}, and this one has {new}: "
                    f"give {option} {old} to continue that one, or another --out"
                ) from error
        held, is_held, _ = str(error).partition(": choose another run.dir")
        if not is_held:
            raise
        raise UserError(f"{held}: give the demo another --out") from error


def demo_recipe(out: Path, seed: int, steps: int | None) -> Recipe:
    """The recipe ``recipes/tiny/video-opd.yaml`` for the shipped models and this folder."""
    changes: dict[str, Any] = {
        "model.path": shipped("tiny-base"),
        "teacher.path": shipped("tiny-teacher"),
        "data.train": out / "selected.jsonl",
        "data.cache_dir": out / "clips",
        "run.dir": out,
        "run.seed": seed,
    }
    if steps is not None:
        changes["optim.max_steps"] = steps
    path = Path(str(resources.files("video_opd.world") / "recipes" / "video-opd.yaml"))
    return load_recipe(path, [text for key, value in changes.items() for text in (f"--{key}", str(value))])


def write_timelines(data: Path, models: Sequence[str], out: Path) -> None:
    """Truth and answers on real frames, for the report: one question of each of the first videos."""
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.predictions import read_predictions
    from video_opd.jsonl import write_jsonl

    answers = {name: read_predictions(out / f"predictions-{name}-{data.stem}.jsonl") for name in models}
    first_of_each: dict[Path, Sample] = {}
    for sample in read_samples(data):
        first_of_each.setdefault(sample.video, sample)
    shown = list(first_of_each.values())[:SHOWN_VIDEOS]
    write_jsonl(out / "timelines.jsonl", [_timeline(sample, answers) for sample in shown])


def _timeline(sample: Sample, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    from video_opd.config import VideoConfig
    from video_opd.data.video import load_clip
    from video_opd.grounding.stills import jpeg_uri

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
            name: rows[sample.id].spans[0] if sample.id in rows else None for name, rows in answers.items()
        },
        "frames": pictures,
        "frame_times_s": times,
    }
