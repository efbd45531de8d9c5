"""Starts commands together, as forks of one process that has imported everything, which takes seconds.

It reads requests ``{"words": […], "folder": …, "count": n}`` from stdin, a line each, and answers with a line
``[[pid, exit code], …]``. The commands work in ``folder``. Each leaves marks in ``folder/meeting``: it starts
when all are there, and after its first lock it waits until all have tried one, so that the locks overlap
however the machine divides its time. ``meeting/said-PID`` is its stderr, and ``meeting/unlocked`` lists what
was written below ``folder/out`` without a lock, whichever library wrote it. The demo is made small.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAITS, WAIT_S = 30_000, 0.01  # five minutes: the others are there long before, or never
UNFINISHED = (".part-", ".old-")
ALWAYS_UNLOCKED = {"clips"}  # the clip cache


def import_everything() -> None:
    import video_opd.bench.engine
    import video_opd.cli.preloaded
    import video_opd.convert.conversion
    import video_opd.grounding.ground
    import video_opd.grounding.page
    import video_opd.world.make  # noqa: F401
    from video_opd.world import demo, measure

    demo.POOL_VIDEOS, demo.SELECTED, demo.SHOWN_VIDEOS = 4, 8, 2
    demo.TEACHER_K, demo.STUDENT_K = 1, 1
    measure.TEST_VIDEOS = {"short": 2, "long": 1, "subtle": 1}


def meet(folder: Path, name: str, count: int) -> None:
    (folder / f"{name}-{os.getpid()}").touch()
    for _ in range(WAITS):
        if len(list(folder.glob(f"{name}-*"))) >= count:
            return
        time.sleep(WAIT_S)
    raise AssertionError(f"nobody else came to {name!r}")


def try_locks_together(folder: Path, count: int) -> None:
    from video_opd import locks

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
    from video_opd import locks

    for key in list(locks._locks):
        lock = Path(key)
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


def run(words: list[str], folder: Path, count: int) -> int:
    """In a fork: its own working folder and streams, then the command."""
    from video_opd.cli import main

    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "out" / "cache")
    meeting = folder / "meeting"
    redirect(os.devnull, os.devnull, meeting / f"said-{os.getpid()}")
    watch_writing(folder / "out", meeting / "unlocked")
    try_locks_together(meeting, count)
    meet(meeting, "here", count)
    sys.argv = ["video-opd", *words]
    return main(words)


def redirect(*paths: str | Path) -> None:
    """Opens the files of stdin, stdout and stderr."""
    for stream, path in enumerate(paths):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)


def fork(command: Callable[[], int]) -> int:
    """The id of a child that ends with the exit code of ``command``."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = command()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


if __name__ == "__main__":
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        command = functools.partial(run, request["words"], Path(request["folder"]), request["count"])
        children = [fork(command) for _ in range(request["count"])]
        codes = [[child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])] for child in children]
        print(json.dumps(codes), flush=True)
