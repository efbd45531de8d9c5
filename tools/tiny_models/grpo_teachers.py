"""GRPO for the tiny teachers, as the paper made its own (section D.1): choose by difficulty, then train."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from video_opd.config import SelectionConfig, load_recipe
from video_opd.curriculum.scores import ScoreSettings, score
from video_opd.curriculum.tvdf import select_file
from video_opd.data.annotations import read_samples
from video_opd.models.inference import load_inference_model, read_inference_config
from video_opd.progress import track
from video_opd.training.loop import train
from video_opd.world.make import make_world

POOL_VIDEOS, POOL_SEED = 200, 500  # of the training split; other videos than anyone else's
SELECTED = 640
STUDENT_K = 4


def post_train(pretrained: Path, recipe: str, work: Path) -> Path:
    """The model ``pretrained`` after the recipe of this name in ``world/recipes``: a new folder.

    Rows are drawn by eqs 30–31 from what the model itself scores on a pool. Everything is under ``work``;
    a killed run continues.
    """
    pool = make_world(work / "pool", videos={"train": POOL_VIDEOS}, seed=POOL_SEED, track=track)["train"]
    opened = load_inference_model(read_inference_config(str(pretrained), []), cache_dir=work / "clips")
    facts = opened.provenance()
    score(
        opened.policy,
        None,
        read_samples(pool),
        opened.prompts,
        work / "scores.jsonl",
        provenance={"student": facts["model"], "teacher": None, "input": facts["input"]},
        settings=ScoreSettings(k=STUDENT_K, max_new_tokens=16),
        batch_size=32,
    )
    select_file(
        pool,
        work / "scores.jsonl",
        SelectionConfig(strategy="gaussian", k=SELECTED),
        out=work / "selected.jsonl",
    )
    changes = {
        "model.path": pretrained,
        "data.train": work / "selected.jsonl",
        "data.cache_dir": work / "clips",
        "run.dir": work / "run",
    }
    words = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    path = Path(str(resources.files("video_opd.world") / "recipes" / recipe))
    return train(load_recipe(path, words)).model
