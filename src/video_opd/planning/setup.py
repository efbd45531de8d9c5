"""What a plan reads from a recipe: how the models are held and computed, and how much goes through them.

Memory and the time of a step are computed from these two records and the sizes of the models; the time of
scoring asks the recipe itself how many responses it wants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from video_opd.config import (
    WITH_TEACHER,
    ModelPart,
    OnPolicyRecipe,
    Recipe,
    VideoConfig,
)
from video_opd.config.largest_video import largest_video
from video_opd.models.checkpoint_files import adapter_base, has_full_weights, is_adapter_folder
from video_opd.planning.graph import Mode, Role
from video_opd.types import Sample

ResolvedPlacement = Literal["whole", "sharded", "cpu"]
TEXT_TOKENS = 256  # tokens of a prompt beside video and time stamps: an upper bound for most prompts
PAPER_ROWS = 2500  # sec. 4.1


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the models of a run are held: the settings that decide about memory."""

    processes: int
    dtype: str  # of the student's computation
    weights: str  # of the student's trained weights: float32, or bfloat16 with stochastic rounding
    moments: str  # of the optimiser: float32 or int8
    sharded: bool  # the student's masters and moments, over the processes
    reduce: str  # step: gradients are reduced once a step; micro_batch: after each backward
    by_layer: bool  # layers in shards are gathered, and their gradients reduced, one at a time
    offload: bool  # the masters and the optimiser's state are on the CPU
    recompute: bool | None  # None: activations are recomputed only if they do not fit
    prefix: bool  # the prefix engine
    side_by_side: bool  # whether it puts the responses to a prompt in one row; flash attention does not
    frozen: frozenset[str]  # parts
    adapted: frozenset[str]  # parts
    rank: int
    base_quantization: str | None
    has_teacher: bool  # whether a step asks a teacher that the run holds itself
    teacher_dtype: str
    teacher_placement: ResolvedPlacement | Literal["auto"]
    teacher_quantization: str | None
    teacher_is_adapter: bool  # on the student's base, which serves both; of several teachers, all are
    reference: bool  # whether a step asks the initial student
    distributions: bool  # whether whole distributions are computed at response tokens
    served_head: bool  # whether the run has the lm_head of a teacher that servers hold
    overlaps: bool  # whether a micro-batch is sampled while servers score the one before
    vllm: bool  # whether vLLM samples, in memory of its own

    @classmethod
    def of(cls, recipe: Recipe, processes: int = 1) -> Setup:
        """How ``recipe`` asks for them to be held by so many processes."""
        model, teacher = recipe.model, recipe.teacher
        by_layer = model.gather == "layer" and processes > 1
        has_teacher = recipe.method in WITH_TEACHER and not recipe.asks_servers
        return cls(
            processes=processes,
            dtype=model.dtype,
            weights=model.weights,
            moments=recipe.optim.moments,
            sharded=model.sharding is not None and processes > 1,
            reduce=model.reduce,
            by_layer=by_layer,
            offload=recipe.optim.offload,
            recompute=True if by_layer else model.gradient_checkpointing,
            prefix=model.engine == "prefix",
            side_by_side=model.attn != "flash_attention_2",
            frozen=frozenset(model.freeze),
            adapted=frozenset(recipe.lora.parts),
            rank=recipe.lora.rank,
            base_quantization=recipe.lora.base_quantization,
            has_teacher=has_teacher,
            teacher_dtype=teacher.dtype,
            teacher_placement=teacher.placement,
            teacher_quantization=teacher.quantization,
            teacher_is_adapter=has_teacher
            and all(
                is_adapter_folder(path) and why_not_shared(recipe, path) is None
                for path in recipe.teacher.local_paths
            ),
            reference=recipe.asks_reference,
            distributions=recipe.computes_distributions,
            served_head=recipe.holds_served_head,
            overlaps=recipe.overlaps_servers and processes == 1,
            vllm=recipe.samples_with_vllm,
        )

    @property
    def number(self) -> int:
        """Bytes of a number of the student's computation."""
        return 4 if self.dtype == "float32" else 2

    @property
    def teacher_number(self) -> int:
        return 4 if self.teacher_dtype == "float32" else 2

    @property
    def ddp(self) -> bool:
        return self.processes > 1 and not self.sharded

    def mode(self, part: str) -> Mode:
        """How a part is computed: in bfloat16 throughout where its weights are bfloat16."""
        if self.dtype == "float32":
            return "float32"
        frozen_in_reduced = bool(self.adapted) and part in self.frozen | self.adapted
        if self.sharded or self.weights == "bfloat16" or frozen_in_reduced:
            return "bfloat16"
        return "autocast"

    def role(self, part: str) -> Role | None:
        """What the backward does in a part: the vision tower comes first, then mergers, language,
        ``lm_head``."""
        if part in self.adapted:
            return "adapters"
        if part not in self.frozen:
            return "full"
        order = ("vision", "merger", "language", "lm_head")
        before = order[: order.index(part)]
        return "passed" if any(self.role(other) for other in before) else None


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much goes through the models: upper bounds for a prompt (of frames that are not too elongated, see
    :func:`~video_opd.config.largest_video.largest_video`), and the number of prompts."""

    prompt_tokens: int
    video_tokens: int
    frame_pairs: int
    response_tokens: int
    rollouts: int
    micro_batch: int  # prompts
    teacher_micro_batch: int
    sampled_ahead: (
        int | None
    )  # prompts that are sampled together before the update; None: by the update itself
    prompts_a_step: int  # of a process
    steps: int  # optimiser steps of a run
    updates_a_batch: int
    videos_ahead: int  # that a process has decoded and not used yet
    memory_bytes: float  # of prompts that it keeps for the next time, at most
    rows: int
    rows_assumed: bool  # the data file is not here
    sampled: bool  # responses are sampled, not taken from the annotation

    @classmethod
    def of(cls, recipe: Recipe, samples: Sequence[Sample] | None, processes: int = 1) -> Work:
        """``samples`` are the rows of the data file; None: it is not here, so videos that fill the budget's
        frames are assumed, and as many rows as the paper trains on."""
        optim, count = recipe.optim, PAPER_ROWS if samples is None else len(samples)
        rows = min(count, recipe.data.limit or count)
        steps = optim.updates_per_batch * optim.epochs * -(-rows // optim.batch_size)
        a_process = math.ceil(min(optim.batch_size, max(1, rows)) / processes)
        micro = min(optim.micro_batch_size, a_process)
        largest = largest_video(recipe.video, _longest_s(recipe.video, samples))
        ahead = recipe.sampling_micro_batch_size
        return cls(
            prompt_tokens=largest.prompt_tokens + TEXT_TOKENS,
            video_tokens=largest.tokens,
            frame_pairs=largest.pairs,
            response_tokens=recipe.sampling.max_new_tokens,
            rollouts=recipe.rollouts,
            micro_batch=micro,
            teacher_micro_batch=min(micro, recipe.teacher.micro_batch_size or micro),
            sampled_ahead=ahead and min(ahead, a_process),
            prompts_a_step=a_process,
            steps=optim.max_steps or steps,
            updates_a_batch=optim.updates_per_batch,
            videos_ahead=recipe.videos_ahead(processes),
            memory_bytes=recipe.data.memory_gib * 2**30,
            rows=rows,
            rows_assumed=samples is None,
            sampled=isinstance(recipe, OnPolicyRecipe),
        )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a process in a step."""
        return math.ceil(self.prompts_a_step / self.micro_batch)


def _longest_s(video: VideoConfig, samples: Sequence[Sample] | None) -> float:
    """The duration of the longest video. One whose duration is not known is assumed to fill the budget's
    frames."""
    full_s = video.max_frames / video.fps
    return max((full_s if s.duration_s is None else s.duration_s for s in samples or ()), default=full_s)


def why_not_shared(recipe: Recipe, path: str) -> str | None:
    """Why the adapter ``path`` needs a base of its own as teacher; None if the student's base, which is then
    in memory once, serves both: the student trains adapters only, and both hold the base alike."""
    base, settings = str(adapter_base(path)), recipe.teacher
    trained = set(get_args(ModelPart)) - set(recipe.model.freeze)
    if not recipe.lora.parts or not trained <= set(recipe.lora.parts):
        return "the student's base is trained"
    if recipe.model.sharding is not None:
        return "the student's base is in shards"
    if settings.placement in ("sharded", "cpu"):
        return f"teacher.placement is {settings.placement}"
    if base != recipe.model.path and Path(base).resolve() != Path(recipe.model.path).resolve():
        return f"it belongs to {base}, and the student to {recipe.model.path}"
    if has_full_weights(path):
        return "it has weights that were trained in full"
    if settings.dtype != recipe.model.dtype:
        return f"teacher.dtype is {settings.dtype}, and model.dtype {recipe.model.dtype}"
    if settings.quantization != recipe.lora.base_quantization:
        return "teacher.quantization is not lora.base_quantization"
    return None
