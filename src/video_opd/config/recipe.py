"""A recipe: one class a method, so that a setting which means nothing to a method is no field of it.

Code for one method takes that method's class (:class:`VideoOPDRecipe`, :class:`GRPORecipe`, …). Code for all
methods, such as the training loop, takes a :class:`Recipe` and asks its properties.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from video_opd.config.messages import leaves, one_line, section_of, unknown_key
from video_opd.config.method_sections import (
    DistillationTeacherConfig,
    GRPOLossConfig,
    GRPOSamplingConfig,
    LossConfig,
    OnPolicyLossConfig,
    OnPolicySamplingConfig,
    RewardConfig,
    SamplingConfig,
    ScaledTeacherConfig,
    SurrogateLossConfig,
    TeacherConfig,
    VideoOPDLossConfig,
    check_shards,
)
from video_opd.config.sections import (
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    RoundsConfig,
    RunConfig,
    TVDFConfig,
    VideoConfig,
)
from video_opd.config.settings import Settings
from video_opd.config.tree import MAX_LETTERS, apply_overrides, dump_yaml, parse_yaml
from video_opd.errors import UserError, need
from video_opd.seeds import LARGEST_SEED

if TYPE_CHECKING:
    from typing_extensions import Self

MethodName = Literal["video-opd", "grpo", "sft", "op-rkd", "op-fkd"]


# Nats that rounding is allowed: in float32 of every token, in bfloat16 of a response's tokens on the average
# (docs/models.md, "Precision and wrappers").
RATIO_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


UNLIMITED_THINKING = (
    "prompt.thinking without a length limit: reasoning has no natural end, so set sampling.max_new_tokens "
    "(the paper's responses without it have about a dozen tokens)"
)


class Recipe(Settings):
    """One run, completely: the same recipe on the same machine, with the same number of threads, gives the
    same weights."""

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

    @model_validator(mode="wrap")
    @classmethod
    def _complete(cls, tree: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(tree, Mapping):
            return check(tree)
        tree = {"data": None, **_without_neutral(cls, tree)}
        length = _section_keys(tree, "sampling").get("max_new_tokens")
        given = _section_keys(tree, "evaluate")
        if length is None or "max_new_tokens" in given or not isinstance(tree.get("evaluate") or {}, Mapping):
            return check(tree)
        recipe = check({**tree, "evaluate": {**given, "max_new_tokens": length}})
        recipe.evaluate.model_fields_set.discard("max_new_tokens")  # it follows from the other, in copies too
        return recipe

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        both = sorted(set(self.lora.parts) & set(self.model.freeze))
        need(
            not both,
            f"{', '.join(both)} stands in lora.parts and in model.freeze: adapters train a part, so take it "
            "out of one of them",
        )
        self._check_types()
        return self

    def _check_types(self) -> None:
        model, moments = self.model, self.optim.moments
        if model.weights == "bfloat16":
            need(
                model.dtype == "bfloat16",
                "model.weights bfloat16 with model.dtype float32: set both to bfloat16, because computing "
                "in float32 needs a float32 copy of the weights",
            )
            need(
                not self.lora.parts,
                "model.weights bfloat16 with lora.parts: adapters are float32, and the frozen base is held "
                "in model.dtype already; leave model.weights out",
            )
            need(
                model.sharding is None,
                f"model.weights bfloat16 with model.sharding {model.sharding}: it shards float32 weights; "
                "leave out one of them",
            )
            need(
                not self.optim.offload,
                "model.weights bfloat16 with optim.offload: that holds float32 weights on the CPU; leave out "
                "one of them",
            )
        if (base := self.lora.base_quantization) is not None:
            need(
                bool(self.lora.parts),
                f"lora.base_quantization {base} without lora.parts: only a frozen base can be quantised; "
                "name the parts that get adapters",
            )
            need(
                model.sharding is None,
                f"lora.base_quantization {base} with model.sharding {model.sharding}: quantised weights are "
                "not sharded; leave out one of them",
            )
        need(
            moments == "float32" or not self.optim.offload,
            f"optim.moments {moments} with optim.offload: moments on the CPU are float32; leave out one of "
            "them",
        )
        need(
            moments == "float32" or model.sharding is None,
            f"optim.moments {moments} with model.sharding {model.sharding}: blocks of moments would cross "
            "the borders of shards; leave out one of them",
        )

    # The training loop asks these of every method's recipe.

    @property
    def asks_servers(self) -> bool:
        """Whether the teacher that training needs is in other processes, which are sent what it scores."""
        return False

    @property
    def holds_served_head(self) -> bool:
        """Whether the run applies the ``lm_head`` of the teacher in other processes to its hidden states."""
        return False

    @property
    def samples_with_vllm(self) -> bool:
        """Whether vLLM samples, with the student's weights."""
        return False

    @property
    def vllm_share(self) -> float:
        """The share of each GPU that it takes."""
        return 0.0

    @property
    def keeps_clips(self) -> bool:
        """Whether prompts carry their clips, for whoever makes its own tensors of them."""
        return self.asks_servers or self.samples_with_vllm

    @property
    def overlaps_servers(self) -> bool:
        """Whether the student samples while these score."""
        return False

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
    def needs_distributions(self) -> bool:
        """Whether the method computes with whole distributions at response tokens."""
        return False

    @property
    def computes_distributions(self) -> bool:
        """Whether the method or the metrics do."""
        return self.needs_distributions or self.measures_analytic_kl

    @property
    def asks_reference(self) -> bool:
        """Whether the method asks the initial student."""
        return False

    def videos_ahead(self, processes: int) -> int:
        """How many videos a process decodes ahead: as ``data.prefetch`` says, or those of its share of a
        batch or of a batch that it evaluates."""
        share = math.ceil(self.optim.batch_size / processes)
        return self.data.prefetch or max(share, self.evaluate.batch_size)

    @property
    def ratio_tolerance(self) -> float:
        """Largest |log π_θ − log π_old| in nats on the update that follows sampling, where it is 0 but for
        rounding: of each token or, in low precision, of a response's tokens on the average."""
        if self.loss.ratio_tolerance is not None:
            return self.loss.ratio_tolerance
        return RATIO_TOLERANCE[self.model.dtype]

    @property
    def low_precision(self) -> bool:
        """Whether the student computes in fewer bits than float32."""
        return self.model.dtype != "float32"

    def check_processes(self, count: int) -> None:
        """Raises :class:`UserError` for settings that cannot work with ``count`` processes."""
        check_shards(self.teacher.placement == "sharded", count)
        if count == 1:
            return
        need(
            self.model.sharding is not None or not self.optim.offload,
            f"optim.offload with {count} processes needs model.sharding fsdp2: otherwise each of them would "
            "hold all masters and moments on the CPU",
        )
        need(
            self.model.weights != "bfloat16",
            f"model.weights bfloat16 with {count} processes: their gradients would be exchanged in "
            "bfloat16; use one process, or model.weights float32 with model.sharding fsdp2",
        )
        need(
            not self.samples_with_vllm,
            f"sampling.engine vllm with {count} processes: it samples for one; leave it out, or use one",
        )

    def check_rounds(self) -> None:
        """Raises :class:`UserError` for what ``rounds`` needs beyond ``train``."""
        need(
            self.teacher.named or not self.tvdf.asks_teacher,
            f"teacher.path is missing: tvdf.strategy {self.tvdf.strategy} asks a teacher; name its folder, "
            "or use strategy gaussian without a gate, which needs none",
        )
        last = self.run.seed + self.rounds.count - 1
        need(
            last <= LARGEST_SEED,
            f"run.seed {self.run.seed} with {self.rounds.count} rounds: the last of them would train with "
            f"seed {last}, and a seed is at most {LARGEST_SEED}",
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
            not self.prompt.thinking or "max_new_tokens" in self.sampling.model_fields_set, UNLIMITED_THINKING
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
        together = self.optim.batch_size if self.samples_with_vllm else None
        return self.sampling.micro_batch_size or together

    @property
    def samples_with_vllm(self) -> bool:
        return self.sampling.engine == "vllm"

    @property
    def vllm_share(self) -> float:
        return self.sampling.vllm_memory if self.samples_with_vllm else 0.0

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        if self.samples_with_vllm:
            need(
                self.loss.importance_limit is not None,
                "sampling.engine vllm rounds otherwise than the trainer: give each token its weight, for "
                "example loss.max_importance_weight 2",
            )
            need(
                self.lora.base_quantization is None,
                f"sampling.engine vllm with lora.base_quantization {self.lora.base_quantization}: it takes "
                "whole weights; leave out one of them",
            )
            need(
                self.model.sharding is None,
                f"sampling.engine vllm with model.sharding {self.model.sharding}: it takes whole weights "
                "from one process; leave out one of them",
            )
        return self


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
        teacher = self.teacher
        need(
            teacher.named,
            f"teacher.path is missing: method {self.method} learns from a teacher; name its folder",
        )
        return self

    @property
    def asks_servers(self) -> bool:
        return bool(self.teacher.urls)

    @property
    def holds_served_head(self) -> bool:
        return self.asks_servers and self.computes_distributions and self.teacher.receive == "hidden"

    @property
    def overlaps_servers(self) -> bool:
        return self.asks_servers and self.teacher.overlap

    def _refuse_without_distributions(self, what: str) -> None:
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
            "teacher.by_source: a selection asks one teacher about the whole pool; run the rounds for each "
            "source with its own teacher.path",
        )


class VideoOPDRecipe(OnPolicyRecipe, DistillationRecipe):
    """The student samples, and the teacher scores every token (eqs 4–6)."""

    method: Literal["video-opd"] = "video-opd"
    teacher: ScaledTeacherConfig = Field(default_factory=ScaledTeacherConfig)
    loss: VideoOPDLossConfig = Field(default_factory=VideoOPDLossConfig)

    @property
    def needs_distributions(self) -> bool:
        return self.loss.estimator != "sampled" or self.loss.baseline == "kl"

    @property
    def asks_reference(self) -> bool:
        return self.teacher.reward_scale != 1

    @model_validator(mode="after")
    def _check_estimator(self) -> Self:
        # A sharpened distribution would have its own log-probs at the update, but not the teacher's.
        self._need_plain("temperature", 1.0)
        loss, scale = self.loss, self.teacher.reward_scale
        if loss.estimator != "sampled":
            self._refuse_without_distributions(f"loss.estimator {loss.estimator}")
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
            self._refuse_without_distributions("loss.baseline kl")
            need(
                scale == 1,
                "loss.baseline kl is the expectation of eq 5's r_t: it needs teacher.reward_scale 1",
            )
        return self


class GRPORecipe(OnPolicyRecipe):
    """The student samples in groups, and a reward scores whole responses (eqs 1–3)."""

    method: Literal["grpo"]
    sampling: GRPOSamplingConfig = Field(default_factory=GRPOSamplingConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    loss: GRPOLossConfig = Field(default_factory=GRPOLossConfig)

    @property
    def asks_reference(self) -> bool:
        return self.loss.kl_beta > 0

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        need(
            self.sampling.rollouts >= 2,
            f"sampling.rollouts {self.sampling.rollouts} with method grpo: a reward is compared within its "
            "group (eq 2), which needs at least 2; the paper takes 8",
        )
        return self


class SFTRecipe(OffPolicyRecipe):
    """The likelihood of the annotation (sec. 2.1)."""

    method: Literal["sft"]


class OPRKDRecipe(OffPolicyRecipe, DistillationRecipe):
    """The teacher scores every token of the annotation (sec. C.1)."""

    method: Literal["op-rkd"]
    teacher: ScaledTeacherConfig = Field(default_factory=ScaledTeacherConfig)
    loss: SurrogateLossConfig = Field(default_factory=SurrogateLossConfig)

    @property
    def asks_reference(self) -> bool:
        return self.teacher.reward_scale != 1


class OPFKDRecipe(OffPolicyRecipe, DistillationRecipe):
    """The teacher's distributions on the annotation are imitated (sec. C.2)."""

    method: Literal["op-fkd"]
    teacher: DistillationTeacherConfig = Field(default_factory=DistillationTeacherConfig)

    @property
    def needs_distributions(self) -> bool:
        return True

    @model_validator(mode="after")
    def _check_distributions(self) -> Self:
        self._refuse_without_distributions("method op-fkd")
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


# ------------------------------------------------------------------------------------- keys of other methods


@functools.cache
def _keys_of_methods() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """By key: the value that changes nothing (the first method's default), and the methods that have it."""
    by_method = {method: leaves(kind) for method, kind in METHODS.items()}
    return {
        key: (
            field.get_default(call_default_factory=True, validated_data={}),
            tuple(method for method, keys in by_method.items() if key in keys),
        )
        for key, field in leaves(*METHODS.values()).items()
    }


def _without_neutral(kind: type[Recipe], tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` without the keys of other methods, which must hold the value that changes nothing.

    The ``recipe.yaml`` of earlier versions has every key of every method.
    """
    method = next(name for name, known in METHODS.items() if known is kind)
    own, others = leaves(kind), _keys_of_methods()
    result: dict[str, Any] = {}
    for name, section in tree.items():
        foreign = _foreign_section(kind, name)
        if not isinstance(section, Mapping):
            need(foreign is None or section is None, f"{name} must be a section of keys, not {section!r}")
            kept = section
        else:
            kept = {}
            for key, value in section.items():
                if f"{name}.{key}" in own or f"{name}.{key}" not in others:
                    kept[key] = value
                else:
                    _need_neutral(f"{name}.{key}", value, method)
        if foreign is None:
            result[name] = kept
        elif kept:
            raise UserError(unknown_key(f"{name}.{next(iter(kept))}", foreign, list(METHODS.values())))
    return result


def _foreign_section(kind: type[Recipe], name: str) -> type[BaseModel] | None:
    """The class of a section that only other methods have; None for any other name."""
    if name in kind.model_fields:
        return None
    found = (known.model_fields[name] for known in METHODS.values() if name in known.model_fields)
    return next((section_of(field) for field in found), None)


def _need_neutral(key: str, value: Any, method: str) -> None:
    neutral, methods = _keys_of_methods()[key]
    if value == (list(neutral) if isinstance(neutral, tuple) else neutral):  # files have lists
        return
    if key == "sampling.rollouts":
        raise UserError(
            f"{key} {value} with method {method}: an annotation is one trajectory, so leave it at {neutral}"
        )
    raise UserError(f"{key} means nothing to method {method} (only to {', '.join(methods)}): take it out")


def _section_keys(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The keys of a section of an unchecked tree; none if it is no section, which is refused later."""
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


# ------------------------------------------------------------------------------------------ reading, writing


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, then applies ``--a.b value`` (or ``--a.b=value``) pairs.

    Raises :class:`UserError` for a missing or broken file, an unknown key, a wrong type or settings that
    cannot work together.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:  # a pipe will do
            text = file.read(MAX_LETTERS + 1)
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}; name a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 at byte {error.start}; name a YAML file") from error
    tree = parse_yaml(text, str(path))
    tree = {} if tree is None else tree
    need(isinstance(tree, dict), f"recipe {path}: expected sections such as 'optim:', not a bare value")
    return recipe_from_dict(tree, str(path), overrides)


def recipe_from_dict(tree: Mapping[str, Any], where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that nested mappings spell, of the class of its method, after ``--a.b value`` pairs.

    ``where`` opens every message.
    """
    try:
        recipe = ANY_RECIPE.validate_python({"method": "video-opd", **apply_overrides(tree, overrides)})
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, METHODS)}") from error
    if recipe.prompt.thinking and not _section_keys(tree, "prompt").get("thinking"):
        # In the recipe.yaml of a run, the limit of answers without reasoning looks as if it had been set.
        given = _section_keys(apply_overrides({}, overrides), "sampling")
        usual = type(recipe.sampling).model_fields["max_new_tokens"].default
        need(
            "max_new_tokens" in given or recipe.sampling.max_new_tokens != usual,
            f"{where}: {UNLIMITED_THINKING}",
        )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, so that a later change of a default changes no old run."""
    return dump_yaml(recipe.to_dict())
