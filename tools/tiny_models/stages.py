"""Trains a base and teachers from random weights, in the stages that a recipe file lists.

Stages run in order, each from the weights of the one before unless it names another. A stage may write a
model folder at its end. A killed run continues at the stage in which it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import yaml
from pydantic import Field

from tiny_models.auxiliary import Pretrainer
from tiny_models.depth import check_depths_alone_differ, size_name, size_of_config
from tiny_models.examples import (
    Example,
    augment,
    batches,
    label_cells,
    render_sets,
    window,
)
from tiny_models.export import export
from tiny_models.grpo_teachers import post_train
from tiny_models.muon import Muon
from tiny_models.packing import Packer
from tiny_models.watch import check
from video_opd.config import Settings, read_settings
from video_opd.config.settings import Number, several
from video_opd.config.tree import parse_yaml
from video_opd.errors import UserError, need
from video_opd.files import replacing_file, write_text
from video_opd.locks import locked_folder
from video_opd.models.loading import load_model, read_config
from video_opd.progress import log, task
from video_opd.world.measure import (
    evaluate_model,
    evaluate_questions,
    make_question_set,
    make_test_sets,
)
from video_opd.world.shipped import shipped
from video_opd.world.tiny import SIZES, build_model, build_processor

MADE = "made.json"  # the file of a model folder with the recipe that made it, and its scores
AUXILIARY_WEIGHTS = {"events": 0.3, "clock": 0.5, "objects": 0.3, "pointer": 1.0, "query": 0.3}
VISION_PAIRS = 6  # frame pairs of a clip in a vision stage
TRAIN_SEED, CHECK_SEED = 1000, 7
CHECK_SPLITS = ("short", "long", "subtle")


class Tasks(Settings):
    """The shares of the steps of a stage that train an ability. They need not sum to 1."""

    grounding: Number = Field(default=1.0, ge=0)
    questions: Number = Field(default=0.0, ge=0)  # of world/questions.py
    thinking: Number = Field(default=0.0, ge=0)  # grounding after a thought

    def draw(self, rng: np.random.Generator) -> str:
        shares = {name: share for name, share in self.to_dict().items() if share}
        if len(shares) == 1:
            return next(iter(shares))
        return str(rng.choice(list(shares), p=np.array(list(shares.values())) / sum(shares.values())))


class Stage(Settings):
    """One stage of training.

    ``pairs`` is the length of the windows in frame pairs; None shows whole videos. ``kind: vision`` trains
    the vision tower alone, on the positions of objects. ``blur`` makes the annotated boundaries loose, as in
    weakly aligned data: it is the mean distance by which they are too far out, in event lengths. ``resize``
    makes the model deeper before the first step, without changing what it computes, or shallower.
    ``long_share`` is about the share of videos that are long and crowded; None leaves it as in the pool, a
    quarter. Questions and thinking have no auxiliary losses, and need whole videos.
    """

    name: str
    steps: int
    batch_size: int = 10
    kind: str = "answers"
    pairs: int | None = None
    lr: Number = 1.5e-3
    muon_lr: Number = 0.02
    vision_lr: Number = 0.3  # factor on the vision tower's learning rates while responses are trained
    warmup: int = 30
    decay: Number = 0.0  # share of the steps, at the end, in which the rate falls to a hundredth
    blur: Number = 0.0
    auxiliary: Number = 1.0  # weight of the auxiliary losses
    start_from: str | None = None  # the earlier stage whose weights it takes; None: the one before it
    start_from_model: str | None = None  # in its place: a shipped model, whose auxiliary heads are new
    resize: str | None = None  # a size of world/tiny.py
    tasks: Tasks = Tasks()
    long_share: Number | None = Field(default=None, ge=0, le=1)
    save_as: str | None = None  # the name of the model folder that is written at the end
    grpo: str | None = None  # a recipe of world/recipes, which trains the model before the folder is written


class Pretraining(Settings):
    """A pretraining recipe: the pool of videos, the model's size and the stages."""

    size: str = "tiny"
    seed: int = 0
    videos: int = 7500
    check_videos: int = 40
    questions: int = 4  # questions about each video
    weight_decay: Number = 0.1
    stages: Annotated[tuple[Stage, ...], several] = ()


def read_pretraining(path: str | Path) -> Pretraining:
    """Reads a pretraining recipe; raises :class:`UserError` for a file that holds none."""
    tree = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a pretraining recipe; see tools/tiny_models/pretraining.yaml")
    try:
        recipe = read_settings(Pretraining, tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    sizes(recipe)
    return recipe


def sizes(recipe: Pretraining) -> dict[str, str]:
    """The model's size at the end of each stage.

    Raises :class:`UserError` if a stage cannot have its size.
    """
    known = ", ".join(SIZES)
    need(recipe.size in SIZES, f"size is {recipe.size!r}; choose one of: {known}")
    found: dict[str, str] = {}
    for index, stage in enumerate(recipe.stages):
        source = source_of(recipe, index)
        need(
            source is None or source in found,
            f"{stage.name}: start_from is {source!r}; choose an earlier stage: {', '.join(found) or 'none'}",
        )
        shares = stage.tasks.to_dict()
        need(any(shares.values()), f"{stage.name}: no task has a share")
        need(
            stage.pairs is None or not (stage.tasks.questions or stage.tasks.thinking),
            f"{stage.name}: pairs is {stage.pairs}; questions and thinking need whole videos, without pairs",
        )
        size = found[source] if source else recipe.size
        if stage.start_from_model:
            try:
                size = size_of_shipped(stage.start_from_model)
            except UserError as error:
                raise UserError(f"{stage.name}: start_from_model: {error}") from error
        if stage.resize is not None:
            need(stage.resize in SIZES, f"{stage.name}: resize is {stage.resize!r}; choose one of: {known}")
            try:
                check_depths_alone_differ(SIZES[size], SIZES[stage.resize])
            except UserError as error:
                raise UserError(f"{stage.name}: resize from {size} to {stage.resize}: {error}") from error
            size = stage.resize
        found[stage.name] = size
    return found


def size_of_shipped(name: str) -> str:
    """The size of a shipped model. Raises :class:`UserError` if there is no such model."""
    config = read_config(shipped(name))
    return size_name(size_of_config(config))


def source_of(recipe: Pretraining, index: int) -> str | None:
    """The stage whose weights stage number ``index`` starts from; None means random weights."""
    before = recipe.stages[index - 1].name if index else None
    return recipe.stages[index].start_from or before


def run_recipe(path: str | Path | None, out: str | Path, workers: int | None = None) -> list[Path]:
    """Runs the stages of a recipe (the shipped models' if None), and returns the model folders."""
    path = path or Path(__file__).with_name("pretraining.yaml")
    recipe, out = read_pretraining(path), Path(out)
    with locked_folder(out):
        Trainer(recipe, out, workers).run()
    return [out / stage.save_as for stage in recipe.stages if stage.save_as]


class Trainer:
    """Runs the stages. All randomness follows from the recipe's seed and the number of the stage."""

    def __init__(self, recipe: Pretraining, out: Path, workers: int | None = None) -> None:
        self.recipe, self.out = recipe, out
        self.processor = build_processor()
        self.packer = Packer(self.processor)
        torch.manual_seed(recipe.seed)  # for the auxiliary heads
        self.size, self.sizes = recipe.size, sizes(recipe)
        self.module = Pretrainer(build_model(recipe.size, recipe.seed))
        out.mkdir(parents=True, exist_ok=True)
        log(f"rendering {recipe.videos} videos")
        check = (CHECK_SEED, recipe.check_videos)
        self.checks = render_sets(
            {"train": (TRAIN_SEED, recipe.videos), **dict.fromkeys(CHECK_SPLITS, check)}, workers
        )
        self.pool = [example for example in self.checks.pop("train") if example.scene.questions]

    def run(self) -> None:
        for index, stage in enumerate(self.recipe.stages):
            weights = self.out / f"{stage.name}.pt"
            if not weights.exists():
                if stage.start_from_model:
                    self.load_shipped(stage.start_from_model)
                elif source := source_of(self.recipe, index):
                    self.load(source)
                if stage.resize:
                    self.module, self.size = self.module.resized(stage.resize), stage.resize
                self.stage(stage, index)
                with replacing_file(weights) as temporary:
                    torch.save(self.module.state_dict(), temporary)
                if stage.kind != "vision":
                    self.check(stage.name)
            if stage.save_as and not (self.out / stage.save_as / MADE).exists():
                self.load(stage.name)
                self.export(stage, stage.save_as)

    def load(self, stage: str) -> None:
        """Loads the weights of a finished stage into a module of its size."""
        size = self.sizes[stage]
        if size != self.size:
            self.module, self.size = Pretrainer(build_model(size)), size
        self.module.load_state_dict(torch.load(self.out / f"{stage}.pt", weights_only=True))

    def load_shipped(self, name: str) -> None:
        """Loads a shipped model, into a module with new auxiliary heads."""
        model, _ = load_model(shipped(name), dtype="float32")
        self.size = size_of_shipped(name)
        own = build_model(self.size)
        own.load_state_dict(model.state_dict())
        self.module = Pretrainer(own, fresh=False)

    def export(self, stage: Stage, name: str) -> None:
        """Writes the stage's model folder, after GRPO if the stage has it, and measures the model."""
        folder = self.out / name
        facts: dict[str, Any] = {"stage": stage.name, "recipe": self.recipe.to_dict()}
        if stage.grpo is None:
            export(self.module.model, self.processor, folder)
        else:
            pretrained = self.out / "pretrained" / name
            export(self.module.model, self.processor, pretrained)
            facts["scores_before_grpo"] = self.measure(f"{name}-before-grpo", pretrained)
            trained = post_train(pretrained, stage.grpo, self.out / "grpo" / name)
            export(load_model(trained, dtype="float32")[0], self.processor, folder)
            facts["grpo"] = yaml.safe_load((trained.parent / "recipe.yaml").read_text(encoding="utf-8"))
        facts["scores"] = self.measure(name, folder)
        if stage.tasks.questions:
            questions = make_question_set(self.out / "world")
            facts["accuracy"] = evaluate_questions(name, folder, questions, self.out / "eval")
        write_text(folder / MADE, json.dumps(facts, indent=1) + "\n")

    def measure(self, name: str, folder: Path) -> dict[str, Any]:
        """Evaluates a model folder on the world's test sets; returns a record for each."""
        tests = make_test_sets(self.out / "world")
        return {
            split: evaluate_model(name, folder, split, data, self.out / "eval")
            for split, data in tests.items()
        }

    def stage(self, stage: Stage, index: int) -> None:
        rng = np.random.default_rng([self.recipe.seed, index])
        optimizers = self.optimizers(stage)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        stream = batches(self.pool, stage.batch_size, rng, stage.long_share)
        seen: dict[str, list[float]] = {}
        began = time.perf_counter()
        with task(stage.name, stage.steps) as bar:
            for step in range(1, stage.steps + 1):
                factor = schedule(step, stage)
                for optimizer, own in zip(optimizers, rates, strict=True):
                    for group, rate in zip(optimizer.param_groups, own, strict=True):
                        group["lr"] = rate * factor
                losses = self.losses(stage, next(stream), rng)
                weight = {name: stage.auxiliary * w for name, w in AUXILIARY_WEIGHTS.items()}
                total = torch.stack([weight.get(name, 1.0) * v for name, v in losses.items()]).sum()
                for optimizer in optimizers:
                    optimizer.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                for key, value in losses.items():
                    seen.setdefault(key, []).append(float(value.detach()))
                if step % 50 == 0:
                    note = " ".join(f"{k} {fmean(values):.3f}" for k, values in seen.items())
                    log(f"{stage.name} {step} {(time.perf_counter() - began) / step:.2f}s {note}")
                    seen = {}
                bar.advance()

    def losses(
        self, stage: Stage, examples: Sequence[Example], rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        if stage.kind == "vision":
            frames, labels = [], []
            for example in examples:
                example = augment(window(example, VISION_PAIRS, rng), rng)
                h, w = example.frames.shape[1:3]
                frames.append(example.frames)
                times = example.times_s.reshape(-1, 2)
                labels.append(label_cells(example.scene, times, h // 32, w // 32, example.shift))
            return {"objects": self.module.vision_loss(frames, np.concatenate(labels))}
        task = stage.tasks.draw(rng)
        pairs = stage.pairs
        if pairs is not None:  # windows of about this length, the same for a whole batch
            shortest = min(len(example.times_s) // 2 for example in examples)
            pairs = min(shortest, int(rng.integers(pairs - 1, pairs + 2)))
            examples = [window(example, pairs, rng) for example in examples]
        examples = [augment(example, rng) for example in examples]
        if task == "questions":
            return {task: self.module.answer_loss(self.packer.questions(examples, rng))}
        per_video = self.recipe.questions
        if task == "thinking":
            packed = self.packer.thinking(examples, rng, per_video, stage.blur)
            return {task: self.module.answer_loss(packed)}
        batch = self.packer.batch(examples, rng, per_video, stage.blur)
        return self.module.losses(batch) if stage.auxiliary else {"answer": self.module.answer_loss(batch)}

    def optimizers(self, stage: Stage) -> list[torch.optim.Optimizer]:
        """Muon trains the matrices inside blocks; AdamW trains embeddings, heads, biases and norms."""
        vision_only = stage.kind == "vision"
        factor = 1.0 if vision_only else stage.vision_lr
        muon, adam = [], []
        for name, p in self.module.named_parameters():
            seeing = ".visual." in name or name.startswith("objects")
            if vision_only and not seeing:
                continue
            inside = p.ndim == 2 and any(part in name for part in (".layers.", ".blocks.", "merger"))
            scale = factor if seeing else 1.0
            if inside:
                muon.append({"params": [p], "lr": stage.muon_lr * scale})
            else:
                adam.append({"params": [p], "lr": stage.lr * scale})
        decay = self.recipe.weight_decay
        return [
            Muon(_merge(muon), lr=stage.muon_lr, weight_decay=decay),
            torch.optim.AdamW(_merge(adam), betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def check(self, name: str) -> dict[str, dict[str, float]]:
        scores = {split: check(self.module, self.packer, examples) for split, examples in self.checks.items()}
        for split, values in scores.items():
            log(f"{name} {split} " + " ".join(f"{k} {v:.1f}" for k, v in values.items()))
        (self.out / f"{name}.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        return scores


def _merge(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the groups of one learning rate."""
    merged: dict[float, dict[str, Any]] = {}
    for group in groups:
        merged.setdefault(group["lr"], {"params": [], "lr": group["lr"]})["params"].extend(group["params"])
    return list(merged.values())


def schedule(step: int, stage: Stage) -> float:
    rise = min(1.0, step / stage.warmup) if stage.warmup else 1.0
    left = (stage.steps - step) / (stage.decay * stage.steps) if stage.decay else 1.0
    return rise * min(1.0, max(0.01, left))
