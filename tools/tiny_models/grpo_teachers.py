"""Post-trains the tiny teachers by GRPO as in section D.1: rows are chosen by difficulty, then trained on."""

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

POOL_VIDEOS, POOL_SEED = 200, 500  # a seed of its own: no other pool has these videos of the training split
SELECTED = 640
STUDENT_K = 4


def post_train(pretrained: Path, recipe: str, work: Path) -> Path:
    """Trains the model ``pretrained`` by a recipe of ``world/recipes``, and returns the new model folder.

    Rows are drawn by eqs 30–31 from the model's own scores on a pool. All files are written under ``work``,
    and a killed run continues.
    """
    pool = make_world(work / "pool", videos={"train": POOL_VIDEOS}, seed=POOL_SEED, track=track)["train"]
    loaded = load_inference_model(read_inference_config(str(pretrained), []), cache_dir=work / "clips")
    facts = loaded.provenance()
    score(
        loaded.policy,
        None,
        read_samples(pool),
        loaded.prompts,
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
        "model.path": str(pretrained),
        "data.train": str(work / "selected.jsonl"),
        "data.cache_dir": str(work / "clips"),
        "run.dir": str(work / "run"),
    }
    path = Path(str(resources.files("video_opd.world") / "recipes" / recipe))
    return train(load_recipe(path).changed(**changes)).model
