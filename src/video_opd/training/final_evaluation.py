"""What a run has learned: greedy answers of its final model on the data files that ``evaluate`` names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from video_opd.config import Recipe
from video_opd.data.annotations import read_samples
from video_opd.errors import UserError
from video_opd.evaluation.metrics import best_constant, evaluate, query_swap
from video_opd.evaluation.predict import AnswerSettings, predict
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.resume import model_fingerprint
from video_opd.evaluation.tables import evaluation_record
from video_opd.files import write_text
from video_opd.progress import log
from video_opd.training.build import Parts
from video_opd.training.run_folder import RunFolder


def check_evaluation_files(recipe: Recipe) -> None:
    """Reads every data file before the first step: a wrong path must not be found after days of training."""
    names = [Path(path).stem for path in recipe.evaluate.data]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate.data names two files of one name ({sorted(names)}): rename one")
    for path in recipe.evaluate.data:
        if not any(sample.spans for sample in read_samples(path, recipe.evaluate.video_root)):
            raise UserError(f"{path}: no row has spans to measure against; take it out of evaluate.data")


def evaluate_model(recipe: Recipe, parts: Parts, folder: RunFolder) -> None:
    """Writes ``eval/student-<data>.json`` and the answers beside it; goes on where a kill left off."""
    settings = recipe.evaluate
    for path in settings.data:
        samples = read_samples(path, settings.video_root)[: settings.limit]
        out = folder.path / "eval" / f"student-{Path(path).stem}.jsonl"
        predict(
            parts.policy,
            samples,
            parts.evaluation_loader,
            out,
            made_by={
                "model": model_fingerprint(folder.model),
                "dtype": recipe.model.dtype,
                "input": {"video": asdict(recipe.video), "prompt": asdict(recipe.prompt)},
            },
            settings=AnswerSettings(
                max_new_tokens=settings.max_new_tokens, thinking=recipe.prompt.thinking, seed=recipe.run.seed
            ),
            batch_size=settings.batch_size,
        )
        answers = read_predictions(out)
        protocol = recipe.prompt.style  # a protocol is a prompt and its rules
        result = evaluate(samples, answers, protocol)
        record = evaluation_record(result, best_constant(samples), query_swap(samples, answers, protocol))
        write_text(out.with_suffix(".json"), json.dumps({**record, "data": path}, indent=2) + "\n")
        log(f"{path}: mIoU {result.miou:.1f} (wrote {out.with_suffix('.json')})")
