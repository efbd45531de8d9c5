"""Runs on random tiny Qwen3-VL models and noise videos: everything real but the data's origin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from model_cases import encode, model, processor

from video_opd.algorithms.video_opd import VideoOPD
from video_opd.config import ModelConfig, Recipe, recipe_from_dict
from video_opd.models.loading import load_model
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.training.build import Parts, freeze, make_optimizer
from video_opd.training.run_folder import RunFolder
from video_opd.types import EncodedPrompt, Sample

# Times of a run and where it lives differ between two runs that are otherwise the same.
UNREPEATABLE = ("time/",)


def make_recipe(run_dir: Path, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, dict[str, Any]] = {
        "model": {"path": "base"},
        "teacher": {"path": "teacher"},
        "data": {"train": "train.jsonl", "workers": 0},
        "sampling": {"max_new_tokens": 4},
        "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch_size": 2},
        "run": {"dir": str(run_dir), "trackers": [], "save_every": 2, "check": False},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return recipe_from_dict(tree)


@lru_cache(maxsize=32)
def sample(i: int) -> Sample:
    return Sample(
        id=f"s{i}",
        video=Path(f"v{i // 2}.mp4"),
        query=f"query {i}",
        duration_s=2.0 + i % 3,
        spans=((0.25, 1.5),) if i % 4 else (),
    )


@lru_cache(maxsize=32)
def prompt(i: int) -> EncodedPrompt:
    return encode(f"when does the red circle appear {i}?", frames=4 + 2 * (i % 2), video_seed=i)


class Build:
    """Stands in for ``build_parts``: the same models, without folders and files to load them from."""

    def __init__(
        self, rows: int = 8, *, broken: Sequence[str] = (), teacher_seed: int = 1, engine: Any = "prefix"
    ) -> None:
        self.rows, self.broken, self.teacher_seed, self.engine = rows, broken, teacher_seed, engine

    def __call__(self, recipe: Recipe, accelerator: Any, folder: RunFolder, weights: str | Path) -> Parts:
        student = model(0, sharpness=8.0)
        if Path(weights).is_dir():
            student, _ = load_model(weights, dtype="float32")
        freeze(student, recipe.model)
        optimizer = make_optimizer([p for p in student.parameters() if p.requires_grad], recipe.optim)
        forward_module, optimizer = accelerator.prepare(student, optimizer)
        teacher = HFPolicy(model(self.teacher_seed, sharpness=8.0), processor(), self.engine)
        return Parts(
            model=student,
            forward_module=forward_module,
            policy=HFPolicy(student, processor(), self.engine, forward_module=forward_module),
            reference=HFPolicy(student, processor(), "plain"),
            teacher=LocalTeacher(teacher),
            method=VideoOPD(recipe.sampling),
            optimizer=optimizer,
            processor=processor(),
            samples=[sample(i) for i in range(self.rows)],
            loader=self.load,
            evaluation_loader=self.load,
        )

    def load(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, EncodedPrompt]]:
        return ((s, prompt(int(s.id[1:]))) for s in samples if s.id not in self.broken)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def repeatable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)} for row in rows]


__all__ = ["Build", "ModelConfig", "make_recipe", "prompt", "repeatable", "sample", "weights_of"]
