"""The sections of a recipe that are the same for every method, with the paper's values as defaults.

A description ends with the section of the paper that gives the default; "ours" marks a common choice where
the paper gives none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from video_opd.config.settings import Number, Settings, Texts, number, several
from video_opd.errors import need
from video_opd.seeds import LARGEST_SEED
from video_opd.types import MIN_TEACHER_IOU, UNGATED, ForTopK, RankBy, Strategy

if TYPE_CHECKING:
    from typing_extensions import Self

ModelPart = Literal["vision", "merger", "language", "lm_head"]
AdaptedPart = Literal["vision", "merger", "language"]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["int8", "float8"]
VideoForm = Literal["release", "nested"]
Placement = Literal["auto", "whole", "sharded", "cpu"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Beta = Annotated[float, Field(ge=0, lt=1), number]


class ModelConfig(Settings):
    """The student. Its weights are float32 whatever ``dtype`` says, because an update at lr 1e-6 is below the
    rounding step of bfloat16. ``weights: bfloat16`` holds no float32 copy and rounds each update
    stochastically, so that its mean is the float32 update. (With LoRA, frozen weights are held in ``dtype``.)
    """

    path: str = Field(
        default="Qwen/Qwen3-VL-8B-Instruct",
        description="a model folder, or a name that transformers resolves; sec. 4.1",
    )
    dtype: Dtype = Field(default="float32", description="type of the computation; bfloat16 is autocast; ours")
    weights: Dtype = Field(
        default="float32",
        description="type of the trained weights; bfloat16 is updated with stochastic rounding (torchao), in "
        "one process; ours",
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="implementation of attention; ours"
    )
    engine: Literal["prefix", "plain"] = Field(
        default="prefix", description="prefix: encode a prompt once for everything that is done with it; ours"
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="whether the backward computes again what the forward would have to keep; none: where an "
        "estimate says that it does not fit (prefix engine; the plain one keeps); ours",
    )
    freeze: Annotated[tuple[ModelPart, ...], several] = Field(
        default=(), description="parts of the model that are not trained; ours"
    )
    sharding: Literal["fsdp2"] | None = Field(
        default=None,
        description="with several processes, fsdp2 shards the master weights and the optimiser's state; ours",
    )
    reduce: Literal["step", "micro_batch"] = Field(
        default="step",
        description="when gradients are reduced to shards and freed: once, or after each micro-batch, which "
        "sends more and holds less; ours",
    )
    gather: Literal["step", "layer"] = Field(
        default="step",
        description="when the weights of shards are gathered: all of them once a step, or layer by layer in "
        "each pass, for a student whose whole weights do not fit; ours",
    )

    @model_validator(mode="after")
    def _check_reduce(self) -> Self:
        need(
            self.reduce == "step" or self.sharding is not None,
            f"reduce {self.reduce} needs model.sharding fsdp2: without shards there is nothing to reduce to",
        )
        return self

    @model_validator(mode="after")
    def _check_gather(self) -> Self:
        if self.gather == "layer":
            need(self.sharding is not None, "gather layer needs model.sharding fsdp2: it gathers from shards")
            need(self.engine == "prefix", "gather layer needs model.engine prefix")
            need(
                self.gradient_checkpointing is not False,
                "gather layer computes each layer's activations again where it is gathered for its backward: "
                "leave model.gradient_checkpointing out, or set it to true",
            )
        return self

    def as_run(self) -> dict[str, Any]:
        """The settings without those that only training reads and that notes of earlier versions lack."""
        return self.model_dump(exclude={"reduce", "gather", "weights"})


class LoraConfig(Settings):
    """Low-rank adapters (peft) in place of the full weights of some parts of the model.

    A part is trained in full (the default), through adapters (named here), or not at all (``model.freeze``).
    There is no dropout: the update would differentiate another policy than the one that sampled.
    """

    parts: Annotated[tuple[AdaptedPart, ...], several] = Field(
        default=(), description="parts of the model that get adapters; ours: none, full weights are trained"
    )
    rank: int = Field(
        default=16, ge=1, description="rank of the adapters; without adapters, leave lora.parts empty; ours"
    )
    alpha: Number = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank; ours")
    base_quantization: Literal["int8"] | None = Field(
        default=None,
        description="int8 (torchao): the frozen linear layers hold their weights in 8 bits and compute in "
        "model.dtype; none: in model.dtype; ours",
    )


class DataConfig(Settings):
    """The training rows. Relative paths start at the current directory."""

    train: str = Field(
        min_length=1,
        description="a data file, JSON Lines; the paper trains on 2,500 rows chosen by TVDF, sec. 4.1",
    )
    video_root: str | None = Field(default=None, description="folder of the videos; none: the data file's")
    limit: int | None = Field(default=None, ge=1, description="use only the first rows; none: all rows")
    shuffle: bool = Field(
        default=True, description="a new order in every epoch, which depends on run.seed and the epoch alone"
    )
    workers: int = Field(
        default=2, ge=0, description="background workers that decode; 0: decode in the training process"
    )
    prefetch: int | None = Field(
        default=None,
        ge=1,
        description="videos that a process decodes ahead; none: its share of a batch, which is then ready",
    )
    max_failed_share: Number = Field(
        default=0.05,
        ge=0,
        le=1,
        description="a run stops when a larger share of the rows cannot be used; a share is between 0 and 1",
    )
    cache_dir: str | None = Field(default=None, description="a folder that keeps decoded clips; none: off")
    memory_gib: Number = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="GiB of encoded prompts that a process keeps, if their videos come again; 0: none",
    )


class VideoConfig(Settings):
    """How much of a video the model sees (sec. 4.1). Frame tokens are those of one pair of frames."""

    fps: Number = Field(
        default=2.0, gt=0, allow_inf_nan=False, description="sampled frames a second; sec. 4.1"
    )
    min_frames: int = Field(default=4, ge=2, description="fewest frames of a video; ours")
    max_frames: int = Field(default=768, ge=2, description="most frames of a video; sec. 4.1")
    min_frame_tokens: int = Field(
        default=128,
        ge=1,
        description="fewest tokens of a frame pair; keep decides between them and max_video_tokens; ours",
    )
    max_frame_tokens: int = Field(default=768, ge=1, description="most tokens of a frame pair; sec. 4.1")
    max_video_tokens: int = Field(default=8192, ge=1, description="most tokens of a video; sec. 4.1")
    keep: Literal["max_video_tokens", "min_frame_tokens"] = Field(
        default="max_video_tokens",
        description="which bound a long video keeps if it cannot keep both; qwen-vl-utils: min_frame_tokens",
    )
    backend: Literal["pyav", "torchcodec"] = Field(default="pyav", description="the decoder; ours")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        need(
            self.min_frames <= self.max_frames,
            f"min_frames is {self.min_frames}, max_frames {self.max_frames}: "
            "a video needs min_frames <= max_frames",
        )
        need(
            self.min_frame_tokens <= self.max_frame_tokens,
            f"min_frame_tokens is {self.min_frame_tokens}, max_frame_tokens {self.max_frame_tokens}: "
            "a video needs min_frame_tokens <= max_frame_tokens",
        )
        pairs = (self.min_frames + 1) // 2
        need(
            self.max_video_tokens >= pairs,
            f"max_video_tokens {self.max_video_tokens} cannot hold min_frames {self.min_frames} "
            f"({pairs} pairs of at least one token): raise the first or lower the second",
        )
        return self

    @model_serializer(mode="wrap")
    def _leave_out_the_usual_bound(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Notes beside rows and names of cached clips were written before ``keep`` could be chosen."""
        tree = dict(serialize(self))
        if tree.get("keep") == "max_video_tokens":
            del tree["keep"]
        return tree

    def without_decoder(self) -> dict[str, Any]:
        """The settings that decide which frames are seen, and how large; every decoder gives the same."""
        return self.model_dump(exclude={"backend"})


class PromptConfig(Settings):
    """How the model is asked."""

    style: Literal["paper", "timelens", "lmms-eval-timelens", "question"] = Field(
        default="paper", description="wording of the prompt; question: the query alone; figure 7"
    )
    thinking: bool = Field(
        default=False, description="reason before the answer; the paper finds no-thinking better, table 8"
    )
    video_form: VideoForm | None = Field(
        default=None,
        description="markers around a video: release, as Qwen's own processor writes them, or nested, as "
        "transformers 5.10 and later do; none: as the model was trained; ours",
    )

    @model_serializer(mode="wrap")
    def _leave_out_an_open_form(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A form that the model decides is no setting, so earlier files and this one agree."""
        tree = dict(serialize(self))
        if tree.get("video_form") is None:
            tree.pop("video_form", None)
        return tree


EngineName = Literal["hf", "vllm"]  # whose forward passes: this package's own, on transformers, or vLLM's


class VLLMConfig(Settings):
    """How vLLM runs a model (``--engine vllm``). It changes no result but by rounding."""

    memory: Number = Field(
        default=0.9, gt=0, le=1, description="share of a GPU's memory that it takes; two models share one GPU"
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="longest prompt and response together; none: what the video budget allows and 4,096; of "
        "a server, 32,768",
    )
    gpus: int = Field(default=1, ge=1, description="GPUs over which it divides the model")
    eager: bool = Field(default=False, description="no CUDA graphs, which take a minute to record")
    check: bool = Field(
        default=True,
        description="compare its prompt and its log-probs with those of this package on the first prompt",
    )


class OptimConfig(Settings):
    """AdamW. What its weights are is ``model.weights``."""

    lr: Number = Field(default=1e-6, gt=0, description="learning rate; sec. 4.1")
    batch_size: int = Field(
        default=32, ge=1, description="prompts of an optimiser step, over all processes; sec. 4.1"
    )
    micro_batch_size: int = Field(
        default=1, ge=1, description="prompts of a forward and backward; does not change the result"
    )
    epochs: int = Field(
        default=1, ge=1, description="passes over the rows; for less than one, set optim.max_steps; sec. 4.1"
    )
    updates_per_batch: int = Field(
        default=1, ge=1, description="optimiser steps on the same rollouts; the ratio of eq 6 then leaves 1"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="optimiser steps; none: as many as the epochs have"
    )
    weight_decay: Number = Field(default=0.0, ge=0, description="of matrices, not of vectors; ours")
    betas: Annotated[tuple[Beta, Beta], several] = Field(default=(0.9, 0.999), description="of Adam; ours")
    eps: Number = Field(default=1e-8, gt=0, description="of Adam; ours")
    moments: Literal["float32", "int8"] = Field(
        default="float32", description="type of Adam's two moments; int8: blocks of 256 (torchao); ours"
    )
    max_grad_norm: Number = Field(
        default=1.0, gt=0, description="gradients are clipped to this norm; .inf turns clipping off; ours"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps over which the learning rate rises from 0; ours"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="the learning rate after the warm-up; ours"
    )
    offload: bool = Field(
        default=False,
        description="whether master weights and moments are on the CPU, and the optimiser works there; ours",
    )

    @model_validator(mode="after")
    def _check_multiples(self) -> Self:
        need(
            self.batch_size % self.micro_batch_size == 0,
            f"batch_size {self.batch_size} is not a multiple of optim.micro_batch_size "
            f"{self.micro_batch_size}: choose a divisor of it",
        )
        need(
            (self.max_steps or 0) % self.updates_per_batch == 0,
            f"max_steps {self.max_steps} is not a multiple of optim.updates_per_batch "
            f"{self.updates_per_batch}: rollouts would be left half used",
        )
        need(
            self.max_steps is None or self.warmup_steps <= self.max_steps,
            "warmup_steps is above optim.max_steps: the learning rate would never be reached",
        )
        return self


class RunConfig(Settings):
    """The run folder, how much it keeps, and the checks before the first step."""

    dir: str = Field(default="runs/video-opd", min_length=1, description="a folder for the run")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="everything random follows from it")
    save_every: int = Field(default=10, ge=1, description="optimiser steps between two checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints kept; a resume needs one")
    save_dtype: Dtype = Field(
        default="float32", description="type of the final model/; checkpoints are float32"
    )
    log_rollouts: int = Field(default=4, ge=0, description="rows of rollouts.jsonl a step")
    analytic_kl: bool = Field(
        default=True, description="also measure the reverse KL and the entropy over the whole vocabulary"
    )
    trackers: Annotated[tuple[Tracker, ...], several] = Field(
        default=("tensorboard",), description="where metrics are logged besides metrics.jsonl"
    )
    check: bool = Field(
        default=True,
        description="check on the first prompts that sampling, scoring and the update's forward agree",
    )


class EvaluateConfig(Settings):
    """Data files on which the trained model answers greedily at the end; results go to ``eval/*.json``."""

    data: Texts = Field(default=(), description="annotated data files, JSON Lines")
    video_root: str | None = Field(default=None, description="folder of the videos; none: the data file's")
    limit: int | None = Field(default=None, ge=1, description="use only the first rows; none: all rows")
    batch_size: int = Field(default=8, ge=1, description="prompts of a forward")
    max_new_tokens: int = Field(
        default=64, ge=1, description="length limit; left out, it is sampling.max_new_tokens"
    )


class SelectionConfig(Settings):
    """Which k of the scored rows are selected: gate, ranking, sampler (sec. 3.2, appendix B)."""

    k: int = Field(default=2500, ge=1, description="rows to select, because training needs some; sec. 4.1")
    strategy: Strategy = Field(default="topk", description="the sampler; eq 16")
    rank_by: RankBy = Field(
        default="iou_gap", description="what candidates are ranked by; eq 12, or reverse_kl: sec. 3.2, step 2"
    )
    min_teacher_iou: Number = Field(
        default_factory=lambda given: 0.0 if given.get("strategy") in UNGATED else MIN_TEACHER_IOU,
        le=1,
        description=f"the gate, a mean IoU of at most 1; 0: none. Left out, it is {MIN_TEACHER_IOU:g}, and 0 "
        f"for {' and '.join(UNGATED)}; sec. 3.2, step 1, leaves it open",
    )
    buckets: int = Field(default=5, ge=1, description="of bbds; sec. B.3")
    # Both bounds are far beyond any IoU or KL. Beyond them all weights would be the same number, or none.
    center: Number | None = Field(
        default=None, ge=-1e6, le=1e6, description="none: 0.9 for gwds, sec. B.4; 0.3 for gaussian, sec. D.1"
    )
    sigma: Number | None = Field(
        default=None,
        ge=1e-6,
        le=1e6,
        description="none: 0.2 for gwds, sec. B.4, and for gaussian, sec. D.1",
    )

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        only: dict[str, tuple[bool, tuple[str, ...]]] = {
            "buckets": (self.buckets != 5, ("bbds",)),
            "center": (self.center is not None, ("gwds", "gaussian")),
            "sigma": (self.sigma is not None, ("gwds", "gaussian")),
            "rank_by": (self.rank_by != "iou_gap", ("topk", "dsus", "bbds", "gwds")),
        }
        for key, (is_set, strategies) in only.items():
            need(
                not is_set or self.strategy in strategies,
                f"{key} means nothing to strategy {self.strategy} (only to {', '.join(strategies)}): "
                "take it out",
            )
        return self

    @property
    def gated(self) -> bool:
        return self.min_teacher_iou > 0


class TVDFConfig(SelectionConfig):
    """How ``video-opd rounds`` scores and selects what a round trains on; ``train`` ignores it."""

    teacher_k: int = Field(
        default=4, ge=1, description="the teacher's responses to a row; sec. 3.2 leaves it open"
    )
    student_k: int | None = Field(default=None, description="the student's responses; none: as teacher_k")
    temperature: Number = Field(default=1.0, ge=0, description="of the responses; 0 is greedy; ours")
    batch_size: int = Field(default=8, ge=1, description="rows in a batch of responses; ours")

    @model_validator(mode="after")
    def _check_responses(self) -> Self:
        need(
            self.responses_of_student >= 1,
            f"student_k must be at least 1: strategy {self.strategy} reads the student's responses",
        )
        need(
            self.temperature > 0 or self.teacher_k == self.responses_of_student == 1,
            "temperature 0 makes all responses the same: set tvdf.teacher_k and student_k to 1",
        )
        return self

    @property
    def responses_of_student(self) -> int:
        return self.teacher_k if self.student_k is None else self.student_k

    @property
    def asks_teacher(self) -> bool:
        """Whether the selection depends on the teacher's responses; GRPO's, by difficulty, does not."""
        return self.gated or self.strategy != "gaussian"

    @property
    def for_topk(self) -> ForTopK | None:
        """The selection that lazy scores are enough for; None if it depends on the scores of all rows."""
        if self.strategy != "topk" or self.rank_by != "iou_gap":
            return None
        return ForTopK(k=self.k, min_teacher_iou=max(self.min_teacher_iou, 0.0))


class RoundsConfig(Settings):
    """How often ``video-opd rounds`` scores, selects, trains and evaluates; ``train`` ignores it."""

    count: int = Field(default=3, ge=1, description="rounds; sec. D.4, table 6")
    reuse: bool = Field(
        default=False, description="whether a row that was trained on may be chosen again; ours"
    )
