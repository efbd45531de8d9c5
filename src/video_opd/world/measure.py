"""How well a model grounds on the world's test sets: the figures that stand beside every result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from video_opd.files import write_text
from video_opd.progress import track

TEST_VIDEOS = {"short": 40, "long": 24, "subtle": 40}
TEST_SEED = 0
MAX_NEW_TOKENS = 16  # the longest answer is twelve tokens and the end


def make_test_sets(out: Path) -> dict[str, Path]:
    """The three test sets, as data files by name."""
    from video_opd.world.make import make_world

    return make_world(out, videos=TEST_VIDEOS, seed=TEST_SEED, track=track)


def evaluate_model(name: str, model: Path, split: str, data: Path, out: Path) -> dict[str, Any]:
    """Greedy answers and metrics of one model on one test set: ``video-opd evaluate``."""
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.comparison import evaluate_file
    from video_opd.evaluation.predict import GenerationSettings, predict
    from video_opd.models.inference import load_inference_model, read_inference_config

    out.mkdir(parents=True, exist_ok=True)
    samples, answers = read_samples(data), out / f"predictions-{name}-{split}.jsonl"
    opened = load_inference_model(read_inference_config(str(model), []), cache_dir=out.parent / "clips")
    predict(
        opened.policy,
        samples,
        opened.prompts,
        answers,
        provenance=opened.provenance(),
        settings=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
        batch_size=32,
    )
    record = {**evaluate_file(samples, answers), "model": name, "testset": split}
    write_text(out / f"{name}-{split}.json", json.dumps(record) + "\n")
    return record
