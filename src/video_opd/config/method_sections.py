"""The sections of a recipe that depend on the method: teacher, sampling, loss, reward.

A class has the fields that mean something to its methods, and no others. Descriptions are as in
:mod:`video_opd.config.sections`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from video_opd.config.sections import Dtype, Placement, Quantization
from video_opd.config.settings import Number, Settings, TextByText, Texts
from video_opd.errors import need

if TYPE_CHECKING:
    from typing_extensions import Self


# ------------------------------------------------------------------------------------------------ teacher


def check_placement(placement: Placement, quantization: Quantization | None) -> None:
    """Raises :class:`UserError` for a quantised teacher that is not whole."""
    need(
        quantization is None or placement in ("auto", "whole"),
        f"placement {placement} with teacher.quantization {quantization}: quantised weights "
        "are neither sharded nor moved; leave out one of them",
    )


def check_shards(sharded: bool, processes: int) -> None:
    """Raises :class:`UserError` for a teacher in shards with a single process."""
    need(
        not sharded or processes > 1,
        "teacher.placement is sharded, and there is one process to hold the shards: start several with "
        "torchrun, or leave it out",
    )


class TeacherConfig(Settings):
    """A frozen teacher. The paper's is Qwen3-VL-32B after GRPO (sec. 4.1), public since June 2026 as
    ``williamljz/Video-opd-teacher-Qwen3-VL-32B-GRPO``.

    A method that does not learn from a teacher may name one for TVDF's scores and for comparison.
    """

    path: str = Field(default="", description="the teacher's folder")
    dtype: Dtype = Field(default="float32", description="type of its weights and computation; ours")
    quantization: Quantization | None = Field(
        default=None,
        description="int8 or float8 (torchao): the teacher's linear layers hold their weights in 8 bits and "
        "compute in teacher.dtype; none: in teacher.dtype; ours",
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="prompts that the teacher, or the reference, scores together; none: as "
        "optim.micro_batch_size",
    )
    placement: Placement = Field(
        default="auto",
        description="where the teacher, or the reference, is held: whole on every device, sharded over the "
        "processes, on the cpu outside its turn; auto: the first of these that fits; ours",
    )
    other_template: bool = Field(
        default=False,
        description="accept a teacher whose chat template writes other prompts; it is given the student's",
    )

    urls: Texts = Field(
        default=(),
        description="addresses of video-opd serve-teacher, all with the teacher of path or fingerprint; "
        "their token is in the variable VIDEO_OPD_TOKEN; none: the run holds the teacher; ours",
    )
    fingerprint: str | None = Field(
        default=None, description="of urls' model, where its folder is not here; the server prints it; ours"
    )
    send: Literal["value", "reference"] = Field(
        default="value",
        description="value: the servers get the frames; reference: they read the video files themselves, and "
        "refuse if they see other frames; ours",
    )
    wait_s: Number = Field(
        default=3600.0,
        gt=0,
        description="how long the run waits for servers that are away before it ends with a checkpoint; ours",
    )

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        check_placement(self.placement, self.quantization)
        return self

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        if not self.urls:
            need(self.fingerprint is None, "fingerprint belongs to urls: name the servers, or leave it out")
            return self
        need(
            self.named,
            "urls without teacher.path: name the folder of their model, or its fingerprint in "
            "teacher.fingerprint",
        )
        for url in self.urls:
            need(
                url.startswith(("http://", "https://")),
                f"urls has {url!r}; an address begins with http:// or https://",
            )
        return self

    @property
    def named(self) -> bool:
        """Whether there is a teacher at all."""
        return bool(self.path) or bool(self.urls and self.fingerprint)

    @property
    def paths(self) -> list[str]:
        """The folders of all teachers, each once."""
        return [self.path] if self.path else []

    @property
    def local_paths(self) -> list[str]:
        """Those that a run holds itself."""
        return [] if self.urls else self.paths


class DistillationTeacherConfig(TeacherConfig):
    """A teacher that the student learns from."""

    by_source: TextByText = Field(
        default_factory=dict,
        description="other teachers for rows of these sources: name a folder for each source",
    )
    distributions: bool = Field(
        default=True, description="false: the teacher gives the log-probs of written tokens only"
    )
    receive: Literal["distributions", "hidden"] = Field(
        default="distributions",
        description="how servers answer for whole distributions: with these, or with hidden states, some 60 "
        "times smaller, to which the run applies the teacher's lm_head; ours",
    )
    overlap: bool = Field(
        default=True,
        description="whether the student samples the next micro-batch while servers score one, which holds "
        "the activations of both; ours",
    )

    @model_validator(mode="after")
    def _check_one_teacher(self) -> Self:
        need(not (self.urls and self.by_source), "by_source names folders; leave urls out, or by_source")
        need(
            not self.urls or self.placement == "auto",
            f"placement is {self.placement}, and the servers of urls hold the teacher: leave it out",
        )
        return self

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys([self.path, *self.by_source.values()]))


class ScaledTeacherConfig(DistillationTeacherConfig):
    """A teacher whose reward is taken token by token (eq 5)."""

    reward_scale: Number = Field(
        default=1.0,
        ge=1,
        description="λ of G-OPD, arXiv 2602.12125: above 1 goes beyond the teacher; 1 is the paper's eq 5",
    )


# ----------------------------------------------------------------------------------------------- sampling


class SamplingConfig(Settings):
    """How long the student's responses may be wherever it writes any: in the check before the first step, and
    when its pool is scored."""

    max_new_tokens: int = Field(
        default=64,
        ge=1,
        description="length limit; ours: a response has about a dozen tokens; set it for thinking",
    )


class OnPolicySamplingConfig(SamplingConfig):
    """How the student samples what it is trained on (eq 4)."""

    temperature: Number = Field(
        default=1.0, gt=0, description="training needs samples: the log-probs are of the sampled distribution"
    )
    top_p: Number = Field(default=1.0, gt=0, le=1, description="1, which turns it off, in training")
    top_k: int = Field(default=0, ge=0, description="0, which turns it off, in training")
    rollouts: int = Field(default=1, ge=1, description="rollouts of each prompt; sec. 3.1")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="prompts sampled together; none: as optim.micro_batch_size, and then the prefix engine "
        "samples from the prefill of the update",
    )
    engine: Literal["hf", "vllm"] = Field(
        default="hf",
        description="who samples: hf: the student itself; vllm: vLLM, which gets the student's weights "
        "before each batch, for long responses; ours",
    )
    vllm_memory: Number = Field(
        default=0.3, gt=0, lt=1, description="share of a GPU's memory that vLLM takes while it samples; ours"
    )


class GRPOSamplingConfig(OnPolicySamplingConfig):
    """Groups of rollouts, whose rewards are compared."""

    rollouts: int = Field(default=8, ge=1, description="rollouts of each prompt, a group; sec. 4.1")


# ------------------------------------------------------------------------------------------ loss and reward


class LossConfig(Settings):
    """The settings of every loss: how it is summed, and when a step is refused."""

    reduction: Literal["sum", "token_mean"] = Field(
        default="sum", description="sum over tokens, mean over trajectories: eq 6"
    )
    nonfinite: Literal["raise", "mask"] = Field(
        default="raise", description="what happens to a log-prob that is nan or inf"
    )
    ratio_tolerance: Number | None = Field(
        default=None,
        gt=0,
        description="nats by which a log-prob may be off right after sampling, in bfloat16 those of a "
        "response on the average, and a single one by five times as much; none: 1e-3 in float32, 0.1 in "
        "bfloat16",
    )

    @property
    def clip(self) -> tuple[float, float] | None:
        """(low, high): how far the ratio may leave 1; None for no clipping."""
        return None

    @property
    def importance_limit(self) -> float | None:
        """The cap of the importance weights between sampler and trainer; None for no weights."""
        return None


class SurrogateLossConfig(LossConfig):
    """A loss on the ratio of each token's probability to that before the update."""

    clip_low: Number | None = Field(
        default=None, gt=0, lt=1, description="the ratio is held above 1 - clip_low; none: eq 6, unclipped"
    )
    clip_high: Number | None = Field(
        default=None, gt=0, description="the ratio is held below 1 + clip_high; none: as clip_low"
    )

    @model_validator(mode="after")
    def _check_clip(self) -> Self:
        need(
            self.clip_high is None or self.clip_low is not None,
            "clip_high without loss.clip_low: set both, or clip_low alone for a symmetric clip",
        )
        return self

    @property
    def clip(self) -> tuple[float, float] | None:
        if self.clip_low is None:
            return None
        return self.clip_low, self.clip_low if self.clip_high is None else self.clip_high


class OnPolicyLossConfig(SurrogateLossConfig):
    """A surrogate on rollouts, which another engine may have sampled."""

    max_importance_weight: Number | None = Field(
        default=None,
        ge=1,
        description="limit of the weights where sampler and trainer differ; none turns the weights off",
    )

    @property
    def importance_limit(self) -> float | None:
        return self.max_importance_weight


class VideoOPDLossConfig(OnPolicyLossConfig):
    """Video-OPD's surrogate (eq 6), or the analytic reverse KL."""

    estimator: Literal["sampled", "full", "topk"] = Field(
        default="sampled", description="eq 5; beyond the paper, full and topk take the analytic KL"
    )
    top_k: int = Field(
        default=64, ge=1, description="tokens that estimator topk keeps apart; the rest counts as one"
    )
    baseline: Literal["none", "kl"] = Field(
        default="none", description="kl: r_t less its expectation at the state, a control variate"
    )


class GRPOLossConfig(OnPolicyLossConfig):
    """GRPO's surrogate, and its KL penalty (eq 1)."""

    kl_beta: Number = Field(
        default=0.0, ge=0, description="weight of the KL to the reference, the initial student; eq 1"
    )


class RewardConfig(Settings):
    """The reward of a whole response."""

    iou: Literal["timestamp_aware", "plain"] = Field(
        default="timestamp_aware", description="overlap with the annotation; Time-R1's, sec. 2.2"
    )
    iou_weight: Number = Field(default=1.0, ge=0, description="weight of the overlap; ours")
    format_weight: Number = Field(
        default=0.0,
        ge=0,
        description="weight of the answer format; ours: off; TVG-R1 takes 0.1 beside an iou_weight of 0.9",
    )
    function: str | None = Field(
        default=None, description="package.module:function or file.py:function, in place of all above"
    )
    normalise_std: bool = Field(
        default=True, description="divide by the group's standard deviation, eq 2; false: only centre"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        need(
            self.iou_weight + self.format_weight > 0,
            "iou_weight and reward.format_weight are both 0: a reward needs at least one, not both 0",
        )
        need(
            self.function is None or ":" in self.function,
            f"function {self.function!r}: write package.module:function or file.py:function",
        )
        return self
