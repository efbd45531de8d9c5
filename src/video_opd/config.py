"""One tree of settings: what a recipe file may say, with the paper's values as defaults.

A recipe is YAML with the sections below. Every class default is the paper's value where the paper gives one
(the section stands beside it), otherwise a common choice (marked "ours"). Unknown keys, wrong types and
settings that contradict each other are a :class:`UserError` here, before anything is loaded. No torch.

Example::

    recipe = load_recipe("recipes/tiny/video-opd.yaml", ["--optim.lr", "3e-4", "--run.seed", "1"])
    recipe.optim.lr  # 0.0003
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from video_opd.errors import UserError
from video_opd.strict import TreeReader, apply_overrides, need, parse_yaml, to_dict


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student. Its weights and the optimiser's state are float32 whatever ``dtype`` says, because an
    update at lr 1e-6 is below the rounding step of bfloat16."""

    path: str = "Qwen/Qwen3-VL-8B-Instruct"  # sec. 4.1; a folder, or a name that transformers resolves
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation (bfloat16: autocast); ours
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # ours
    engine: Literal["prefix", "plain"] = "prefix"  # ours: encode a prompt once for all that is done with it
    gradient_checkpointing: bool = False  # ours
    freeze: tuple[Literal["vision", "merger", "language", "lm_head"], ...] = ()  # ours: nothing is frozen


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher. The paper's, Qwen3-VL-32B after GRPO (sec. 4.1), is not public: name yours."""

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"  # ours
    micro_batch_size: int | None = None  # prompts a forward; none: as optim.micro_batch_size

    def __post_init__(self) -> None:
        need(bool(self.path), "teacher.path is empty: name the folder of the teacher's checkpoint")
        need((self.micro_batch_size or 1) >= 1, "teacher.micro_batch_size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on. Relative paths start at the current directory."""

    train: str  # a data file (JSON Lines); the paper: 2,500 rows chosen by TVDF (sec. 4.1)
    video_root: str | None = None  # none: videos are relative to the data file
    limit: int | None = None  # only the first rows
    shuffle: bool = True  # a permutation an epoch, a function of (run.seed, epoch)
    workers: int = 2  # decoding in the background; 0: in the training process
    prefetch: int = 8  # prompts made ahead
    max_failed_share: float = 0.05  # a run stops when more videos than this cannot be decoded
    cache_dir: str | None = None  # keeps decoded clips on disk

    def __post_init__(self) -> None:
        need(bool(self.train), "data.train is empty: name a data file (JSON Lines)")
        need(self.limit is None or self.limit >= 1, "data.limit must be at least 1 (none: all rows)")
        need(self.workers >= 0, "data.workers must not be negative")
        need(self.prefetch >= 1, "data.prefetch must be at least 1")
        need(0.0 <= self.max_failed_share <= 1.0, "data.max_failed_share is a share: between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """How much of a video the model sees (sec. 4.1). A frame token count is that of one pair of frames."""

    fps: float = 2.0  # sec. 4.1
    min_frames: int = 4  # ours
    max_frames: int = 768  # sec. 4.1
    min_frame_tokens: int = 128  # ours; gives way where max_video_tokens could not be kept
    max_frame_tokens: int = 768  # sec. 4.1
    max_video_tokens: int = 8192  # sec. 4.1, a hard bound
    backend: Literal["pyav", "torchcodec"] = "pyav"  # ours

    def __post_init__(self) -> None:
        need(self.fps > 0, "video.fps must be above 0")
        need(2 <= self.min_frames <= self.max_frames, "video needs 2 <= min_frames <= max_frames")
        need(
            1 <= self.min_frame_tokens <= self.max_frame_tokens,
            "video needs 1 <= min_frame_tokens <= max_frame_tokens",
        )
        pairs = (self.min_frames + 1) // 2
        need(
            self.max_video_tokens >= pairs,
            f"video.max_video_tokens {self.max_video_tokens} cannot hold video.min_frames {self.min_frames} "
            f"({pairs} pairs of at least one token): raise the first or lower the second",
        )


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    style: Literal["paper", "timelens"] = "paper"  # figure 7
    thinking: bool = False  # table 8: no-thinking is better


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the student answers while it is trained (eq 4)."""

    temperature: float = 1.0  # DESIGN: the log-probs are of the distribution that was sampled
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_new_tokens: int = 64  # ours: an answer is about a dozen tokens
    rollouts: int = 1  # sec. 3.1: a single rollout for each prompt
    micro_batch_size: int | None = None  # prompts sampled together; none: as optim.micro_batch_size

    def __post_init__(self) -> None:
        need(self.temperature > 0, "sampling.temperature must be above 0: training needs samples")
        need(0 < self.top_p <= 1, "sampling.top_p must be in (0, 1]")
        need(self.top_k >= 0, "sampling.top_k must not be negative (0 turns it off)")
        need(self.max_new_tokens >= 1, "sampling.max_new_tokens must be at least 1")
        need(self.rollouts >= 1, "sampling.rollouts must be at least 1")
        need((self.micro_batch_size or 1) >= 1, "sampling.micro_batch_size must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on float32 weights."""

    lr: float = 1e-6  # sec. 4.1
    batch_size: int = 32  # sec. 4.1: prompts an optimiser step, over all processes
    micro_batch_size: int = 1  # prompts a forward and backward; does not change the result
    epochs: int = 1  # sec. 4.1
    max_steps: int | None = None  # none: as many as the epochs have
    weight_decay: float = 0.0  # ours
    betas: tuple[float, float] = (0.9, 0.999)  # ours
    eps: float = 1e-8  # ours
    max_grad_norm: float = 1.0  # ours
    warmup_steps: int = 0  # ours
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # ours

    def __post_init__(self) -> None:
        need(self.lr > 0, "optim.lr must be above 0")
        need(self.batch_size >= 1 and self.micro_batch_size >= 1, "optim batch sizes must be at least 1")
        need(
            self.batch_size % self.micro_batch_size == 0,
            f"optim.batch_size {self.batch_size} is not a multiple of optim.micro_batch_size "
            f"{self.micro_batch_size}: choose a divisor of it",
        )
        need(self.epochs >= 1, "optim.epochs must be at least 1; for less, set optim.max_steps")
        need(self.max_steps is None or self.max_steps >= 1, "optim.max_steps must be at least 1")
        need(self.weight_decay >= 0 and self.eps > 0, "optim needs weight_decay >= 0 and eps > 0")
        need(all(0 <= beta < 1 for beta in self.betas), "optim.betas must be in [0, 1)")
        need(self.max_grad_norm > 0, "optim.max_grad_norm must be above 0 (.inf turns clipping off)")
        need(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    reduction: Literal["sum", "token_mean"] = "sum"  # eq 6: sum over tokens, mean over trajectories
    nonfinite: Literal["raise", "mask"] = "raise"  # a log-prob that is nan or inf
    ratio_tolerance: float | None = None  # largest |ratio - 1|; none: 1e-3 in float32, 0.5 in bfloat16

    def __post_init__(self) -> None:
        need(self.ratio_tolerance is None or self.ratio_tolerance > 0, "loss.ratio_tolerance: above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, what it keeps, and what is checked before its first step."""

    dir: str = "runs/video-opd"
    seed: int = 0
    save_every: int = 10  # optimiser steps between checkpoints
    keep_checkpoints: int = 2
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the final model/; checkpoints are float32
    log_rollouts: int = 4  # rows of rollouts.jsonl a step
    analytic_kl: bool = True  # also measure the reverse KL and the entropy over the whole vocabulary
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    check: bool = True  # self-distillation gate and parity on the first prompts

    def __post_init__(self) -> None:
        need(bool(self.dir), "run.dir is empty: name a folder for the run")
        need(self.save_every >= 1, "run.save_every must be at least 1")
        need(self.keep_checkpoints >= 1, "run.keep_checkpoints must be at least 1: a resume needs one")
        need(self.log_rollouts >= 0, "run.log_rollouts must not be negative")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Data files on which the trained model answers greedily at the end; results go to ``eval/*.json``."""

    data: tuple[str, ...] = ()
    video_root: str | None = None
    limit: int | None = None
    batch_size: int = 8  # prompts a forward
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        need(self.limit is None or self.limit >= 1, "evaluate.limit must be at least 1")
        need(self.batch_size >= 1, "evaluate.batch_size must be at least 1")
        need(self.max_new_tokens >= 1, "evaluate.max_new_tokens must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, completely: the same recipe on the same machine gives the same weights."""

    method: Literal["video-opd"] = "video-opd"
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig
    data: DataConfig
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        sampling = self.sampling
        # The teacher's log-probs are those of its plain distribution. Were the student's of a sharpened or
        # cut one, r_t (eq 5) would compare two different things and its mean would not be the reverse KL.
        for name, value, plain in (
            ("temperature", sampling.temperature, 1.0),
            ("top_p", sampling.top_p, 1.0),
            ("top_k", sampling.top_k, 0),
        ):
            need(
                value == plain,
                f"sampling.{name} {value} with method {self.method}: r_t compares plain log-probs, so the "
                f"student must be sampled plainly; set sampling.{name} to {plain}",
            )
        need(
            self.optim.max_steps is None or self.optim.warmup_steps <= self.optim.max_steps,
            "optim.warmup_steps is above optim.max_steps: the learning rate would never be reached",
        )

    @property
    def ratio_tolerance(self) -> float:
        """Largest |π_θ/π_old − 1| on the update that follows sampling, where it is 1 but for rounding."""
        if self.loss.ratio_tolerance is not None:
            return self.loss.ratio_tolerance
        return 1e-3 if self.model.dtype == "float32" else 0.5


# What other trainers call our keys.
_SYNONYMS = {
    "learning_rate": "optim.lr",
    "num_generations": "sampling.rollouts",
    "max_completion_length": "sampling.max_new_tokens",
    "output_dir": "run.dir",
    "gradient_accumulation_steps": "optim.micro_batch_size",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, then applies ``--a.b value`` (or ``--a.b=value``) pairs.

    Raises :class:`UserError` for a missing or broken file, an unknown key, a wrong type or settings that
    cannot work together.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; name a YAML file") from error
    tree = parse_yaml(text, str(path))
    tree = {} if tree is None else tree
    need(isinstance(tree, dict), f"recipe {path}: expected sections such as 'optim:', not a bare value")
    return recipe_from_dict(apply_overrides(tree, overrides), where=str(path))


def recipe_from_dict(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from nested dicts, strictly; ``where`` opens every message."""
    try:
        return TreeReader(Recipe, _SYNONYMS).read(tree)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error.__cause__


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, so that a later change of a default changes no old run."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
