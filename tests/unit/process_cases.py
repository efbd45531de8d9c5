"""Processes that tests start, watch and kill. Waiting ends after minutes, so a busy machine fails no test."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed nowhere")


def wait_until(condition: Callable[[], bool], every_s: float = 0.01) -> None:
    for _ in range(round(300 / every_s)):
        if condition():
            return
        time.sleep(every_s)
    raise AssertionError("it did not come to that")


def die_after(path: Path, opened: int) -> None:
    """Lets this process, a fork, kill itself, at the same place on an idle and on a busy machine.

    It does so when it opens a file to write and ``path`` is there; ``opened`` such files are let pass first.
    """
    left = opened

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event != "open" or not arguments[2] & (os.O_WRONLY | os.O_RDWR) or not path.exists():
            return
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    sys.addaudithook(look)


def is_alive(pid: int) -> bool:
    """False for a process that has ended, also if its parent has not collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """The processes below ``pid``. Linux: read from /proc."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found
