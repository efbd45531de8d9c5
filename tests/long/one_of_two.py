"""Runs the command ``WORDS`` as one of ``COUNT`` that start together and try one output::

    python one_of_two.py MEETING COUNT WORDS…

Each leaves marks in the folder ``MEETING``. It starts when all are there, and after its first lock it waits
until all have tried one: so the locks overlap however the machine divides its time. ``MEETING/unlocked``
lists what was written below ``out`` without a lock, whichever library wrote it. The demo is made small.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from video_opd import locks
from video_opd.cli import main
from video_opd.world import demo, measure

WAITS, WAIT_S = 30_000, 0.01  # five minutes: the others are there long before, or never
UNFINISHED = (".part-", ".old-")
ALWAYS_UNLOCKED = {"clips"}  # the clip cache

demo.POOL_VIDEOS, demo.SELECTED, demo.SHOWN_VIDEOS = 4, 8, 2
demo.TEACHER_K, demo.STUDENT_K = 1, 1
measure.TEST_VIDEOS = {"short": 2, "long": 2, "subtle": 2}


def meet(folder: Path, name: str, count: int) -> None:
    (folder / f"{name}-{os.getpid()}").touch()
    for _ in range(WAITS):
        if len(list(folder.glob(f"{name}-*"))) >= count:
            return
        time.sleep(WAIT_S)
    raise AssertionError(f"nobody else came to {name!r}")


def try_locks_together(folder: Path, count: int) -> None:
    take, tried = locks._take, False

    def take_together(path: Path, output: str | Path, made: list[Path]) -> int | None:
        nonlocal tried
        first, tried = not tried, True
        try:
            descriptor = take(path, output, made)
        except BaseException:
            (folder / f"tried-{os.getpid()}").touch()
            raise
        if first:
            meet(folder, "tried", count)
        return descriptor

    locks._take = take_together


def is_locked(path: Path) -> bool:
    """Whether this process has a lock of the file, of the one that it stands beside, or of a folder above."""
    for key in list(locks._locks):
        lock = Path(key)
        if path == lock:
            return True
        if lock.name == ".lock" and lock.parent in path.parents:
            return True
        output = lock.with_suffix("")
        if path.parent == output.parent and f"{path.name}.".startswith(f"{output.name}."):
            return True
    return False


def watch_writing(below: Path, report: Path) -> None:
    def written(name: str | bytes | Path) -> None:
        path = Path(os.path.abspath(os.fsdecode(name)))
        if below not in path.parents or ALWAYS_UNLOCKED.intersection(path.parts):
            return
        if any(part.startswith(UNFINISHED) for part in path.parts) or path.name.endswith(".lock"):
            return
        if not is_locked(path):
            with report.open("a") as file:
                file.write(f"{path}\n")

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int):
            name, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR):
                written(name)
        elif event == "os.rename":
            written(arguments[1])

    sys.addaudithook(watch)


if __name__ == "__main__":
    meeting, number, *words = sys.argv[1:]
    watch_writing(Path.cwd() / "out", Path(meeting, "unlocked"))
    try_locks_together(Path(meeting), int(number))
    meet(Path(meeting), "here", int(number))
    sys.argv = ["video-opd", *words]
    sys.exit(main(words))
