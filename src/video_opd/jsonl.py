"""Line-wise JSON files that survive a kill and a full disk.

One object a line, UTF-8. Every line that was written whole stays; a line that was cut short by a kill was
never reported to anyone and is repaired away when the file is next appended to. Numbers that are not finite
are written as ``null``: ``NaN`` is not JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.files import disk_errors, replacing_file

_TAIL_BLOCK_BYTES = 1 << 16


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, row)``, 1-based; blank lines are skipped.

    Raises UserError, naming ``path:line``, for a missing file, a line that is not UTF-8 or not JSON, and a
    row that is not an object.
    """
    for number, row in read_lines(path):
        if isinstance(row, UserError):
            raise row
        yield number, row


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """As :func:`read_jsonl`, but a line that is wrong is yielded as its error, and the next ones follow.

    Raises UserError for a file that cannot be opened.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    with file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # editors on Windows write a byte-order mark
            if not raw.strip():
                continue
            yield number, _parsed(raw, f"{path}:{number}")


def _parsed(raw: bytes, where: str) -> dict[str, Any] | UserError:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 at byte {error.start}; save as UTF-8")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not JSON ({error}); mend or delete the line")
    if not isinstance(row, dict):
        return UserError(f"{where}: a {type(row).__name__}, not an object; write one {{…}} a line")
    return row


def append_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends whole lines, in one write that is undone if the disk is full.

    Makes the folder when it is not there, and repairs a half last line first. Raises UserError that names
    the file when it cannot be written; what it held before is untouched then.
    """
    path = Path(path)
    blob = b"".join(encode_row(row) for row in rows)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        repair_jsonl(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, blob)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def repair_jsonl(path: str | Path) -> bool:
    """Mends a last line that was cut short: completes it if it is a whole row, else removes it.

    Returns whether anything was mended. For commands that read their own output before they go on with it;
    a file that is not there is left so.
    """
    path = Path(path)
    if not path.exists() or path.stat().st_size == 0:
        return False
    with disk_errors(path), path.open("r+b") as file:
        start = _last_line_start(file)
        if start is None:
            return False
        file.seek(start)
        tail = file.read()
        try:
            whole = isinstance(json.loads(tail), dict)
        except ValueError:
            whole = False
        if whole:
            file.write(b"\n")
        else:
            file.truncate(start)
    return True


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the file atomically: readers see the old content or all of the new, never a part.

    Raises UserError as :func:`video_opd.files.replacing_file` does; the old content is untouched then.
    """
    with replacing_file(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            file.write(encode_row(row))


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line, newline included. Paths become strings, NumPy and torch scalars numbers."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:  # a number that is not finite, somewhere in it
        text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    # A lone surrogate (a broken file name, say) has no UTF-8 form; its escape has.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # NumPy and torch arrays and scalars, without importing either
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | None) else _finite(_plain(value))


def _last_line_start(file: Any) -> int | None:
    """Where an unfinished last line begins, or None if the file ends with a newline."""
    end = file.seek(0, os.SEEK_END)
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return None
    position = end
    while position > 0:
        block = min(_TAIL_BLOCK_BYTES, position)
        position -= block
        file.seek(position)
        newline = file.read(block).rfind(b"\n")
        if newline >= 0:
            return position + newline + 1
    return 0


def _write_all(descriptor: int, blob: bytes) -> None:
    view = memoryview(blob)
    while view:
        view = view[os.write(descriptor, view) :]
