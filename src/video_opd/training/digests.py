"""A folder's list of its files with their sizes and digests, so that damage is found when it is read.

The list is a JSON object: ``files`` holds ``{name: [size, SHA-256]}``, any further facts stand beside it, and
``digest`` covers the list itself. A digest finds damage, of one bit or of a whole disk block. It is no
signature: whoever can write the folder can write another list.

SHA-256 takes about 0.5 s a gigabyte on one core of a processor with instructions for it, which is less than
blake2b's 0.7 s; several files are read at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.files import read_text

_BLOCK_BYTES = 1 << 20
_DIGEST = "digest"  # the key of a record's own digest
_THREADS = 4  # hashing releases the interpreter's lock


class Damage(UserError):
    """A folder is not as it was written. The message says which file, and how it differs."""


def file_digest(path: str | Path) -> str:
    """64 hex digits: the SHA-256 of the file's content, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_list(folder: Path, name: str, facts: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Writes the list of ``folder`` into its file ``name``, with ``facts``. ``without``: files not in it."""
    names = sorted(_names(folder) - {name, *without})
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda each: file_digest(folder / each), names)
        files = {
            each: [(folder / each).stat().st_size, digest]
            for each, digest in zip(names, digests, strict=True)
        }
    content = {**facts, "files": files}
    (folder / name).write_text(with_own_digest(content, indent=1), encoding="utf-8")


def read_list(folder: Path, name: str) -> dict[str, Any]:
    """The content of a list; it is whole, but the files are not read. Raises :class:`Damage`."""
    try:
        content = json.loads(read_text(folder / name))
    except OSError as error:
        raise Damage(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damage(f"{name} is not JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise Damage(f"{name} holds no list of files")
    if not is_intact(content) or content.pop(_DIGEST, None) is None:
        raise Damage(f"{name} does not match its own digest")
    return content


def check_files(folder: Path, files: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Raises :class:`Damage` unless ``folder`` holds exactly ``files``, with their sizes and digests.

    Hidden files, whose names begin with a dot, are not looked at, because nothing reads them. Neither are
    ``without``.
    """
    try:
        there = _names(folder) - set(without)
        if missing := sorted(files.keys() - there):
            raise Damage(f"{missing[0]} is missing")
        if added := sorted(there - files.keys()):
            raise Damage(f"{added[0]} was added later")
        for name, (size, _) in files.items():
            if (found := (folder / name).stat().st_size) != size:
                raise Damage(f"{name} has {found} bytes, and was written with {size}")
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda name: file_digest(folder / name), files)
            for (name, (_, wanted)), digest in zip(files.items(), digests, strict=True):
                if digest != wanted:
                    raise Damage(f"{name} does not match its digest")
    except OSError as error:
        raise Damage(f"{error.filename or folder}: cannot be read ({error.strerror})") from None


def _names(folder: Path) -> set[str]:
    found = set()
    for root, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found |= {
            (Path(root) / each).relative_to(folder).as_posix() for each in files if not each.startswith(".")
        }
    return found


def with_own_digest(record: Mapping[str, Any], indent: int = 2) -> str:
    """The record as JSON text, with a key more: the digest of the others."""
    return json.dumps({**record, _DIGEST: _digest_of(record)}, indent=indent) + "\n"


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a record is as :func:`with_own_digest` made it. One without a digest is of an earlier
    version."""
    others = {key: value for key, value in record.items() if key != _DIGEST}
    return record.get(_DIGEST, digest := _digest_of(others)) == digest


def _digest_of(record: Mapping[str, Any]) -> str:
    plain = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()
