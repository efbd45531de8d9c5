"""JSON Lines files that survive a kill and a full disk: UTF-8, one object a line.

Every line that was written whole stays. A kill can cut the last line short: nobody was told of that row, and
the next append removes it. Numbers that are not finite are written as ``null``, because ``NaN`` is not JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.files import disk_errors, replacing_file

_TAIL_BLOCK_BYTES = 1 << 16
MOST_LINE_BYTES = 1 << 26  # of a line; the longest that this project writes have some 16 MB


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, row)``. Line numbers begin with 1; blank lines are skipped.

    Raises UserError that names ``path:line`` for a missing file, a line that is not UTF-8 or not JSON, a row
    that is not an object, an object with a repeated key, and a line of more than ``MOST_LINE_BYTES``.
    """
    for number, row in read_lines(path):
        if isinstance(row, UserError):
            raise row
        yield number, row


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """Yields the same as :func:`read_jsonl`, but a wrong line is yielded as its error, and reading goes on.

    Raises UserError for a file that cannot be opened, and for a line of more than ``MOST_LINE_BYTES``.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    with file:
        for number in itertools.count(1):
            raw = file.readline(MOST_LINE_BYTES + 1)
            if not raw:
                return
            if len(raw) > MOST_LINE_BYTES:
                most = MOST_LINE_BYTES >> 20
                raise UserError(f"{path}:{number}: a line of more than {most} MiB; mend or delete it")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # editors on Windows write a byte-order mark
            if not raw.strip():
                continue
            yield number, _parsed(raw, f"{path}:{number}")


def _parsed(raw: bytes, where: str) -> dict[str, Any] | UserError:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=no_key_twice)
    except UnicodeDecodeError as error:
        return UserError(f"{where}: not UTF-8 at byte {error.start}; save as UTF-8")
    except (ValueError, RecursionError) as error:
        return UserError(f"{where}: not JSON ({error}); mend or delete the line")
    if not isinstance(row, dict):
        return UserError(f"{where}: a {type(row).__name__}, not an object; write one {{…}} a line")
    return row


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for ``json.loads(…, object_pairs_hook=no_key_twice)``.

    Raises ValueError for a repeated key: Python would silently keep the last of two values.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        met: set[str] = set()
        twice = next(key for key, _ in pairs if key in met or met.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def append_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends whole lines in one write, which is undone if the disk is full.

    The folder is made if it is not there, and a last line that was cut short is repaired first. Raises
    UserError that names the file if it cannot be written; what it held before is untouched then.
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
    """Repairs a last line that was cut short: completes it if it is a whole row, and removes it otherwise.

    Returns whether anything was repaired; a missing file needs no repair. Commands call it before they read
    their own output to continue it.
    """
    path = Path(path)
    if not path.exists() or path.stat().st_size == 0:
        return False
    with disk_errors(path), path.open("r+b") as file:
        start = _last_line_start(file)
        if start is None:
            return False
        file.seek(start)
        tail = file.read(MOST_LINE_BYTES + 1)
        try:
            whole = len(tail) <= MOST_LINE_BYTES and isinstance(json.loads(tail), dict)
        except (ValueError, RecursionError):  # brackets in their thousands are no row either
            whole = False
        if whole:
            file.write(b"\n")
        else:
            file.truncate(start)
    return True


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file: readers see all of the old content or all of the new.

    Raises UserError as :func:`video_opd.files.replacing_file` does; the old content is untouched then.
    """
    with replacing_file(path) as temporary, open(temporary, "wb") as file:
        for row in rows:
            file.write(encode_row(row))


def encode_row(row: Mapping[str, Any]) -> bytes:
    """The row as one line with its newline. Paths become strings; NumPy and torch scalars become numbers."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:  # the row holds a number that is not finite
        text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)
    # A lone surrogate, from a broken file name for example, has no UTF-8 form; its escape has one.
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
    """The position at which an unfinished last line begins, or None if the file ends with a newline."""
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
