"""Commands that are run several at a time. What is finished is not run again, so a killed run continues."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.processes import PARENT
from video_opd.progress import duration, log

LINES_SHOWN = 5  # of a failed command's output


@dataclass(frozen=True, kw_only=True)
class Task:
    """One command of an experiment: ``python -m module words``, which is ``video-opd words`` by default.

    The words are made when it starts, because they may name what earlier tasks found. ``done`` says whether
    there is nothing left to do; ``seconds`` is its expected time on one thread.
    """

    name: str  # unique; its output is kept in ``name + ".log"``
    words: Callable[[], Sequence[Any]]
    done: Callable[[], bool]
    seconds: float
    module: str = "video_opd"


Stage = Sequence[Task]
"""Tasks that do not wait for one another."""


def settings_words(settings: Mapping[str, Any]) -> Iterator[str]:
    """``--key value`` for each setting of a recipe."""
    for key, value in settings.items():
        yield from (f"--{key}", str(value))


def expected_seconds(stages: Iterable[Stage], jobs: int) -> float:
    """How long the tasks that are not done will take, if ``jobs`` of them share the machine evenly."""
    return sum(task.seconds for stage in stages for task in stage if not task.done()) / jobs


def run_stages(stages: Sequence[Stage], logs: Path, jobs: int) -> None:
    """Runs the tasks that are not done, ``jobs`` at a time and stage by stage.

    Each runs on its share of the cores. Raises UserError with the last lines of a task that fails, after the
    tasks beside it have ended; repeated, the others are not run again.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        PARENT: str(os.getpid()),  # they end with this process
    }
    # Container images often set it, and each of these commands would compile torch and transformers again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    total_s, done_s, began = expected_seconds(stages, jobs), 0.0, time.monotonic()
    for number, stage in enumerate(stages):
        # The longest first, so that no core waits long for the last one.
        todo = sorted((task for task in stage if not task.done()), key=lambda task: -task.seconds)
        for done, task in enumerate(_completed(todo, logs, jobs, environment), start=1):
            done_s += task.seconds / jobs
            left_s = (total_s - done_s) * (time.monotonic() - began) / done_s  # at this machine's pace
            log(
                f"stage {number + 1} of {len(stages)}: {done} of {len(todo)} done ({task.name}), "
                f"about {duration(left_s)} left"
            )


def _completed(todo: Sequence[Task], logs: Path, jobs: int, environment: Mapping[str, str]) -> Iterator[Task]:
    failed = threading.Event()

    def run(task: Task) -> bool:
        if not failed.is_set():
            try:
                _run(task, logs, environment)
            except BaseException:
                failed.set()
                raise
        return task.done()

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, task): task for task in todo}
        for future in as_completed(running):
            if future.result():  # raises what the task raised, after the others have ended
                yield running[future]


def _run(task: Task, logs: Path, environment: Mapping[str, str]) -> None:
    path = logs / f"{task.name}.log"
    command = [sys.executable, "-m", task.module, *map(str, task.words())]
    with path.open("w", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code or not task.done():
        said = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
        raise UserError(f"{task.name} ended with exit code {code} ({path}): " + " / ".join(said))
