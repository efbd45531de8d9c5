"""A recipe: one class a method, so that a setting which means nothing to a method is no field of it.

Who reads a setting of one method has that method's class (``VideoOPDRecipe``, ``GRPORecipe``, …); the
training loop asks every recipe through the properties of :class:`Recipe`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from video_opd.config.messages import leaves, one_line, section_of, unknown_key
from video_opd.config.sections import (
    DataConfig,
    Dtype,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    RoundsConfig,
    RunConfig,
    TVDFConfig,
    VideoConfig,
    section_keys,
)
from video_opd.config.settings import Number, Settings, TextByText
from video_opd.config.tree import apply_overrides, parse_yaml
from video_opd.errors import UserError, need

if TYPE_CHECKING:
    from typing_extensions import Self

MethodName = Literal["video-opd", "grpo", "sft", "op-rkd", "op-fkd"]


# ------------------------------------------------------------------------------------------------ teacher


class TeacherConfig(Settings):
    """A frozen teacher. The paper's, Qwen3-VL-32B after GRPO (sec. 4.1), is not public: name yours.

    A method that does not learn from a teacher may name one for TVDF's scores and for comparison.
    """

    path: str = Field(default="", description="the teacher's folder")
    dtype: Dtype = Field(default="float32", description="type of its weights and computation; ours")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="prompts that the teacher, or the reference, scores together; none: as "
        "optim.micro_batch_size",
    )

    @property
    def paths(self) -> list[str]:
        """The folders of all teachers, each once."""
        return [self.path] if self.path else []


class DistillationTeacherConfig(TeacherConfig):
    """A teacher that the student learns from."""

    by_source: TextByText = Field(
        default_factory=dict,
        description="other teachers for rows of these sources: name a folder for each source",
    )
    distributions: bool = Field(
        default=True, description="false: the teacher gives the log-probs of written tokens only"
    )

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
    when its candidates are scored."""

    max_new_tokens: int = Field(
        default=64,
        ge=1,
        description="length limit; ours: an answer has about a dozen tokens; set it for thinking",
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


class GRPOSamplingConfig(OnPolicySamplingConfig):
    """Groups of rollouts, whose rewards are compared."""

    rollouts: int = Field(default=8, ge=1, description="rollouts of each prompt, a group; sec. 4.1")


# ------------------------------------------------------------------------------------------ loss and reward


class LossConfig(Settings):
    reduction: Literal["sum", "token_mean"] = Field(
        default="sum", description="sum over tokens, mean over trajectories: eq 6"
    )
    nonfinite: Literal["raise", "mask"] = Field(
        default="raise", description="what happens to a log-prob that is nan or inf"
    )
    ratio_tolerance: Number | None = Field(
        default=None, gt=0, description="largest |ratio - 1|; none: 1e-3 in float32, 0.5 in bfloat16"
    )

    @property
    def clip(self) -> tuple[float, float] | None:
        """(low, high): how far the ratio may leave 1; None for no clipping."""
        return None

    @property
    def importance_limit(self) -> float | None:
        """Where importance weights between sampler and trainer are cut off; None for no weights."""
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
    """A surrogate on rollouts."""

    max_importance_weight: Number | None = Field(
        default=None,
        ge=1,
        description="limit of the weights where sampler and trainer differ; none turns the weights off",
    )

    @property
    def importance_limit(self) -> float | None:
        return self.max_importance_weight


class VideoOPDLossConfig(OnPolicyLossConfig):
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


# ------------------------------------------------------------------------------------------------- recipes


class Recipe(Settings):
    """One run, completely: the same recipe on the same machine gives the same weights."""

    method: MethodName
    model: ModelConfig = Field(default_factory=ModelConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig
    video: VideoConfig = Field(default_factory=VideoConfig)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    tvdf: TVDFConfig = Field(default_factory=TVDFConfig)
    rounds: RoundsConfig = Field(default_factory=RoundsConfig)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        tree = {"data": None, **_without_neutral(cls, tree)}
        length = section_keys(tree, "sampling").get("max_new_tokens")
        if length is not None and isinstance(tree.get("evaluate") or {}, Mapping):
            tree["evaluate"] = {"max_new_tokens": length, **section_keys(tree, "evaluate")}
        return tree

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        both = sorted(set(self.lora.parts) & set(self.model.freeze))
        need(
            not both,
            f"{', '.join(both)} stands in lora.parts and in model.freeze: adapters train a part, so take it "
            "out of one of them",
        )
        return self

    # ---- what the training loop asks of every method's recipe

    @property
    def rollouts(self) -> int:
        """Trajectories of each prompt. Off policy, an annotation is one."""
        return 1

    @property
    def temperature(self) -> float:
        """The temperature at which trajectories are scored: that of their sampling."""
        return 1.0

    @property
    def sampling_micro_batch_size(self) -> int | None:
        """Prompts that are sampled together, before the update; None: with its micro-batches."""
        return None

    @property
    def measures_analytic_kl(self) -> bool:
        """Whether whole distributions are computed for the metrics."""
        return self.run.analytic_kl

    @property
    def ratio_tolerance(self) -> float:
        """Largest |π_θ/π_old − 1| on the update that follows sampling, where it is 1 but for rounding."""
        if self.loss.ratio_tolerance is not None:
            return self.loss.ratio_tolerance
        return 1e-3 if self.model.dtype == "float32" else 0.5

    def check_rounds(self) -> None:
        """Raises :class:`UserError` for what ``rounds`` needs beyond ``train``."""
        need(
            bool(self.teacher.path) or not self.tvdf.asks_teacher,
            f"teacher.path is missing: tvdf.strategy {self.tvdf.strategy} asks a teacher; name its folder, "
            "or use strategy gaussian without a gate, which needs none",
        )


class OnPolicyRecipe(Recipe):
    """The student samples what it is trained on."""

    sampling: OnPolicySamplingConfig = Field(default_factory=OnPolicySamplingConfig)
    loss: OnPolicyLossConfig = Field(default_factory=OnPolicyLossConfig)

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        """The sampled distribution must be the one that is scored again: one that was cut has no log-probs
        outside the cut."""
        need(
            not self.prompt.thinking or "max_new_tokens" in self.sampling.model_fields_set,
            "prompt.thinking without a length limit: reasoning has no natural end, so set "
            "sampling.max_new_tokens (the paper's answers without it have about a dozen tokens)",
        )
        self._need_plain("top_p", 1.0)
        self._need_plain("top_k", 0)
        return self

    def _need_plain(self, name: str, value: float) -> None:
        mine = getattr(self.sampling, name)
        need(
            mine == value,
            f"sampling.{name} {mine} with method {self.method}: its log-probs are those of the plain "
            f"distribution, so the student must be sampled plainly; set sampling.{name} to {value}",
        )

    @property
    def rollouts(self) -> int:
        return self.sampling.rollouts

    @property
    def temperature(self) -> float:
        return self.sampling.temperature

    @property
    def sampling_micro_batch_size(self) -> int | None:
        return self.sampling.micro_batch_size


class OffPolicyRecipe(Recipe):
    """The annotation, written as text, is what the student is trained on."""

    @model_validator(mode="after")
    def _check_thinking(self) -> Self:
        need(
            not self.prompt.thinking,
            f"prompt.thinking with method {self.method}: it trains on the annotation, which has no reasoning "
            "to imitate; use video-opd or grpo",
        )
        return self


class DistillationRecipe(Recipe):
    """The student learns from a teacher."""

    teacher: DistillationTeacherConfig = Field(default_factory=DistillationTeacherConfig)

    @model_validator(mode="after")
    def _check_teacher(self) -> Self:
        need(
            bool(self.teacher.path),
            f"teacher.path is missing: method {self.method} learns from a teacher; name its folder",
        )
        return self

    def _need_distributions(self, what: str) -> None:
        need(
            self.teacher.distributions,
            f"{what} needs the teacher's distributions, and teacher.distributions is false: use a teacher "
            "that gives them, or method video-opd with loss.estimator sampled",
        )

    @property
    def measures_analytic_kl(self) -> bool:
        return self.run.analytic_kl and self.teacher.distributions

    def check_rounds(self) -> None:
        super().check_rounds()
        need(
            not self.teacher.by_source or not self.tvdf.asks_teacher,
            "teacher.by_source: a selection asks one teacher about all candidates; run the rounds for each "
            "source with its own teacher.path",
        )


class VideoOPDRecipe(OnPolicyRecipe, DistillationRecipe):
    method: Literal["video-opd"] = "video-opd"
    teacher: ScaledTeacherConfig = Field(default_factory=ScaledTeacherConfig)
    loss: VideoOPDLossConfig = Field(default_factory=VideoOPDLossConfig)

    @model_validator(mode="after")
    def _check_estimator(self) -> Self:
        # A sharpened distribution would have its own log-probs at the update, but not the teacher's.
        self._need_plain("temperature", 1.0)
        loss, scale = self.loss, self.teacher.reward_scale
        if loss.estimator != "sampled":
            self._need_distributions(f"loss.estimator {loss.estimator}")
            for key, is_set in {
                "loss.baseline": loss.baseline != "none",
                "teacher.reward_scale": scale != 1,
                "loss.clip_low": loss.clip is not None,
                "loss.max_importance_weight": loss.max_importance_weight is not None,
            }.items():
                need(
                    not is_set,
                    f"{key} belongs to loss.estimator sampled; {loss.estimator} differentiates the KL itself",
                )
        if loss.baseline == "kl":
            self._need_distributions("loss.baseline kl")
            need(
                scale == 1,
                "loss.baseline kl is the expectation of eq 5's r_t: it needs teacher.reward_scale 1",
            )
        return self


class GRPORecipe(OnPolicyRecipe):
    method: Literal["grpo"]
    sampling: GRPOSamplingConfig = Field(default_factory=GRPOSamplingConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    loss: GRPOLossConfig = Field(default_factory=GRPOLossConfig)

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        need(
            self.sampling.rollouts >= 2,
            f"sampling.rollouts {self.sampling.rollouts} with method grpo: a reward is compared within its "
            "group (eq 2), which needs at least 2; the paper takes 8",
        )
        return self


class SFTRecipe(OffPolicyRecipe):
    method: Literal["sft"]


class OPRKDRecipe(OffPolicyRecipe, DistillationRecipe):
    method: Literal["op-rkd"]
    teacher: ScaledTeacherConfig = Field(default_factory=ScaledTeacherConfig)
    loss: SurrogateLossConfig = Field(default_factory=SurrogateLossConfig)


class OPFKDRecipe(OffPolicyRecipe, DistillationRecipe):
    method: Literal["op-fkd"]
    teacher: DistillationTeacherConfig = Field(default_factory=DistillationTeacherConfig)

    @model_validator(mode="after")
    def _check_distributions(self) -> Self:
        self._need_distributions("method op-fkd")
        return self


METHODS: dict[str, type[Recipe]] = {
    "video-opd": VideoOPDRecipe,
    "grpo": GRPORecipe,
    "sft": SFTRecipe,
    "op-rkd": OPRKDRecipe,
    "op-fkd": OPFKDRecipe,
}
WITH_TEACHER = tuple(name for name, kind in METHODS.items() if issubclass(kind, DistillationRecipe))
ANY_RECIPE: TypeAdapter[Recipe] = TypeAdapter(
    Annotated[
        VideoOPDRecipe | GRPORecipe | SFTRecipe | OPRKDRecipe | OPFKDRecipe, Field(discriminator="method")
    ]
)


# ---------------------------------------------------------------------------------------- settings of others


@functools.cache
def _keys_of_methods() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """By key: the value that changes nothing, and the methods that the key means something to."""
    by_method = {method: leaves(kind) for method, kind in METHODS.items()}
    return {
        key: (
            field.get_default(call_default_factory=True, validated_data={}),
            tuple(method for method, keys in by_method.items() if key in keys),
        )
        for key, field in leaves(*METHODS.values()).items()
    }


def _without_neutral(kind: type[Recipe], tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` without the keys of other methods, as long as they hold the value that changes nothing.

    The ``recipe.yaml`` of earlier versions has every key of every method. A key that holds another value is a
    :class:`UserError`.
    """
    method = next(name for name, known in METHODS.items() if known is kind)
    own, all_keys = leaves(kind), _keys_of_methods()
    result: dict[str, Any] = {}
    for name, section in tree.items():
        owner = next((known for known in METHODS.values() if name in known.model_fields), kind)
        foreign = name not in kind.model_fields and owner is not kind
        if not isinstance(section, Mapping):
            need(section is None or not foreign, f"{name} must be a section of keys, not {section!r}")
            if not foreign:
                result[name] = section
            continue
        kept = {}
        for key, value in section.items():
            path = f"{name}.{key}"
            if path in own or path not in all_keys:
                kept[key] = value
                continue
            neutral, methods = all_keys[path]
            need(
                value == neutral or path != "sampling.rollouts",
                f"{path} {value} with method {method}: an annotation is one trajectory, so leave it at 1",
            )
            need(
                value == neutral,
                f"{path} means nothing to method {method} (only to {', '.join(methods)}): take it out",
            )
        if not foreign:
            result[name] = kept
        elif kept:
            section_kind = section_of(owner.model_fields[name])
            assert section_kind is not None
            raise UserError(unknown_key(f"{name}.{next(iter(kept))}", section_kind, list(METHODS.values())))
    return result


# ------------------------------------------------------------------------------------------ reading, writing


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
    """The recipe that nested mappings spell, of the class of its method. ``where`` opens every message."""
    try:
        return ANY_RECIPE.validate_python({"method": "video-opd", **tree})
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, METHODS)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, so that a later change of a default changes no old run."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
