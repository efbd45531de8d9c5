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
from video_opd.types import UNGATED, RankBy, Strategy

MethodName = Literal["video-opd", "grpo", "sft", "op-rkd", "op-fkd"]
ON_POLICY = (
    "video-opd",
    "grpo",
)  # the student writes what it is trained on; the others: the annotation's text
WITH_TEACHER = ("video-opd", "op-rkd", "op-fkd")
ModelPart = Literal["vision", "merger", "language", "lm_head"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student. Its weights and the optimiser's state are float32 whatever ``dtype`` says, because an
    update at lr 1e-6 is below the rounding step of bfloat16. (With LoRA, what is frozen is held in
    ``dtype``.)"""

    path: str = "Qwen/Qwen3-VL-8B-Instruct"  # sec. 4.1; a folder, or a name that transformers resolves
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation (bfloat16: autocast); ours
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # ours
    engine: Literal["prefix", "plain"] = "prefix"  # ours: encode a prompt once for all that is done with it
    # Whether the backward computes again what the forward would have to keep. None: where an estimate says
    # that it does not fit (prefix engine; the plain one keeps). ours
    gradient_checkpointing: bool | None = None
    freeze: tuple[ModelPart, ...] = ()  # ours: nothing is frozen
    # With several processes: "fsdp2" keeps master weights and the optimiser's state in shards. ours
    sharding: Literal["fsdp2"] | None = None


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (peft) in place of the full weights of some parts of the model.

    A part is trained in full (the default), through adapters (named here), or not at all (``model.freeze``).
    There is no dropout: it would make the forward of an update another policy than the one that sampled.
    """

    parts: tuple[Literal["vision", "merger", "language"], ...] = ()  # ours: full-parameter
    rank: int = 16  # ours
    alpha: float = 32.0  # ours; the update is scaled by alpha / rank

    def __post_init__(self) -> None:
        need(self.rank >= 1, "lora.rank must be at least 1; without adapters, leave lora.parts empty")
        need(self.alpha > 0, "lora.alpha must be above 0")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen teacher. The paper's, Qwen3-VL-32B after GRPO (sec. 4.1), is not public: name yours."""

    path: str = ""
    by_source: dict[str, str] = field(default_factory=dict)  # other teachers, for rows of these sources
    dtype: Literal["float32", "bfloat16"] = "float32"  # ours
    micro_batch_size: int | None = None  # prompts a forward; none: as optim.micro_batch_size
    distributions: bool = True  # false: it gives the log-probs of written tokens only
    reward_scale: float = 1.0  # λ of G-OPD (arXiv 2602.12125): above 1 goes beyond the teacher; 1 is eq 5

    def __post_init__(self) -> None:
        need((self.micro_batch_size or 1) >= 1, "teacher.micro_batch_size must be at least 1")
        need(self.reward_scale >= 1, "teacher.reward_scale must be at least 1 (1 is the paper's eq 5)")
        for source, path in self.by_source.items():
            need(bool(path), f"teacher.by_source.{source} is empty: name a teacher's folder")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on. Relative paths start at the current directory."""

    train: str  # a data file (JSON Lines); the paper: 2,500 rows chosen by TVDF (sec. 4.1)
    video_root: str | None = None  # none: videos are relative to the data file
    limit: int | None = None  # only the first rows
    shuffle: bool = True  # a permutation an epoch, a function of (run.seed, epoch)
    workers: int = 2  # decoding in the background; 0: in the training process
    prefetch: int | None = None  # videos made ahead; none: those of a batch, so that the next one is ready
    max_failed_share: float = 0.05  # a run stops when more rows than this cannot be used
    cache_dir: str | None = None  # keeps decoded clips on disk

    def __post_init__(self) -> None:
        need(bool(self.train), "data.train is empty: name a data file (JSON Lines)")
        need(self.limit is None or self.limit >= 1, "data.limit must be at least 1 (none: all rows)")
        need(self.workers >= 0, "data.workers must not be negative")
        need(self.prefetch is None or self.prefetch >= 1, "data.prefetch must be at least 1")
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
    style: Literal["paper", "timelens", "question"] = "paper"  # figure 7; question: the query alone
    thinking: bool = False  # table 8: no-thinking is better


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the student answers while it is trained (eq 4)."""

    temperature: float = 1.0  # DESIGN: the log-probs are of the distribution that was sampled
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_new_tokens: int = 64  # ours: an answer is about a dozen tokens; thinking mode must say its own
    rollouts: int = 1  # sec. 3.1: a single rollout for each prompt; grpo: 8 (sec. 4.1)
    # Prompts sampled together. None: as optim.micro_batch_size, and then (prefix engine) the reading that
    # they are sampled from is the forward of the update, too.
    micro_batch_size: int | None = None

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
    updates_per_batch: int = 1  # optimiser steps on the same rollouts; eq 6's ratio then leaves 1
    max_steps: int | None = None  # optimiser steps; none: as many as the epochs have
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
        need(self.updates_per_batch >= 1, "optim.updates_per_batch must be at least 1")
        need(self.max_steps is None or self.max_steps >= 1, "optim.max_steps must be at least 1")
        need(
            (self.max_steps or 0) % self.updates_per_batch == 0,
            f"optim.max_steps {self.max_steps} is not a multiple of optim.updates_per_batch "
            f"{self.updates_per_batch}: rollouts would be left half used",
        )
        need(self.weight_decay >= 0 and self.eps > 0, "optim needs weight_decay >= 0 and eps > 0")
        need(all(0 <= beta < 1 for beta in self.betas), "optim.betas must be in [0, 1)")
        need(self.max_grad_norm > 0, "optim.max_grad_norm must be above 0 (.inf turns clipping off)")
        need(self.warmup_steps >= 0, "optim.warmup_steps must not be negative")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    reduction: Literal["sum", "token_mean"] = "sum"  # eq 6: sum over tokens, mean over trajectories
    nonfinite: Literal["raise", "mask"] = "raise"  # a log-prob that is nan or inf
    ratio_tolerance: float | None = None  # largest |ratio - 1|; none: 1e-3 in float32, 0.5 in bfloat16
    estimator: Literal["sampled", "full", "topk"] = "sampled"  # eq 5; beyond the paper: the analytic KL
    top_k: int = 64  # tokens that estimator topk keeps apart; the rest counts as one
    baseline: Literal["none", "kl"] = "none"  # kl: r_t less its expectation at the state, a control variate
    clip_low: float | None = None  # the ratio is held above 1 - clip_low; none: eq 6, unclipped
    clip_high: float | None = None  # and below 1 + clip_high; none: as clip_low
    kl_beta: float = 0.0  # grpo: weight of the KL to the reference, the initial student (eq 1)
    max_importance_weight: float | None = (
        None  # truncated weights, where sampler and trainer differ; none: off
    )

    def __post_init__(self) -> None:
        need(self.ratio_tolerance is None or self.ratio_tolerance > 0, "loss.ratio_tolerance: above 0")
        need(self.top_k >= 1, "loss.top_k must be at least 1")
        need(self.clip_low is None or 0 < self.clip_low < 1, "loss.clip_low must be in (0, 1)")
        need(self.clip_high is None or self.clip_high > 0, "loss.clip_high must be above 0")
        need(
            self.clip_high is None or self.clip_low is not None,
            "loss.clip_high without loss.clip_low: set both, or clip_low alone for a symmetric clip",
        )
        need(self.kl_beta >= 0, "loss.kl_beta must not be negative")
        need(
            self.max_importance_weight is None or self.max_importance_weight >= 1,
            "loss.max_importance_weight must be at least 1 (none turns the weights off)",
        )

    @property
    def clip(self) -> tuple[float, float] | None:
        """(low, high), or None for the unclipped surrogate."""
        if self.clip_low is None:
            return None
        return self.clip_low, self.clip_low if self.clip_high is None else self.clip_high


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a whole answer is worth to ``grpo``; the other methods have no such reward."""

    iou: Literal["timestamp_aware", "plain"] = "timestamp_aware"  # sec. 2.2: Time-R1's
    iou_weight: float = 1.0  # ours
    format_weight: float = 0.0  # ours: off; TVG-R1: 0.1 beside an iou_weight of 0.9
    function: str | None = None  # "package.module:function" or "file.py:function", in place of all above
    normalise_std: bool = True  # eq 2: divide by the group's standard deviation; false: only centre

    def __post_init__(self) -> None:
        need(
            self.iou_weight >= 0 and self.format_weight >= 0 and self.iou_weight + self.format_weight > 0,
            "reward weights must not be negative, and not both 0",
        )
        need(
            self.function is None or ":" in self.function,
            f"reward.function {self.function!r}: write package.module:function or file.py:function",
        )


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
    max_new_tokens: int = 64  # as sampling.max_new_tokens, where that is given

    def __post_init__(self) -> None:
        need(self.limit is None or self.limit >= 1, "evaluate.limit must be at least 1")
        need(self.batch_size >= 1, "evaluate.batch_size must be at least 1")
        need(self.max_new_tokens >= 1, "evaluate.max_new_tokens must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TVDFConfig:
    """How ``video-opd rounds`` chooses what a round trains on; ``train`` ignores it."""

    k: int = 2500  # sec. 4.1: rows a round
    strategy: Strategy = "topk"  # eq 16
    rank_by: RankBy = "iou_gap"  # eq 12; reverse_kl: sec. 3.2, step 2
    min_teacher_iou: float = 0.5  # the gate (sec. 3.2, step 1, leaves it open); gaussian and random: 0, none
    buckets: int = 5  # sec. B.3, of bbds
    center: float | None = None  # none: 0.9 of gwds (sec. B.4), 0.3 of gaussian (sec. D.1)
    sigma: float | None = None  # none: 0.2 of both
    teacher_k: int = 4  # the teacher's answers to a candidate (sec. 3.2 leaves it open)
    student_k: int | None = None  # the student's; none: as teacher_k
    temperature: float = 1.0  # of the answers; ours
    batch_size: int = 8  # candidates that are answered together; ours

    def __post_init__(self) -> None:
        need(self.k >= 1, "tvdf.k must be at least 1: a round trains on something")
        need(self.teacher_k >= 1, "tvdf.teacher_k must be at least 1: the gate reads the teacher's answers")
        need(
            self.answers_of_student >= 1,
            f"tvdf.student_k must be at least 1: strategy {self.strategy} reads the student's answers",
        )
        need(self.min_teacher_iou <= 1, "tvdf.min_teacher_iou is a share, at most 1 (0: no gate)")
        need(self.buckets >= 1, "tvdf.buckets must be at least 1")
        need(self.sigma is None or self.sigma > 0, "tvdf.sigma must be above 0")
        need(self.batch_size >= 1, "tvdf.batch_size must be at least 1")
        need(self.temperature >= 0, "tvdf.temperature must not be negative (0: greedy)")
        need(
            self.temperature > 0 or self.teacher_k == self.answers_of_student == 1,
            "tvdf.temperature 0 makes all answers the same: set tvdf.teacher_k and student_k to 1",
        )
        only: dict[str, tuple[bool, tuple[str, ...]]] = {
            "buckets": (self.buckets != 5, ("bbds",)),
            "center": (self.center is not None, ("gwds", "gaussian")),
            "sigma": (self.sigma is not None, ("gwds", "gaussian")),
            "rank_by": (self.rank_by != "iou_gap", ("topk", "dsus", "bbds", "gwds")),
        }
        for key, (is_set, strategies) in only.items():
            need(
                not is_set or self.strategy in strategies,
                f"tvdf.{key} means nothing to strategy {self.strategy} (only to {', '.join(strategies)}): "
                "take it out",
            )

    @property
    def answers_of_student(self) -> int:
        return self.teacher_k if self.student_k is None else self.student_k

    @property
    def gated(self) -> bool:
        return self.min_teacher_iou > 0

    @property
    def asks_teacher(self) -> bool:
        """Whether the choice depends on the teacher's answers; GRPO's choice by difficulty does not."""
        return self.gated or self.strategy != "gaussian"


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """How often ``video-opd rounds`` scores, selects, trains and evaluates; ``train`` ignores it."""

    count: int = 3  # sec. D.4, table 6
    reuse: bool = False  # ours: a row that was trained on is no candidate again

    def __post_init__(self) -> None:
        need(self.count >= 1, "rounds.count must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, completely: the same recipe on the same machine gives the same weights."""

    method: MethodName = "video-opd"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig
    video: VideoConfig = field(default_factory=VideoConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tvdf: TVDFConfig = field(default_factory=TVDFConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)

    def __post_init__(self) -> None:
        self._check_parts()
        self._check_teacher()
        self._check_sampling()
        self._check_loss()
        need(
            self.optim.max_steps is None or self.optim.warmup_steps <= self.optim.max_steps,
            "optim.warmup_steps is above optim.max_steps: the learning rate would never be reached",
        )

    def _check_parts(self) -> None:
        both = sorted(set(self.lora.parts) & set(self.model.freeze))
        need(
            not both,
            f"{', '.join(both)} stands in lora.parts and in model.freeze: adapters train a part, so take it "
            "out of one of them",
        )

    def _check_teacher(self) -> None:
        method, teacher = self.method, self.teacher
        if method not in WITH_TEACHER:
            return
        need(
            bool(teacher.path),
            f"teacher.path is missing: method {method} learns from a teacher; name its folder",
        )
        if teacher.distributions:
            return
        wanted = {
            "method op-fkd needs": method == "op-fkd",
            f"loss.estimator {self.loss.estimator} needs": self.loss.estimator != "sampled",
            "loss.baseline kl needs": self.loss.baseline == "kl",
        }
        for what, holds in wanted.items():
            need(
                not holds,
                f"{what} the teacher's distributions, and teacher.distributions is false: use a teacher "
                "that gives them, or method video-opd with loss.estimator sampled",
            )

    def _check_sampling(self) -> None:
        method, sampling = self.method, self.sampling
        if method not in ON_POLICY:
            need(
                not self.prompt.thinking,
                f"prompt.thinking with method {method}: it trains on the annotation, which has no reasoning "
                "to imitate; use video-opd or grpo",
            )
            need(
                sampling.rollouts == 1,
                f"sampling.rollouts {sampling.rollouts} with method {method}: an annotation is one "
                "trajectory, so leave it at 1",
            )
            return
        need(
            method != "grpo" or sampling.rollouts >= 2,
            f"sampling.rollouts {sampling.rollouts} with method grpo: a reward is compared within its group "
            "(eq 2), which needs at least 2; the paper takes 8",
        )
        # What was sampled must be what is scored again. A sharpened distribution has its own log-probs at
        # the update (GRPO), but not the teacher's; a cut one has none outside the cut.
        plain: dict[str, float] = {"top_p": 1.0, "top_k": 0}
        if method == "video-opd":
            plain["temperature"] = 1.0
        for name, value in plain.items():
            mine = getattr(sampling, name)
            need(
                mine == value,
                f"sampling.{name} {mine} with method {method}: its log-probs are those of the plain "
                f"distribution, so the student must be sampled plainly; set sampling.{name} to {value}",
            )

    def _check_loss(self) -> None:
        method, loss = self.method, self.loss
        only: dict[str, tuple[bool, tuple[str, ...]]] = {
            "loss.estimator": (loss.estimator != "sampled", ("video-opd",)),
            "loss.baseline": (loss.baseline != "none", ("video-opd",)),
            "teacher.reward_scale": (self.teacher.reward_scale != 1, ("video-opd", "op-rkd")),
            "teacher.by_source": (bool(self.teacher.by_source), WITH_TEACHER),
            "loss.kl_beta": (loss.kl_beta != 0, ("grpo",)),
            "loss.clip_low": (loss.clip is not None, ("video-opd", "grpo", "op-rkd")),
            "loss.max_importance_weight": (loss.max_importance_weight is not None, ON_POLICY),
            "reward.function": (self.reward.function is not None, ("grpo",)),
        }
        for key, (is_set, methods) in only.items():
            need(
                not is_set or method in methods,
                f"{key} means nothing to method {method} (only to {', '.join(methods)}): take it out",
            )
        if loss.estimator != "sampled":
            for key, is_set in {
                "loss.baseline": loss.baseline != "none",
                "teacher.reward_scale": self.teacher.reward_scale != 1,
                "loss.clip_low": loss.clip is not None,
                "loss.max_importance_weight": loss.max_importance_weight is not None,
            }.items():
                need(
                    not is_set,
                    f"{key} belongs to loss.estimator sampled; {loss.estimator} differentiates the KL itself",
                )
        need(
            loss.baseline == "none" or self.teacher.reward_scale == 1,
            "loss.baseline kl is the expectation of eq 5's r_t: it needs teacher.reward_scale 1",
        )

    def check_rounds(self) -> None:
        """What ``rounds`` needs beyond ``train``. Raises :class:`UserError` with the remedy."""
        need(
            bool(self.teacher.path) or not self.tvdf.asks_teacher,
            f"teacher.path is missing: tvdf.strategy {self.tvdf.strategy} asks a teacher; name its folder, "
            "or use strategy gaussian without a gate, which needs none",
        )
        need(
            not self.teacher.by_source or not self.tvdf.asks_teacher,
            "teacher.by_source: a selection asks one teacher about all candidates; run the rounds for each "
            "source with its own teacher.path",
        )

    @property
    def ratio_tolerance(self) -> float:
        """Largest |π_θ/π_old − 1| on the update that follows sampling, where it is 1 but for rounding."""
        if self.loss.ratio_tolerance is not None:
            return self.loss.ratio_tolerance
        return 1e-3 if self.model.dtype == "float32" else 0.5


# What other trainers call our keys.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "num_generations": "sampling.rollouts",
    "max_completion_length": "sampling.max_new_tokens",
    "output_dir": "run.dir",
    "gradient_accumulation_steps": "optim.micro_batch_size",
    "num_iterations": "optim.updates_per_batch",
    "beta": "loss.kl_beta",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
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
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 at byte {error.start}; name a YAML file") from error
    tree = parse_yaml(text, str(path))
    tree = {} if tree is None else tree
    need(isinstance(tree, dict), f"recipe {path}: expected sections such as 'optim:', not a bare value")
    return recipe_from_dict(apply_overrides(tree, overrides), where=str(path))


def recipe_from_dict(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from nested dicts, strictly; ``where`` opens every message."""
    try:
        return TreeReader(Recipe, SYNONYMS).read(_with_dependent_defaults(tree))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error.__cause__


def _with_dependent_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with the defaults that depend on other keys, where they were left out."""
    tree = dict(tree)

    def section(name: str) -> dict[str, Any] | None:
        """A copy to add to; None for what is no section, which the reader will say."""
        value = tree.get(name)
        if value is not None and not isinstance(value, Mapping):
            return None
        tree[name] = dict(value or {})
        return tree[name]

    sampling, evaluate, prompt = section("sampling"), section("evaluate"), section("prompt")
    tvdf = section("tvdf")
    if sampling is None or evaluate is None or prompt is None or tvdf is None:
        return tree
    if tvdf.get("strategy") in UNGATED:
        tvdf.setdefault("min_teacher_iou", 0.0)
    if tree.get("method") == "grpo":
        sampling.setdefault("rollouts", 8)  # sec. 4.1
    if prompt.get("thinking") is True and tree.get("method", "video-opd") in ON_POLICY:
        need(
            "max_new_tokens" in sampling,
            "prompt.thinking without a length limit: reasoning has no natural end, so set "
            "sampling.max_new_tokens (the paper's answers without it have about a dozen tokens)",
        )
    if "max_new_tokens" in sampling:
        evaluate.setdefault("max_new_tokens", sampling["max_new_tokens"])
    return tree


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, so that a later change of a default changes no old run."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
