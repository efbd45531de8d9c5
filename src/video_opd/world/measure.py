"""Measures how well a model grounds on the world's test sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from video_opd.files import write_text
from video_opd.progress import track

TEST_VIDEOS = {"short": 40, "long": 24, "subtle": 40}
TEST_SEED = 0
MAX_NEW_TOKENS = 16  # the longest response has twelve tokens and the end token


def make_test_sets(out: Path) -> dict[str, Path]:
    """Makes the three test sets, and returns their data files by name."""
    from video_opd.world.make import make_world

    return make_world(out, videos=TEST_VIDEOS, seed=TEST_SEED, track=track)


def evaluate_model(name: str, model: Path, split: str, data: Path, out: Path) -> dict[str, Any]:
    """Writes the greedy predictions of a model on a test set, and their metrics as in ``video-opd evaluate``.

    Files that exist are continued or kept. Returns the record of the metrics.
    """
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.comparison import evaluate_file
    from video_opd.evaluation.failure_records import write_annotations
    from video_opd.evaluation.predict import GenerationSettings, predict
    from video_opd.models.inference import load_inference_model, read_inference_config

    out.mkdir(parents=True, exist_ok=True)
    samples, predictions = read_samples(data), out / f"predictions-{name}-{split}.jsonl"
    loaded = load_inference_model(read_inference_config(str(model), []), cache_dir=out.parent / "clips")
    predict(
        loaded.policy,
        samples,
        loaded.prompts,
        predictions,
        provenance=loaded.provenance(),
        settings=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
        batch_size=32,
    )
    write_annotations(samples, out / f"annotations-{split}.jsonl")
    record = {**evaluate_file(samples, predictions), "model": name, "testset": split}
    write_text(out / f"{name}-{split}.json", json.dumps(record) + "\n")
    return record
