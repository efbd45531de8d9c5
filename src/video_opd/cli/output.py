"""Results on stdout or in a file, whatever stdout is: a terminal, ASCII only, closed, or on a full disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from video_opd.cli.parser import Output
from video_opd.files import write_text
from video_opd.locks import locked_file, locked_folder
from video_opd.processes import launched_count
from video_opd.terminal import escape_libraries

# Control characters that JSON leaves as they are, and marks that turn the direction of writing.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def print_json(record: Any) -> None:
    print_json_text(as_json(record))


def print_json_text(text: str) -> None:
    """Prints JSON. What stdout cannot hold, or a terminal would obey, is written as JSON's escapes."""
    whole = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    unsafe = _UNSAFE_IN_JSON if whole else _NOT_ASCII
    print(unsafe.sub(lambda found: json.dumps(found.group())[1:-1], text), flush=True)


def write_json(path: str, record: Any) -> None:
    """Replaces ``path``. Raises :class:`video_opd.errors.UserError` when it cannot be written."""
    write_text(path, as_json(record) + "\n")


def as_json(record: Any) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False, default=str)


@contextlib.contextmanager
def locked_outputs(places: Iterable[Output]) -> Iterator[None]:
    """Keeps other commands from writing the outputs of this one during the block. "-" is stdout.

    A launcher's processes write one output together. The commands that they run lock it themselves, and here
    nothing is done. Raises :class:`video_opd.errors.UserError` if another command is writing one of them.
    """
    if launched_count() > 1:
        yield
        return
    with contextlib.ExitStack() as stack:
        # In one order for all commands: of two that share several outputs, one gets all of them.
        for path, kind in sorted(set(places), key=lambda place: os.path.realpath(place.path)):
            if path != "-":
                stack.enter_context((locked_file if kind == "file" else locked_folder)(path))
        yield


def prepare_streams() -> io.StringIO | None:
    """Makes stdout and stderr take any text: a character that they cannot encode is written as its escape.
    What libraries log is shown as text, too.

    Returns what stands in for stdout if it is closed. No file that is opened later gets the number of a
    closed stream: a library's message would be written into it.
    """
    escape_libraries()
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    closed = io.StringIO() if sys.stdout is None else None
    if closed is not None:
        sys.stdout = closed
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return closed


def lost_output() -> str | None:
    """The reason why stdout cannot be written, or None if it can; Python would complain again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return str(getattr(error, "strerror", None) or error)
    return None
