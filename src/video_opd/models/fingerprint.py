"""The fingerprint of a checkpoint: a short name for its weights, tokenizer and preprocessing. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# The files that decide, together with the weights, what a model is given and what it writes.
CONFIG_FILES = (
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
# Reading every byte takes about a second a gigabyte. If the weights are larger than this, the header of a
# weight file is read, and of each of its tensors the begin, the middle and the end: whatever trains a model
# changes nearly all of them. The file's time is no part of it, because other machines have copies.
_FULL_READ_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 14
_LARGEST_HEADER_BYTES = 100_000_000  # of safetensors
_SAMPLES = 1000  # of a file that names no tensors


def model_fingerprint(path: str | Path) -> str:
    """32 hex digits that change with a model folder's weights, tokenizer or preprocessing.

    A name that is not a folder (a model on a hub) gives ``name:`` and the name.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"name:{path}"
    digest = hashlib.blake2b(digest_size=16)
    weights = sorted({file for pattern in _WEIGHT_PATTERNS for file in folder.glob(pattern)})
    whole = sum(file.stat().st_size for file in weights) <= _FULL_READ_BYTES
    for file in [*weights, *(folder / name for name in CONFIG_FILES if (folder / name).is_file())]:
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        _add_content(digest, file, whole or file not in weights)
    return digest.hexdigest()


def _add_content(digest: hashlib.blake2b, file: Path, whole: bool) -> None:
    with file.open("rb") as handle:
        if whole:
            while block := handle.read(_BLOCK_BYTES):
                digest.update(block)
            return
        size = file.stat().st_size
        for start in _sampled_at(handle, size):
            handle.seek(start)
            digest.update(handle.read(_SAMPLE_BYTES))


def _sampled_at(handle: BinaryIO, size: int) -> Iterator[int]:
    """Where the samples of a weight file of ``size`` bytes begin."""
    header_bytes = int.from_bytes(handle.read(8), "little")
    tensors: list[tuple[int, int]] = []
    if header_bytes <= min(size, _LARGEST_HEADER_BYTES):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            header = json.loads(handle.read(header_bytes))
            header.pop("__metadata__", None)
            offsets = (tensor["data_offsets"] for tensor in header.values())
            tensors = sorted((int(begin), int(end)) for begin, end in offsets)
    data = 8 + header_bytes if tensors else 0
    yield from range(0, data, _SAMPLE_BYTES)
    parts = tensors or [(size * i // _SAMPLES, size * (i + 1) // _SAMPLES) for i in range(_SAMPLES)]
    for begin, end in parts:
        last = max(begin, end - _SAMPLE_BYTES)
        yield from sorted({data + begin, data + (begin + last) // 2, data + last})
