"""A checkpoint that is ready to answer questions about videos: the model and the form of its inputs.

The form of the inputs is the video budget and the prompt. A model folder that ``video-opd train`` wrote
records both in ``video_opd.json``; other checkpoints get the defaults. ``--model.*``, ``--video.*`` and
``--prompt.*`` on the command line override either.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from pydantic import model_validator

from video_opd.config import (
    Dtype,
    ModelConfig,
    PromptConfig,
    Quantization,
    Recipe,
    Settings,
    TeacherConfig,
    VideoConfig,
    VideoForm,
    VLLMConfig,
    read_settings,
)
from video_opd.config.largest_video import largest_video
from video_opd.config.method_sections import check_placement
from video_opd.config.sections import EngineName, Placement
from video_opd.config.settings import Number, Texts
from video_opd.config.tree import apply_overrides
from video_opd.errors import UserError, need
from video_opd.files import read_text
from video_opd.jsonl import no_key_twice
from video_opd.models.checkpoint_files import adapter_base, find_file, is_adapter_folder
from video_opd.processes import launched_count
from video_opd.progress import log

if TYPE_CHECKING:
    from typing_extensions import Self

    from video_opd.data.encode import PromptEncoder
    from video_opd.models.policy import HFPolicy
    from video_opd.models.vllm_policy import VLLMPolicy
    from video_opd.models.vocabulary import Vocabulary
    from video_opd.types import EncodedPrompt, Sample


TEXT_AND_RESPONSE_TOKENS = 4096  # that vLLM makes room for, if --vllm.max_tokens says nothing else
SETTINGS_FILE = "video_opd.json"  # in a model folder, it holds the video budget and prompt of its training


class InferenceConfig(Settings):
    """Three sections of a recipe: how a model is run, how a video is sampled, and how a question is asked;
    and how vLLM runs the model, where it does."""

    model: ModelConfig = ModelConfig()
    video: VideoConfig = VideoConfig()
    prompt: PromptConfig = PromptConfig()
    vllm: VLLMConfig = VLLMConfig()


class TeacherInferenceConfig(InferenceConfig):
    """The settings of a teacher, which is given what its student is given."""

    other_template: bool = False  # whether its chat template may write other prompts
    quantization: Quantization | None = None  # the type of its linear layers' weights; None: model.dtype
    sharded: bool = False  # over the processes
    served: TeacherConfig | None = None  # its section of the recipe, if servers hold it


class InputProtocol(Protocol):
    """The fields of an evaluation protocol that decide a model's inputs (``evaluation/protocols.py``)."""

    @property
    def name(self) -> str: ...

    @property
    def prompt_style(self) -> str: ...

    @property
    def video(self) -> VideoConfig: ...


Config = TypeVar("Config", bound=InferenceConfig)
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_inference_config(
    path: str,
    overrides: Sequence[str],
    protocol: InputProtocol | None = None,
    device: str | None = None,
) -> InferenceConfig:
    """The settings that the model folder ``path`` records, changed by ``overrides``.

    A ``protocol`` decides the prompt style; its video budget is used if the folder records none. If the
    folder records no precision, the model is run in bfloat16 on a GPU and in float32 on a CPU (``device``, as
    in :func:`load_inference_model`). Raises UserError for an unknown key, and for a prompt style that is not
    the protocol's.
    """
    return _read(InferenceConfig, path, overrides, protocol, device)


def _read(
    kind: type[Config],
    path: str,
    overrides: Sequence[str],
    protocol: InputProtocol | None,
    device: str | None,
) -> Config:
    saved = read_saved_settings(path) or {}
    tree: dict[str, Any] = {name: saved[name] for name in ("video", "prompt") if name in saved}
    model = {"path": path} | ({"dtype": saved["dtype"]} if "dtype" in saved else {})
    if protocol is not None:
        tree.setdefault("video", protocol.video.model_dump())
        if isinstance(prompt := tree.get("prompt") or {}, Mapping):  # read_settings reports anything else
            tree["prompt"] = {**prompt, "style": protocol.prompt_style}
    tree = apply_overrides({**tree, "model": model}, overrides)
    config = read_settings(kind, tree)
    if "dtype" not in tree["model"] and chosen_device(device).startswith("cuda"):
        config = config.changed(**{"model.dtype": "bfloat16"})
    if protocol is not None and config.prompt.style != protocol.prompt_style:
        raise UserError(
            f"--prompt.style {config.prompt.style} is not how protocol {protocol.name} asks: leave out either"
        )
    form = choose_video_form(config.prompt, path)
    return config if form == config.prompt.video_form else config.changed(**{"prompt.video_form": form})


class _TeacherModel(Settings):
    """The settings in which a teacher may differ from its student."""

    dtype: Dtype | None = None  # None: the student's dtype
    other_template: bool = False
    quantization: Quantization | None = None
    placement: Placement = "auto"
    urls: Texts = ()
    fingerprint: str | None = None
    send: Literal["value", "reference"] = "value"
    wait_s: Number = 3600.0

    @model_validator(mode="after")
    def _check_placement(self) -> Self:
        check_placement(self.placement, self.quantization)
        return self


class _PairConfig(InferenceConfig):
    teacher: _TeacherModel = _TeacherModel()


def read_inference_pair(
    student: str, teacher: str | None, overrides: Sequence[str], device: str | None = None
) -> tuple[InferenceConfig, TeacherInferenceConfig | None]:
    """The settings of a student and, if one is named, of a teacher that is given the same inputs.

    ``overrides`` may contain ``--teacher.dtype``, which is ``model.dtype`` by default,
    ``--teacher.quantization``, ``--teacher.placement``, ``--teacher.other_template``, and the servers that
    hold it: ``--teacher.urls``, ``--teacher.fingerprint``, ``--teacher.send``, ``--teacher.wait_s``.
    """
    pair = _read(_PairConfig, student, overrides, None, device)
    own = InferenceConfig(model=pair.model, video=pair.video, prompt=pair.prompt)
    asked = pair.teacher
    need(
        bool(asked.urls) or asked.fingerprint is None,
        "teacher.fingerprint belongs to teacher.urls: name the servers, or leave it out",
    )
    if teacher is None and not asked.urls:
        return own, None
    return own, teacher_config(own, teacher or "", pair.teacher)


def teacher_config(
    student: InferenceConfig, path: str, teacher: TeacherConfig | _TeacherModel
) -> TeacherInferenceConfig:
    """The settings of the teacher ``path`` that is given what ``student`` is given."""
    dtype = teacher.dtype or student.model.dtype
    shown = student.changed(**{"model.path": path or student.model.path, "model.dtype": dtype})
    served = None
    if teacher.urls:
        names = ("quantization", "other_template", "urls", "fingerprint", "send", "wait_s")
        tree = {name: getattr(teacher, name) for name in names}
        served = read_settings(TeacherConfig, {**tree, "path": path, "dtype": dtype})
    return TeacherInferenceConfig(
        **dict(shown),
        other_template=teacher.other_template,
        quantization=teacher.quantization,
        sharded=teacher.placement == "sharded",
        served=served,
    )


def read_saved_settings(path: str | Path) -> dict[str, Any] | None:
    """The content of ``video_opd.json`` of a model folder or of a model on a hub.

    None for a stock checkpoint, which has none.
    """
    file = find_file(path, SETTINGS_FILE)
    if file is None:
        return None
    try:
        settings = json.loads(read_text(file), object_pairs_hook=no_key_twice)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); delete it to use the defaults") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: not an object of settings; delete it to use the defaults")
    return settings


def choose_video_form(prompt: PromptConfig, path: str | Path) -> VideoForm:
    """The form in which the model ``path`` is shown a video: ``prompt.video_form`` or, without it, its own.

    It logs a form that is not the model's own.
    """
    own = trained_video_form(path)
    if prompt.video_form not in (None, own):
        _log_once(
            f"{path}: trained with prompt.video_form {own}, and it is shown {prompt.video_form}: its first "
            "time stamp stands behind another token than in its training"
        )
    return prompt.video_form or own


def with_video_form(recipe: AnyRecipe) -> AnyRecipe:
    """The recipe with :func:`choose_video_form` of its student, so that what it writes can name the form."""
    form = choose_video_form(recipe.prompt, recipe.model.path)
    return recipe if form == recipe.prompt.video_form else recipe.changed(**{"prompt.video_form": form})


def trained_video_form(path: str | Path) -> VideoForm:
    """The form in which a model was shown its videos.

    Qwen's checkpoints, which have no ``video_opd.json``, were trained with ``release``. A ``video_opd.json``
    without the form was written when this project knew ``nested`` alone.
    """
    saved = read_saved_settings(path)
    if saved is None and is_adapter_folder(path) and (base := adapter_base(path)):
        saved = read_saved_settings(base)
    if saved is None:
        return "release"
    prompt = saved.get("prompt")
    return read_settings(PromptConfig, prompt).video_form or "nested" if prompt else "nested"


def log_other_video_form(form: VideoForm | None, teacher: str | Path) -> None:
    """Logs, once, that a teacher is shown another form of a video (its student's) than in its training."""
    if form not in (None, own := trained_video_form(teacher)):
        _log_once(
            f"teacher {teacher}: trained with prompt.video_form {own}; it scores the student's prompts, "
            f"whose form is {form}: the same tokens but for two around the video"
        )


@functools.cache
def _log_once(message: str) -> None:
    log(message)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What a checkpoint is given: prompts that ``encoder`` makes of videos within ``budget``. No weights.

    ``workers`` threads decode videos while a model answers. ``cache_dir`` keeps decoded clips, so that
    several models that are given the same videos decode them once.
    """

    config: InferenceConfig
    encoder: PromptEncoder
    budget: VideoConfig
    cache_dir: Path | None = None
    workers: int = 2
    engine: EngineName = "hf"  # that answers

    def provenance(self) -> dict[str, Any]:
        """Returns everything about the model that its responses depend on."""
        from video_opd.models.fingerprint import model_fingerprint

        return {
            "model": model_fingerprint(self.config.model.path),
            "dtype": self.config.model.dtype,
            "input": {"video": self.config.video.model_dump(), "prompt": self.config.prompt.model_dump()},
            # Notes of our own engine's responses stay as they were.
            **({} if self.engine == "hf" else {"engine": self.engine}),
        }

    def prompts(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, EncodedPrompt]]:
        """Yields each sample with its prompt, in order; videos are decoded in the background.

        A sample whose video or query fails is left out. The log names it when all others have been yielded.
        """
        from video_opd.data.loader import PromptLoader

        loader = PromptLoader(
            samples,
            self.encoder,
            self.budget,
            workers=self.workers,
            max_failed_share=1.0,  # the caller reports missing rows and goes on with the others
            backend=self.config.video.backend,
            cache_dir=self.cache_dir,
        )
        yield from loader
        for sample, reason in loader.skipped:
            log(f"left out {sample.id}: {reason}")


@dataclass(frozen=True, kw_only=True)
class InferenceModel(ModelInputs):
    """A loaded checkpoint: ``policy`` answers the prompts."""

    policy: HFPolicy

    def with_prompt_style(self, style: str) -> InferenceModel:
        """The same model with another prompt style. Raises UserError for an unknown style."""
        from video_opd.data.encode import PromptEncoder

        if style == self.config.prompt.style:
            return self
        config = self.config.changed(**{"prompt.style": style})
        return replace(self, config=config, encoder=PromptEncoder(self.policy.processor, config.prompt))


def load_model_inputs(
    config: InferenceConfig,
    cache_dir: str | Path | None = None,
    *,
    keep_clips: bool = False,
    engine: EngineName = "hf",
) -> ModelInputs:
    """The inputs of the checkpoint ``config.model.path``, whose weights are not read.

    With ``keep_clips`` each prompt carries its clip, for servers; for vLLM it always does. Raises UserError
    if it has no Qwen3-VL processor.
    """
    from video_opd.data.encode import PromptEncoder
    from video_opd.models.loading import load_processor

    keep_clips = keep_clips or engine == "vllm"
    return ModelInputs(
        config=config,
        encoder=PromptEncoder(load_processor(config.model.path), config.prompt, keep_clips=keep_clips),
        budget=config.video,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        engine=engine,
    )


def load_inference_model(
    config: InferenceConfig, device: str | None = None, cache_dir: str | Path | None = None
) -> InferenceModel:
    """Loads the checkpoint ``config.model.path`` on ``device``.

    Without ``device`` it is loaded on this process's GPU or, if there is none, on the CPU. Raises UserError
    if ``config.model.path`` is not a Qwen3-VL checkpoint.
    """
    from video_opd.data.encode import PromptEncoder

    policy = _load_policy(config, device)
    return InferenceModel(
        config=config,
        policy=policy,
        encoder=PromptEncoder(policy.processor, config.prompt),
        budget=config.video,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )


@dataclass(frozen=True, kw_only=True)
class VLLMModel(ModelInputs):
    """A checkpoint that vLLM runs."""

    policy: VLLMPolicy


def load_vllm_model(
    config: InferenceConfig, device: str | None = None, cache_dir: str | Path | None = None
) -> VLLMModel:
    """The same for vLLM. Raises UserError for an adapter, and where vLLM is not installed."""
    inputs = load_model_inputs(config, cache_dir, engine="vllm")
    shared = {spec.name: getattr(inputs, spec.name) for spec in fields(inputs)}
    return VLLMModel(policy=load_vllm_policy(config, device), **shared)


def load_vllm_policy(
    config: InferenceConfig, device: str | None, vocabulary: Vocabulary | None = None
) -> VLLMPolicy:
    """The checkpoint as vLLM runs it, when it is first asked. ``vocabulary``: the student's, if it is another
    model; None: the checkpoint's own. Raises UserError for an adapter, and where vLLM is not installed."""
    from video_opd.models.loading import load_processor, read_model_configs
    from video_opd.models.vllm_policy import VLLMPolicy
    from video_opd.models.vocabulary import Vocabulary

    path = config.model.path
    need(not is_adapter_folder(path), f"{path} is an adapter, and vLLM takes whole models: merge it first")
    need(
        launched_count() == 1,
        "--engine vllm with several processes: start one, which divides the model by --vllm.gpus N",
    )
    need(
        device in (None, "cpu", "cuda"),
        f"--device {device} with --engine vllm: choose its GPUs by the variable CUDA_VISIBLE_DEVICES",
    )
    form, processor = read_model_configs(path), load_processor(path)
    longest = config.vllm.max_tokens or longest_tokens(config.video)
    most = min(longest, form.config.text_config.max_position_embeddings)
    settings = config.vllm.changed(max_tokens=most)
    return VLLMPolicy(
        path,
        processor,
        vocabulary or Vocabulary.of(form, processor),
        dtype=config.model.dtype,
        settings=settings,
        reference=lambda writable: _load_policy(config, device, writable),
    )


def longest_tokens(video: VideoConfig) -> int:
    """Tokens of the longest prompt that the budget allows, and of its text and response."""
    return largest_video(video).prompt_tokens + TEXT_AND_RESPONSE_TOKENS


def _load_policy(
    config: InferenceConfig, device: str | None, vocabulary: Vocabulary | None = None
) -> HFPolicy:
    from video_opd.models.loading import load_model
    from video_opd.models.policy import HFPolicy

    settings = config.model
    loaded = load_model(settings.path, dtype=settings.dtype, device=chosen_device(device), attn=settings.attn)
    return HFPolicy(*loaded, settings.engine, vocabulary=vocabulary)


def chosen_device(device: str | None) -> str:
    """The device that is asked for or, without it, this process's GPU or the CPU."""
    import torch

    if device is not None:
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
