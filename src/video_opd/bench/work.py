"""Makes prompts of a given length, and optimiser steps by the training loop's own code, to be timed."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from video_opd.algorithms.grpo import GRPO
from video_opd.algorithms.method import Method, Signal, Trajectories
from video_opd.algorithms.registry import make_method, make_reward
from video_opd.config import (
    WITH_TEACHER,
    GRPORecipe,
    GRPOSamplingConfig,
    PromptConfig,
    Recipe,
    recipe_from_dict,
)
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import clip_digest
from video_opd.models.policy import HFPolicy
from video_opd.models.recompute import let_library_recompute
from video_opd.models.teachers import LocalTeacher
from video_opd.seeds import derive_seed
from video_opd.training.batches import Row
from video_opd.training.components import Components
from video_opd.training.launch import make_accelerator
from video_opd.training.optimizers import make_optimizer
from video_opd.training.step import Stepper, StepResult, StepSettings
from video_opd.training.stopwatch import Stopwatch
from video_opd.types import Clip, EncodedPrompt, Rollout, Sample

Engine = Literal["plain", "prefix"]
FPS = 2.0
QUERIES = (
    "the red circle moves left",
    "a blue square appears",
    "the green triangle gets bigger",
    "a yellow ring blinks",
    "the purple cross can be seen",
)


def prompts_of(
    processor: Any,
    tokens: int,
    *,
    queries: int = 1,
    videos: int = 1,
    side_px: int = 64,
    prompt: PromptConfig | None = None,
    keep_clips: bool = False,
) -> list[EncodedPrompt]:
    """Makes ``queries`` prompts on each of ``videos`` noise videos, with square frames of ``side_px``.

    Each prompt has ``tokens`` tokens or more, with as few frames as that takes. With ``keep_clips`` it can be
    sent to a server.
    """
    encoder = PromptEncoder(processor, prompt, keep_clips=keep_clips)

    def length(pairs: int) -> int:
        return encoder.encode(_clip(pairs, side_px, 0), QUERIES[0], "probe").length

    one, two = length(1), length(2)
    at_most = max(1, -(-(tokens - one) // (two - one)) + 1)  # time stamps get longer with the time
    pairs = 1 + bisect.bisect_left(range(1, at_most), tokens, key=length)
    prompts: list[EncodedPrompt] = []
    for video in range(videos):
        asked = [QUERIES[i % len(QUERIES)] for i in range(queries)]
        ids = [f"video {video}, query {i}" for i in range(queries)]
        prompts += encoder.encode_many(_clip(pairs, side_px, video), asked, ids)
    return prompts


def _clip(pairs: int, side_px: int, seed: int) -> Clip:
    frames = 2 * pairs
    shape = (frames, side_px, side_px, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    times_s = np.arange(frames) / FPS
    return Clip(
        path=Path(f"noise-{seed}.mp4"),
        frames=pixels,
        times_s=times_s,
        frame_indices=np.arange(frames),
        source_fps=FPS,
        duration_s=frames / FPS,
        source_size_px=(side_px, side_px),
        digest=clip_digest(pixels, times_s),
    )


def seeds_of(prompts: Sequence[EncodedPrompt], n: int) -> list[list[int]]:
    return [[derive_seed(0, "bench", prompt.sample_id, j) for j in range(n)] for prompt in prompts]


def step_recipe(method: str, engine: str, rollouts: int, *, dtype: str, prompts: int, tokens: int) -> Recipe:
    """The recipe of the steps. GRPO's has two rollouts or more, because a recipe allows no fewer."""
    tree: dict[str, Any] = {
        "method": method,
        "model": {"path": "benchmark", "engine": engine, "dtype": dtype},
        "data": {"train": "benchmark"},
        "sampling": {
            "max_new_tokens": tokens,
            "rollouts": max(2, rollouts) if method == "grpo" else rollouts,
        },
        "optim": {"batch_size": prompts, "micro_batch_size": prompts},
        "run": {"dir": "benchmark", "trackers": [], "analytic_kl": False},
    }
    if method in WITH_TEACHER:
        tree["teacher"] = {"path": "benchmark"}
    return recipe_from_dict(tree)


class PlainUpdates(HFPolicy):
    """Samples with a key/value cache, as ``generate`` does, and updates on whole prompts with responses."""

    def __init__(self, model: Any, processor: Any, *, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__(model, processor, "plain", compute_dtype=compute_dtype)
        self.sampler = HFPolicy(model, processor, "prefix", compute_dtype=compute_dtype)

    def sample(self, *prompts: Any, **settings: Any) -> list[list[Rollout]]:
        return self.sampler.sample(*prompts, **settings)


class OneRollout(GRPO):
    """GRPO with groups of one rollout. Such a step teaches nothing, and costs what any step does."""

    def signal(self, batch: Trajectories) -> Signal:
        return Signal(advantage_BT=torch.ones_like(batch.old_BT))


class Steps:
    """Optimiser steps of one method by one engine.

    The learning rate is 0, so that every step does the same work. ``cached`` lets the plain engine sample
    with a key/value cache. ``changes`` are other settings of :func:`step_recipe`, which ``model`` and
    ``teacher`` already follow.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        teacher: Any,
        prompts: Sequence[EncodedPrompt],
        *,
        method: str,
        engine: Engine,
        rollouts: int = 1,
        dtype: str = "float32",
        tokens: int = 16,
        recompute: bool = False,
        cached: bool = False,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        recipe = step_recipe(method, engine, rollouts, dtype=dtype, prompts=len(prompts), tokens=tokens)
        recipe = recipe.changed(**(changes or {}))
        compute_dtype = None if dtype == "float32" else getattr(torch, dtype)
        if recompute:  # transformers changes the layers that it checkpoints, so the model is copied
            model = checkpointed(model, engine)
        policy: HFPolicy
        if cached and engine == "plain":
            policy = PlainUpdates(model, processor, compute_dtype=compute_dtype)
        else:
            again = recompute and engine == "prefix"
            policy = HFPolicy(model, processor, engine, compute_dtype=compute_dtype, recompute=again)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(trained, recipe.optim, recipe.model.weights)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        made: Method
        if isinstance(recipe, GRPORecipe) and rollouts == 1:
            made = OneRollout(GRPOSamplingConfig(max_new_tokens=tokens, rollouts=1), make_reward(recipe))
        else:
            made = make_method(recipe, processor.tokenizer)
        components = Components(
            model=model,
            forward_module=model,
            policy=policy,
            plain=policy,
            teacher=LocalTeacher(HFPolicy(teacher, processor, engine)) if method in WITH_TEACHER else None,
            reference=None,
            method=made,
            optimizer=optimizer,
            recompute=policy.recompute,
            processor=processor,
            samples=(),
            loader=lambda _: (),
            evaluation_loader=lambda _: (),
        )
        # No rollouts are recorded, because the step alone is timed.
        settings = replace(StepSettings.of(recipe, made.needs), rollouts=rollouts, shown_rollouts=0)
        self.stepper = Stepper(settings, make_accelerator(recipe), components, Stopwatch())
        self.rows = [Row(position=i, sample=_sample(p), prompt=p) for i, p in enumerate(prompts)]

    def __call__(self) -> StepResult:
        batch = self.stepper.prepare(0, len(self.rows), self.rows)
        return self.stepper.update(0, batch)


def checkpointed(model: Any, engine: Engine) -> Any:
    """A copy with gradient checkpointing, of the vision tower alone for the prefix engine.

    It shares its weights with ``model``: a second model of eight billion weights would not fit beside it.
    """
    model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    let_library_recompute(model, engine)
    return model


def _sample(prompt: EncodedPrompt) -> Sample:
    return Sample(
        id=prompt.sample_id,
        video=Path("noise.mp4"),
        query="",
        duration_s=prompt.duration_s,
        spans=((0.0, prompt.duration_s / 2),),
    )
