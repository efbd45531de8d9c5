"""Small files, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from video_opd.errors import UserError


def replaceable(path: str | Path) -> Path:
    """The file itself where ``path`` is a link to it.

    Raises :class:`UserError` for what is no plain file: replacing a device or a pipe would take it away from
    everybody.
    """
    found = Path(os.path.realpath(path))
    if found.exists() and not found.is_file():
        raise UserError(f"{path}: not a plain file; name a file to write")
    return found


def write_text(path: str | Path, text: str) -> Path:
    """Writes ``text`` atomically and makes the folder when it is not there.

    Through a link, the file that it points to. Raises :class:`UserError` that names the file when it cannot
    be written, or is no plain file; what was there is untouched then.
    """
    target = replaceable(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another place"
        ) from error
    return Path(path)
