"""The fingerprint of a checkpoint: a short name for its weights, tokenizer and preprocessing. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
# Reading every byte takes about a second a gigabyte. If the weights are larger than this, a weight file is
# identified by its size, its modification time, its header and its last megabyte. Training again in the same
# folder changes the time.
_FULL_READ_BYTES = 1 << 30
_END_BYTES = 1 << 20


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
            while block := handle.read(_END_BYTES):
                digest.update(block)
            return
        status = file.stat()
        digest.update(f"{status.st_mtime_ns}:".encode())
        digest.update(handle.read(_END_BYTES))
        handle.seek(max(status.st_size - _END_BYTES, 0))
        digest.update(handle.read(_END_BYTES))
