"""video-opd's own training loop on the tiny model: ``ours.py SETTINGS.json RECORD.json``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import Measure, read_settings, write_record

import video_opd
from video_opd.config import Recipe, recipe_from_dict
from video_opd.jsonl import read_jsonl
from video_opd.models.teachers import LocalTeacher
from video_opd.training.components import Components, build_components
from video_opd.training.loop import train
from video_opd.types import EncodedPrompt, Sample


def recipe_of(asked: dict[str, Any]) -> Recipe:
    frame = asked["frame_tokens"]
    tree: dict[str, Any] = {
        "method": asked["method"],
        "model": {"path": asked["model"], "engine": "prefix", "gradient_checkpointing": False},
        "data": {"train": asked["rows"], "shuffle": False, "workers": 1},
        "video": {"fps": asked["fps"], "min_frame_tokens": frame, "max_frame_tokens": frame},
        "sampling": {"max_new_tokens": asked["tokens"], "rollouts": asked["rollouts"]},
        "optim": {
            "lr": asked["lr"],
            "batch_size": asked["prompts"],
            "micro_batch_size": asked["answers_at_once"] // asked["rollouts"],
            "max_steps": asked["steps"],
        },
        "run": {
            "dir": asked["folder"],
            "seed": asked["seed"],
            "save_every": asked["steps"] + 1,
            "trackers": [],
        },
    }
    if asked["method"] == "video-opd":
        tree["teacher"] = {"path": asked["teacher"]}
    else:
        tree["reward"] = {"function": f"{Path(__file__).with_name('reward.py')}:of_sample"}
    return recipe_from_dict(tree)


def measured(measure: Measure, components: Components) -> Components:
    """The same components; what the loader gives is noted."""

    def loader(samples: Sequence[Sample]) -> Iterator[tuple[Sample, EncodedPrompt]]:
        given: Iterable[tuple[Sample, EncodedPrompt]] = components.loader(samples)
        for sample, prompt in given:
            measure.prompt(prompt.length, prompt.video_tokens)
            yield sample, prompt

    teacher = components.teacher
    assert teacher is None or isinstance(teacher, LocalTeacher)
    measure.loaded(components.model, *([teacher.policy.model] if teacher else []))
    return replace(components, loader=loader)


def main(settings_path: str, record_path: str) -> None:
    asked = read_settings(settings_path)
    torch.set_num_threads(asked["threads"])
    folder = Path(asked["folder"])
    shutil.rmtree(folder, ignore_errors=True)  # a finished run would not be run again
    measure = Measure(asked["warmup"])
    train(recipe_of(asked), lambda *given: measured(measure, build_components(*given)))
    measure.answer_lengths = [row["response/length_mean"] for _, row in read_jsonl(folder / "metrics.jsonl")]
    record = measure.record(
        framework=f"video-opd {video_opd.__version__}", transformers=transformers.__version__
    )
    write_record(record_path, record)


if __name__ == "__main__":
    main(*sys.argv[1:])
