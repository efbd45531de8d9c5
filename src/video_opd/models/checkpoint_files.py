"""Looks at the files of a checkpoint before a library reads them, to say in one line what is wrong.

No torch. A name on a hub has no files yet; the library's own message then has to do.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.files import read_text

# transformers' class for each ``model_type`` of a config. The second differs only in its decoder layers, with
# experts.
FAMILIES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_TEXT_BYTES = 100 << 20  # of a file that is read whole; the largest tokenizers have 40 MiB
# The weights of parts that are trained in full beside an adapter: peft's format has no place for them.
FULL_WEIGHTS = "trained_in_full.safetensors"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
# Suffixes with which quantised copies are published: Qwen3-VL-8B-Instruct-FP8, …-bnb-4bit, …-AWQ-4bit.
_QUANTISED_ENDINGS = ("-unsloth-bnb-4bit", "-bnb-4bit", "-AWQ-4bit", "-AWQ-8bit", "-AWQ", "-GPTQ", "-FP8")


def check_model_files(path: str | Path) -> None:
    """Raises :class:`UserError` for a folder without config, with an adapter alone, and for weight files that
    are missing, cut off, or only git-lfs pointers."""
    folder = Path(path)
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise UserError(f"{path}: a file, not a model folder; give a folder that save_pretrained wrote")
        if isinstance(path, Path) or not is_hub_name(path):
            raise UserError(f"{path}: no such model folder")
        if os.path.isdir(folder.parent) and not _known_without_asking(path):
            raise UserError(
                f"{path}: no such folder in {folder.parent}, which is a folder here; if a model on a hub is "
                f"meant, download it first (hf download {path})"
            )
        return
    weights = _weight_files(folder)
    if is_adapter_folder(path):
        raise UserError(
            f"{path}: an adapter for {adapter_base(path) or 'another model'}, not a model; merge it into "
            "that (peft: merge_and_unload), save the result with the processor, and give that folder"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: no config.json in it; give a folder that save_pretrained wrote")
    check_files_of(folder)
    for file in [*sorted(folder.glob("*.json")), *weights]:
        with file.open("rb") as handle:
            if handle.read(len(_POINTER)) == _POINTER:
                raise UserError(
                    f"{path}: {file.name} is a git-lfs pointer in place of the file; run git lfs pull there"
                )
    for file in weights:
        if file.suffix == ".safetensors":
            _check_length(path, file)
    index = folder / "model.safetensors.index.json"
    places = _object(index).get("weight_map", {})
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path}: {index.name} does not say which file each weight is in; download it again")
    for name in sorted(set(places.values())):
        if not (folder / name).is_file():
            raise UserError(f"{path}: {name} is missing, which {index.name} names; download it again")


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter in peft's format, and no model."""
    folder = Path(path)
    return (folder / "adapter_config.json").is_file() and not _weight_files(folder)


def adapter_base(path: str | Path) -> str | None:
    """The model that the adapter folder ``path`` belongs to, as its config names it."""
    name = _object(Path(path) / "adapter_config.json").get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def base_of(path: str | Path) -> str | Path:
    """The model that tokens, config and sizes of ``path`` are of: an adapter's base, or ``path`` itself."""
    return (adapter_base(path) or path) if is_adapter_folder(path) else path


def has_full_weights(folder: str | Path) -> bool:
    """Whether an adapter folder also holds weights that were trained in full."""
    return (Path(folder) / FULL_WEIGHTS).exists()


def _weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights; those of an adapter, and of what was trained beside it, are none."""
    found = sorted({*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")})
    return [file for file in found if not file.name.startswith(("adapter_model", FULL_WEIGHTS))]


def is_hub_name(path: str) -> bool:
    """Whether a path reads as ``owner/name`` and nothing of that name is here. A hub need not know it."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not os.path.exists(path)


def find_file(path: str | Path, name: str) -> Path | None:
    """The file ``name`` of a checkpoint, or None if it has none.

    A hub is asked for it as transformers asks for ``config.json``: the cache first if hubs are switched off
    or cannot be reached. A name that :func:`check_model_files` refuses is asked for nowhere.
    """
    if isinstance(path, Path) or os.path.isdir(path) or not is_hub_name(path):
        file = Path(path) / name
        return file if os.path.exists(file) else None  # False for a name that no file can have
    if os.path.isdir(Path(path).parent) and not _known_without_asking(path):
        return None
    found = _file_on_hub(path, name)
    return None if found is None else Path(found)


@functools.cache
def _file_on_hub(model: str, name: str) -> str | None:
    from transformers.utils import cached_file

    try:
        return cached_file(
            model,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such model: reading config.json says so
        return None


def _known_without_asking(name: str) -> bool:
    """Whether no hub is asked about a name: hubs are switched off, or the model was downloaded before."""
    from huggingface_hub import constants, try_to_load_from_cache

    return constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str)


def check_processor_files(path: str | Path) -> None:
    """Raises :class:`UserError` for a folder without a tokenizer or without the settings of a processor.

    transformers would make up a tokenizer of one token.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    check_files_of(folder)
    advice = "copy it from the checkpoint that this one was made from"
    tokenizers = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
    there = {file.name for file in folder.iterdir()}
    if not any(names <= there for names in tokenizers):
        raise UserError(
            f"{path}: no tokenizer in it (tokenizer.json, or vocab.json with merges.txt) for the processor; "
            f"{advice}"
        )
    if not there & set(_PROCESSOR):
        raise UserError(f"{path}: no processor in it ({' or '.join(_PROCESSOR)}); {advice}")


def check_files_of(folder: Path) -> None:
    """Raises :class:`UserError` for a pipe or a device, at which a reader would wait, and for a settings or
    tokenizer file that would take minutes and gigabytes."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{folder}: {file.name} is not a plain file; copy the folder again without it")
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.is_file():
            size = file.stat().st_size
            if size > _MOST_TEXT_BYTES:
                raise UserError(
                    f"{folder}: {file.name} has {size:,} bytes, and no such file has more than "
                    f"{_MOST_TEXT_BYTES:,}; copy it from the checkpoint that this one was made from"
                )


def quantisation_of(config: Any) -> str | None:
    """The method by which the weights of a checkpoint are quantised (``fp8``, ``awq``, …), or None."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return str(settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method)


def unquantised_name(path: str | Path) -> str:
    """What to ask for in place of a quantised checkpoint."""
    name = str(path).rstrip("/")
    for ending in _QUANTISED_ENDINGS:
        if name.lower().endswith(ending.lower()):
            return f"{Path(name).name[: -len(ending)]}, the checkpoint"
    return "the checkpoint in bfloat16"


def _check_length(path: str | Path, file: Path) -> None:
    """A safetensors file begins with the length of a header, which says where the last tensor ends."""
    size = file.stat().st_size
    try:
        length, header = _header(file)
        expected = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
    except _NO_HEADER:
        return  # no safetensors file; the library says so
    if size < expected:
        raise UserError(
            f"{path}: {file.name} is cut off ({size:,} bytes, and its header needs {expected:,} or more); "
            "download it again"
        )


# What reading a header, and what it should say, raises if the file is another.
_NO_HEADER = (ValueError, TypeError, LookupError, AttributeError, RecursionError)


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """(its length in bytes, what it says of each weight) of a safetensors file."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        found = json.loads(handle.read(length)) if 8 + length <= file.stat().st_size else {}
    return length, {name: value for name, value in found.items() if name != "__metadata__"}


def stored_type(path: str | Path) -> str | None:
    """The type of all weights of a checkpoint, as safetensors names it (``BF16``, ``F32``).

    None if there are several, if the files are of another kind, and if a hub's are not here yet.
    """
    config = find_file(path, "config.json")
    if config is None:
        return None
    whole = config.parent / "model.safetensors"  # if it is there, transformers reads no index
    index = _object(config.parent / "model.safetensors.index.json").get("weight_map", {})
    parts = [config.parent / name for name in set(index.values())] or _weight_files(config.parent)
    files = [whole] if whole.is_file() else parts
    try:
        types = {weight["dtype"] for file in files for weight in _header(file)[1].values()}
    except (OSError, *_NO_HEADER):
        return None
    return types.pop() if len(types) == 1 else None


def _object(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing if it cannot be read: the library that needs it says why."""
    try:
        value = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
