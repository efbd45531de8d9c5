"""Loads checkpoints, or says in one line why one cannot be loaded."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_opd.config import Quantization
from video_opd.errors import UserError
from video_opd.models.checkpoint_files import (
    FAMILIES,
    adapter_base,
    check_model_files,
    check_processor_files,
    is_adapter_folder,
    quantisation_of,
    stored_type,
    unquantised_name,
)
from video_opd.models.folder_trial import try_prompt
from video_opd.models.grouped_attention import use_grouped_heads
from video_opd.models.lora import load_adapter, merge_adapters
from video_opd.models.parts import cast_weights
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.quantisation import check_quantisation, quantise_frozen_layers
from video_opd.models.vision_attention import use_batched_frames
from video_opd.progress import log

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}  # float32 holds every number of these


def load_model(
    path: str | Path,
    dtype: str = "bfloat16",
    device: str | torch.device = "cpu",
    attn: str = "sdpa",
    *,
    trained: bool = False,
    as_stored: bool = False,
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """A Qwen3-VL model, dense or with experts, in evaluation mode, and the processor of its folder.

    ``path`` is a folder that ``save_pretrained`` wrote, or the name of a model on a hub. ``attn`` is any
    attention implementation of transformers. With ``sdpa``, the vision tower attends to all frames of a size
    in one call (:mod:`~video_opd.models.vision_attention`), and query heads that share keys attend to one
    copy of them (:mod:`~video_opd.models.grouped_attention`). Patches are embedded by a matrix product
    (:mod:`~video_opd.models.patch_embedding`).

    FP8 weights are dequantised into ``dtype`` while they are read; other quantised weights are refused.
    ``trained`` says that the weights will be, and then FP8 is refused, too.

    A float32 model of a checkpoint in 16 bits is read as it is stored, which takes no memory of the host's:
    processes share the pages of the file. Its weights are widened one by one, on ``device``. With
    ``as_stored`` they are not, and the caller widens them.

    Raises :class:`UserError` when something is missing, broken, or not Qwen3-VL.
    """
    import transformers

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    target = _usable_device(device)
    config = read_config(path)
    quantised = _check_quantisation(path, config, trained)
    wanted = DTYPES[dtype]
    narrow = _NARROW.get(stored_type(path) or "") if wanted is torch.float32 and not quantised else None
    processor = load_processor(path)
    _check_patches(path, config, processor)
    with no_library_bars(), no_library_warnings():  # a table of all names; see _check_names
        model, report = _read(
            path,
            "the weights",
            getattr(transformers, FAMILIES[config.model_type]).from_pretrained,
            config=config,
            dtype=narrow or wanted,
            attn_implementation=attn,
            output_loading_info=True,
            weights_only=True,  # of a pytorch_model.bin, which is a pickle: nothing but tensors
        )
    _check_names(path, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]))
    if quantised:
        cast_weights(model, wanted)  # what was quantised is bfloat16 until here
        log(f"{path}: its {quantised} weights are dequantised into {dtype}")
    _note_unfollowed(path, model.generation_config)
    use_batched_frames(model)
    use_grouped_heads(model)
    use_linear_patches(model)
    if narrow:
        for part in (model.config, model.config.text_config, model.config.vision_config):
            part.dtype = wanted
        if not as_stored:
            cast_weights(model, wanted, device=target)
    return model.to(target).eval(), processor


def release_memory() -> None:
    """Frees the memory of models that nothing refers to any more, before another one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_teacher(
    path: str | Path,
    dtype: str,
    device: str | torch.device,
    attn: str = "sdpa",
    quantization: Quantization | None = None,
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """A frozen model: a checkpoint as :func:`load_model` reads it, or an adapter merged into its base.

    With ``quantization`` (``teacher.quantization``), the model is read on the CPU, and its linear layers are
    quantised one at a time on ``device``, which never holds them in ``dtype``. Raises as
    :func:`check_teacher` and :func:`load_model` do.
    """
    check_teacher(path, quantization, device)
    target = _usable_device(device)
    adapted = is_adapter_folder(path)
    first = torch.device("cpu") if quantization is not None or adapted else target
    model, processor = load_model(str(adapter_base(path)) if adapted else path, dtype, first, attn)
    if adapted:
        load_adapter(model, path)
        merge_adapters(model, DTYPES[dtype])
    model.requires_grad_(False)
    if quantization is not None:
        count = quantise_frozen_layers(model, quantization, target)
        log(f"{path}: {count:,} of {model.num_parameters():,} weights are held in {quantization}")
    return model.to(target).eval(), processor


def check_teacher(path: str | Path, quantization: Quantization | None, device: str | torch.device) -> None:
    """Finds, before minutes are spent on loading a student, what :func:`load_teacher` would refuse later.

    Raises :class:`UserError` for a teacher that is missing or is no Qwen3-VL model, for an adapter whose base
    is not there, and for a ``teacher.quantization`` that this machine cannot compute.
    """
    if is_adapter_folder(path):
        base = adapter_base(path)
        if base is None:
            raise UserError(
                f"{path}: an adapter that does not say what it belongs to; set base_model_name_or_path in "
                "its adapter_config.json to that model's folder"
            )
        try:
            config = read_config(base)
        except UserError as error:
            raise UserError(f"{path}: an adapter, and its base cannot be read: {error}") from error
    else:
        config = read_config(path)
    if quantization is not None:
        check_quantisation(quantization, "teacher.quantization", _usable_device(device), config.model_type)


def _check_quantisation(path: str | Path, config: Any, trained: bool) -> str | None:
    """The method by which the weights are quantised; it is told to dequantise them. None if they are not."""
    method = quantisation_of(config)
    if method is None:
        return None
    if trained:
        raise UserError(
            f"{path}: its weights are quantised ({method}) and cannot be trained; give "
            f"{unquantised_name(path)} that it was made from"
        )
    if method != "fp8":
        raise UserError(
            f"{path}: its weights are quantised ({method}), and video-opd reads fp8 alone; give "
            f"{unquantised_name(path)} that it was made from, or its FP8 copy"
        )
    config.quantization_config["dequantize"] = True
    return method


def _check_names(path: str | Path, lost: list[str], unknown: list[str]) -> None:
    """Raises for weights that are not in the checkpoint, and logs those that have no place in the model."""
    if lost and unknown:
        raise UserError(
            f"{path}: its weights have other names than Qwen3-VL's: {unknown[0]!r} is unknown and "
            f"{lost[0]!r} is missing ({len(lost)} in all); convert them to transformers' names"
        )
    if lost:
        raise UserError(f"{path}: {len(lost)} weights are missing, first {lost[0]!r}; save it again")
    if unknown:
        log(f"{path}: {len(unknown)} weights have no place in the model, first {unknown[0]!r}")


# Settings of generation_config.json that change even greedy responses in transformers' own generate.
_UNFOLLOWED = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    *("sequence_bias", "min_length", "min_new_tokens", "exponential_decay_length_penalty", "stop_strings"),
    *("guidance_scale", "num_beams"),
)
_NEUTRAL = {"repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1, "num_beams": 1}


def _note_unfollowed(path: str | Path, settings: Any) -> None:
    """Logs what the checkpoint asks of generation and is not done here: scores and samples must agree."""
    values = {name: getattr(settings, name, None) for name in _UNFOLLOWED}
    asked = [name for name, value in values.items() if value and value != _NEUTRAL.get(name)]
    if asked:
        log(f"{path}: its generation_config.json sets {', '.join(asked)}; responses are written without")


def read_config(path: str | Path) -> Any:
    """The config of a checkpoint, without its weights.

    Raises :class:`UserError` for a folder that is missing or incomplete, for a name that no hub knows, and
    for a model that is not Qwen3-VL.
    """
    check_model_files(path)
    try:
        content = _read(path, "config.json", _content) if Path(path).is_dir() else None
        # A copy, because loading a model changes its config. On a hub, the name says as much as the content.
        config = copy.deepcopy(_config_of(str(path), content))
    except UserError as error:
        if Path(path).is_dir():
            raise
        raise UserError(f"{path}: there is no such folder, and as a name on a hub: {error}") from error
    if config.model_type not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise UserError(f"{path}: a {config.model_type!r} model; video-opd works with {known} checkpoints")
    _check_sizes(path, config)
    return config


def _content(folder: str | Path, **_: Any) -> bytes:
    return (Path(folder) / "config.json").read_bytes()


@functools.lru_cache(maxsize=8)
def _config_of(path: str, content: bytes | None) -> Any:
    """The config of a checkpoint with this ``content`` of config.json. Several parts of a command ask for it,
    and transformers takes longer to make it than to read the weights of a small model."""
    from transformers import AutoConfig

    return _read(path, "config.json", AutoConfig.from_pretrained)


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """What the folder of a model says of it. A loaded model has the same two attributes."""

    config: Any
    generation_config: Any


def read_model_configs(path: str | Path) -> ModelConfigs:
    """The configs of a checkpoint, without its weights. Raises :class:`UserError` as :func:`read_config`."""
    from transformers import GenerationConfig

    config = read_config(path)
    try:
        generation = _read(path, "generation_config.json", GenerationConfig.from_pretrained)
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        generation = GenerationConfig.from_model_config(config)  # there is no such file
    return ModelConfigs(config=config, generation_config=generation)


_SIZES = {
    "text_config": (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        "vocab_size", "head_dim", "num_experts", "num_local_experts", "moe_intermediate_size",
    ),
    "vision_config": (
        "hidden_size", "intermediate_size", "num_heads", "depth", "patch_size", "temporal_patch_size",
        "spatial_merge_size", "in_channels", "out_hidden_size", "num_position_embeddings",
    ),
}  # fmt: skip


# Far above any model's. transformers makes each layer in turn, for hours if there are a thousand million.
_MOST_LAYERS, _MOST_ELSE = 1000, 1 << 24


def _check_sizes(path: str | Path, config: Any) -> None:
    """Raises :class:`UserError` for a size that no model has: a division by it would be the first to fail."""
    for part, names in _SIZES.items():
        section = getattr(config, part, None)
        for name in names:
            size = getattr(section, name, None)
            most = _MOST_LAYERS if name in ("num_hidden_layers", "depth") else _MOST_ELSE
            if size is not None and not (type(size) is int and 1 <= size <= most):
                shown = repr(size)[:40]  # an integer may have thousands of digits
                raise UserError(
                    f"{path}: config.json has {part}.{name} {shown}, and it must be an integer from 1 to "
                    f"{most:,}; copy config.json from the checkpoint that it was made from"
                )
    heads, shared = config.text_config.num_attention_heads, config.text_config.num_key_value_heads
    if heads % shared:
        raise UserError(
            f"{path}: config.json has {heads} attention heads, which {shared} key heads cannot share"
        )
    _check_rotary(path, config.text_config)


def _check_rotary(path: str | Path, text_config: Any) -> None:
    """Raises :class:`UserError` unless time, height and width share the rotary frequencies of a head."""
    rotary = getattr(text_config, "rope_parameters", None)
    sections = rotary.get("mrope_section") if isinstance(rotary, dict) else None
    if sections is None:
        return
    numbers = sections if isinstance(sections, list | tuple) else ()
    if [type(number) for number in numbers] != [int] * 3 or min(numbers) < 0:
        raise UserError(
            f"{path}: config.json has the mrope_section {str(sections)[:40]}, and it must be three integers; "
            "copy config.json from the checkpoint that it was made from"
        )
    if 2 * sum(numbers) != text_config.head_dim:
        raise UserError(
            f"{path}: config.json has the mrope_section {str(sections)[:40]}, and a head has "
            f"{text_config.head_dim // 2} rotary frequencies to share; copy config.json from the checkpoint "
            "that it was made from"
        )


def _check_patches(path: str | Path, config: Any, processor: Any) -> None:
    """Raises :class:`UserError` if the processor cuts videos otherwise than the vision tower reads them."""
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size"}
    for name, of_model in (names | {"merge_size": "spatial_merge_size"}).items():
        mine, theirs = getattr(processor.video_processor, name, None), getattr(config.vision_config, of_model)
        if mine != theirs:
            raise UserError(
                f"{path}: its processor has {name} {mine!r:.40}, and config.json has {of_model} {theirs}; "
                "copy the preprocessor files from the checkpoint that it was made from"
            )


def load_processor(path: str | Path) -> Qwen3VLProcessor:
    """The processor of a checkpoint. Raises :class:`UserError` if it has no Qwen3-VL processor, or one whose
    prompts take time or memory without end."""
    from transformers import AutoProcessor, Qwen3VLProcessor

    check_processor_files(path)
    processor = _read(path, "the processor", AutoProcessor.from_pretrained)
    # AutoProcessor returns a tokenizer if that is all there is.
    if not isinstance(processor, Qwen3VLProcessor):
        raise UserError(
            f"{path}: no Qwen3-VL processor in it; copy the preprocessor, tokenizer and chat-template files "
            "from the checkpoint that it was made from"
        )
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise UserError(
            f"{path}: no chat template in it (chat_template.jinja, chat_template.json or a key of "
            "tokenizer_config.json); copy it from the checkpoint that this one was made from"
        )
    try_prompt(path, processor)
    return processor


def _read(path: str | Path, what: str, read: Any, **options: Any) -> Any:
    """``read(path, **options)``, with the many errors that transformers raises for a damaged folder as
    :class:`UserError`: some of them, such as those of a config's types, share no base but Exception.

    No code of the folder is run, and nobody is asked whether it may be.
    """
    try:
        with _custom_code_refused():
            return read(path, trust_remote_code=False, **options)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        raise UserError(f"{path}: {what} cannot be loaded ({reason})") from error


@contextlib.contextmanager
def no_library_warnings() -> Iterator[None]:
    """Silences warnings of transformers that say nothing, or of which we say one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _custom_code_refused() -> Iterator[None]:
    """Inside, transformers raises where it would ask on standard input whether to run a folder's own code.

    ``trust_remote_code=False`` does not reach every class that a processor loads.
    """
    from transformers import dynamic_module_utils

    wait_s = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = wait_s


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {device!s} cannot be used here; choose 'cpu' or an accelerator of this machine"
        ) from error
    return target


@contextlib.contextmanager
def no_library_bars() -> Iterator[None]:
    """Switches off the progress bars that transformers draws while it reads or writes a checkpoint; they
    would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
