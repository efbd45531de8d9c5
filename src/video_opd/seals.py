"""Seals of files that grow: how long a file was at a moment, and the digest of these bytes.

Rows are appended to such a file for hours, so its length and digest are written down again and again, in
another file. Whoever continues it sees whether all that was sealed is still there as it was, and which rows
came after. A seal finds damage and changes; it is no signature.

Example::

    sealer = Sealer("metrics.jsonl")
    append_jsonl("metrics.jsonl", rows)
    seal = sealer.seal()              # reads what was added since
    ...
    assert seal.holds("metrics.jsonl")
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.files import disk_errors

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Seal:
    """The length of a file in bytes, and the SHA-256 of these bytes in hex digits."""

    size: int
    sha256: str

    @classmethod
    def read(cls, value: Any) -> Seal | None:
        """The seal of ``[size, SHA-256]``, as :meth:`to_json` gives it; None for anything else."""
        if not isinstance(value, list) or len(value) != 2:
            return None
        size, sha256 = value
        return cls(size=size, sha256=sha256) if type(size) is int and isinstance(sha256, str) else None

    def to_json(self) -> list[Any]:
        return [self.size, self.sha256]

    def holds(self, path: str | Path) -> bool:
        """Whether the file begins with what was sealed. A file that is missing holds nothing."""
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            return False
        digest, left = hashlib.sha256(), self.size
        try:
            with open(path, "rb", buffering=0) as file:
                while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
                    digest.update(block)
                    left -= len(block)
        except OSError:
            return self.size == 0
        return left == 0 and digest.hexdigest() == self.sha256


NOTHING = Seal(size=0, sha256=hashlib.sha256().hexdigest())  # every file begins with it


class Sealer:
    """Seals one file again and again, and reads each byte once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._digest, self._size = hashlib.sha256(), 0

    def seal(self) -> Seal:
        """Writes the file through to the disk and returns the seal of all of it. A missing file is empty.

        Raises :class:`video_opd.errors.UserError` if it cannot be read.
        """
        with disk_errors(self.path):
            if self.path.exists():
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(self._size)
                    while block := file.read(_BLOCK_BYTES):
                        self._digest.update(block)
                        self._size += len(block)
                    os.fsync(file.fileno())
        return Seal(size=self._size, sha256=self._digest.hexdigest())
