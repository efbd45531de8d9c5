"""Measures how well a model grounds on the world's test sets, and answers general questions about them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from video_opd.files import write_text
from video_opd.progress import track
from video_opd.types import Prediction, Sample

TEST_VIDEOS = {"short": 40, "long": 24, "subtle": 40}
TEST_SEED = 0
MAX_NEW_TOKENS = 16  # the longest response has twelve tokens and the end token


def make_test_sets(out: Path) -> dict[str, Path]:
    """Makes the three test sets, and returns their data files by name."""
    from video_opd.world.make import make_world

    return make_world(out, videos=TEST_VIDEOS, seed=TEST_SEED, track=track)


def make_question_set(out: Path) -> Path:
    """Writes the general questions about the videos of the three test sets; returns their data file."""
    from video_opd.jsonl import write_jsonl
    from video_opd.world.questions import question_rows
    from video_opd.world.scene import compose

    make_test_sets(out)
    scenes = [compose(split, TEST_SEED, i) for split, count in TEST_VIDEOS.items() for i in range(count)]
    path = out / "questions.jsonl"
    write_jsonl(path, [row for scene in scenes for row in question_rows(scene)])
    return path


def evaluate_questions(name: str, model: Path, data: Path, out: Path) -> dict[str, float]:
    """Asks a model general questions; returns its accuracy in percent, by ability and ``"all"``."""
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.predictions import read_predictions

    samples, path = read_samples(data), out / f"answers-{name}.jsonl"
    _predict(model, samples, path, ["--prompt.style", "question"])
    return accuracies(samples, read_predictions(path))


def accuracies(samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> dict[str, float]:
    """The percentage of right answers to general questions: of each ability, and of all questions."""
    from video_opd.world.questions import ABILITIES, right_answers

    right = right_answers(samples, predictions)
    by_ability = {
        ability: [one for one, sample in zip(right, samples, strict=True) if sample.source == ability]
        for ability in ABILITIES
    }
    return {name: 100 * fmean(found) for name, found in {**by_ability, "all": right}.items() if found}


def evaluate_model(name: str, model: Path, split: str, data: Path, out: Path) -> dict[str, Any]:
    """Writes the greedy predictions of a model on a test set, and their metrics as in ``video-opd evaluate``.

    Files that exist are continued or kept. Returns the record of the metrics.
    """
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.comparison import evaluate_file
    from video_opd.evaluation.failure_records import write_annotations

    samples, predictions = read_samples(data), out / f"predictions-{name}-{split}.jsonl"
    _predict(model, samples, predictions, [])
    write_annotations(samples, out / f"annotations-{split}.jsonl")
    record = {**evaluate_file(samples, predictions), "model": name, "testset": split}
    write_text(out / f"{name}-{split}.json", json.dumps(record) + "\n")
    return record


def _predict(model: Path, samples: Sequence[Sample], path: Path, overrides: list[str]) -> None:
    """Writes the greedy responses of a model. Clips are kept beside the folder of ``path``."""
    from video_opd.evaluation.predict import GenerationSettings, predict
    from video_opd.models.inference import load_inference_model, read_inference_config

    path.parent.mkdir(parents=True, exist_ok=True)
    config = read_inference_config(str(model), overrides)
    loaded = load_inference_model(config, cache_dir=path.parent.parent / "clips")
    predict(
        loaded.policy,
        samples,
        loaded.prompts,
        path,
        provenance=loaded.provenance(),
        settings=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
        batch_size=32,
    )
