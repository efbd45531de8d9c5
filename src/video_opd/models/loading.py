"""Loads checkpoints, and checks that a student and a teacher use the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_opd.errors import UserError
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.vision_attention import use_batched_frames
from video_opd.models.vocabulary import eos_token_ids, vision_token_ids

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# transformers' class for each ``model_type``. The second differs only in its decoder layers, with experts.
FAMILIES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}


def load_model(
    path: str | Path, dtype: str = "bfloat16", device: str | torch.device = "cpu", attn: str = "sdpa"
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """A Qwen3-VL model, dense or with experts, in evaluation mode, and the processor of its folder.

    ``path`` is a folder that ``save_pretrained`` wrote, or the name of a model on a hub. ``attn`` is any
    attention implementation of transformers. With ``sdpa``, the vision tower attends to all frames of a size
    in one call (:mod:`~video_opd.models.vision_attention`). Patches are embedded by a matrix product
    (:mod:`~video_opd.models.patch_embedding`).

    Raises :class:`UserError` when something is missing, broken, or not Qwen3-VL.
    """
    import transformers

    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    target = _usable_device(device)
    config = read_config(path)
    processor = load_processor(path)
    with no_library_bars():
        model, report = _read(
            path,
            "the weights",
            getattr(transformers, FAMILIES[config.model_type]).from_pretrained,
            dtype=DTYPES[dtype],
            attn_implementation=attn,
            output_loading_info=True,
        )
    if lost := sorted(report["missing_keys"]):
        raise UserError(f"{path}: {len(lost)} weights are missing, first {lost[0]!r}; save it again")
    use_batched_frames(model)
    use_linear_patches(model)
    return model.to(target).eval(), processor


def read_config(path: str | Path) -> Any:
    """The config of a checkpoint, without its weights.

    Raises :class:`UserError` for a folder that is missing or incomplete, for a name that no hub knows, and
    for a model that is not Qwen3-VL.
    """
    from transformers import AutoConfig

    _check_folder(path)
    try:
        config = _read(path, "config.json", AutoConfig.from_pretrained)
    except UserError as error:
        if Path(path).is_dir():
            raise
        raise UserError(f"{path}: there is no such folder, and as a name on a hub: {error}") from error
    if config.model_type not in FAMILIES:
        known = " and ".join(FAMILIES)
        raise UserError(f"{path}: a {config.model_type!r} model; video-opd works with {known} checkpoints")
    return config


def check_same_tokens(
    student: tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor],
    teacher: tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor],
) -> None:
    """Raises :class:`UserError` unless the teacher can score the student's responses to the same input.

    Both are ``(model, processor)``. The check compares the id of every token, the special tokens, the ids
    of vision placeholders, the end-of-sequence set, the chat template, and the form of the pixels (patch
    sizes, normalisation). It does not compare the number of embedding rows, which is padded differently from
    one model size to the next.
    """
    (student_model, student_processor), (teacher_model, teacher_processor) = student, teacher
    for difference in _token_differences(student_processor.tokenizer, teacher_processor.tokenizer):
        raise UserError(_mismatch(difference))
    pairs = {
        "special tokens": (_special_tokens(student_processor), _special_tokens(teacher_processor)),
        "vision token ids": (vision_token_ids(student_model), vision_token_ids(teacher_model)),
        "pixels": (_pixel_form(*student), _pixel_form(*teacher)),
    }
    for name, (mine, theirs) in pairs.items():
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key), theirs.get(key)
            if a != b:
                raise UserError(_mismatch(f"{name}: {key} is {a!r}, the teacher's {b!r}"))
    ends = eos_token_ids(*student), eos_token_ids(*teacher)
    if ends[0] != ends[1]:
        first = min(ends[0] ^ ends[1])
        token = student_processor.tokenizer.convert_ids_to_tokens(first)
        raise UserError(
            _mismatch(
                f"token {first} ({token!r}) ends a response of only one of them "
                f"(end-of-sequence ids {sorted(ends[0])}, the teacher's {sorted(ends[1])})"
            )
        )
    templates = _chat_template(student_processor), _chat_template(teacher_processor)
    if templates[0] != templates[1]:
        raise UserError(_mismatch(f"chat templates, from {_first_difference(*templates)}"))


def _token_differences(student: Any, teacher: Any) -> Iterator[str]:
    """The differences in the order of the token ids."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine == theirs:
        return
    by_id_mine = {index: token for token, index in mine.items()}
    by_id_theirs = {index: token for token, index in theirs.items()}
    for index in sorted(by_id_mine.keys() | by_id_theirs.keys()):
        a, b = by_id_mine.get(index), by_id_theirs.get(index)
        if a != b:
            yield f"token {index} is {a!r}, the teacher's {b!r}"


def _special_tokens(processor: Qwen3VLProcessor) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    added = {f"added token {i}": (str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items()}
    return {**tokenizer.special_tokens_map, **added}


def _pixel_form(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor) -> dict[str, Any]:
    """The settings that decide the encoded pixels: the teacher is given those of the student's processor."""
    vision, video = model.config.vision_config, processor.video_processor
    sizes = ("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")
    steps = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
    form = {name: getattr(vision, name) for name in sizes}
    for name in steps:
        value = getattr(video, name, None)
        form[name] = list(value) if isinstance(value, (list, tuple)) else value
    return form


def _chat_template(processor: Qwen3VLProcessor) -> str:
    return processor.chat_template or processor.tokenizer.chat_template or ""


def _first_difference(a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"character {at}: {a[at : at + 40]!r}, the teacher's {b[at : at + 40]!r}"


def _mismatch(what: str) -> str:
    return f"student and teacher do not share their tokens: {what}; use checkpoints of one tokenizer family"


def _check_folder(path: str | Path) -> None:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{path}: no config.json in it; give a folder that save_pretrained wrote")
    elif folder.exists():
        raise UserError(f"{path}: a file, not a model folder; give a folder that save_pretrained wrote")
    elif isinstance(path, Path) or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise UserError(f"{path}: no such model folder")  # "organisation/name" may be on a hub


def load_processor(path: str | Path) -> Qwen3VLProcessor:
    """The processor of a checkpoint. Raises :class:`UserError` if it has no Qwen3-VL processor."""
    from transformers import AutoProcessor, Qwen3VLProcessor

    processor = _read(path, "the processor", AutoProcessor.from_pretrained)
    if not isinstance(
        processor, Qwen3VLProcessor
    ):  # AutoProcessor returns a tokenizer if that is all there is
        raise UserError(
            f"{path}: no Qwen3-VL processor in it; copy the preprocessor, tokenizer and chat-template files "
            "from the checkpoint that it was made from"
        )
    return processor


def _read(path: str | Path, what: str, read: Any, **options: Any) -> Any:
    """``read(path, **options)``, with the many errors that transformers raises for a damaged folder as
    :class:`UserError`."""
    from safetensors import SafetensorError

    try:
        return read(path, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{path}: {what} cannot be loaded ({reason})") from error


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
