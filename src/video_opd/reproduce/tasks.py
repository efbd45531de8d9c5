"""Commands that are run several at a time. What is finished is not run again, so a killed run continues.

Beside what a command says stands ``NAME.json``: its words, the digests of what it was given to read, and the
commit. What was made by other words, or from other files, is not taken for what is asked for.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.config.tree import override_words
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.models.fingerprint import model_fingerprint
from video_opd.progress import duration, log
from video_opd.reproduce.forked_command import run_command
from video_opd.training.digests import file_digest

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
    """``--key value`` for each setting of a recipe; a text is YAML, as on a command line."""
    for key, value in settings.items():
        yield from (f"--{key}", value) if isinstance(value, str) else override_words({key: value})


def expected_seconds(stages: Iterable[Stage], jobs: int) -> float:
    """How long the tasks that are not done will take, if ``jobs`` of them share the machine evenly."""
    return sum(task.seconds for stage in stages for task in stage if not task.done()) / jobs


def run_stages(stages: Sequence[Stage], logs: Path, jobs: int) -> None:
    """Runs the tasks that are not done, ``jobs`` at a time and stage by stage.

    Each runs on its share of the cores. Raises UserError with the last lines of a task that fails, after the
    tasks beside it have ended; repeated, the others are not run again. It is raised, too, before a stage in
    which something was made by another command or from other files.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    total_s, done_s, began = expected_seconds(stages, jobs), 0.0, time.monotonic()
    for number, stage in enumerate(stages):
        for task in stage:
            _check_as_before(task, logs)
        # The longest first, so that no core waits long for the last one.
        todo = sorted((task for task in stage if not task.done()), key=lambda task: -task.seconds)
        for done, task in enumerate(_completed(todo, logs, jobs, threads), start=1):
            done_s += task.seconds / jobs
            left_s = (total_s - done_s) * (time.monotonic() - began) / done_s  # at this machine's pace
            log(
                f"stage {number + 1} of {len(stages)}: {done} of {len(todo)} done ({task.name}), "
                f"about {duration(left_s)} left"
            )


def commits_of(stages: Iterable[Stage], logs: Path) -> list[str]:
    """The commits at which the tasks were run."""
    records = (_record_of(task, logs) for stage in stages for task in stage)
    return sorted({str(json.loads(path.read_text(encoding="utf-8"))["commit"]) for path in records})


def _record_of(task: Task, logs: Path) -> Path:
    return logs / f"{task.name}.json"


def _command_of(task: Task) -> dict[str, Any]:
    words = [str(word) for word in task.words()]
    read = {word: digest for word in words if (digest := _digest(word)) is not None}
    return {"module": task.module, "words": words, "read": read}


def _digest(word: str) -> str | None:
    """Of a file or a model that is there; None for other words."""
    if os.path.isfile(word):
        return file_digest(word)
    return model_fingerprint(word) if os.path.isfile(os.path.join(word, "config.json")) else None


def _check_as_before(task: Task, logs: Path) -> None:
    """Raises UserError if the task was run, or begun, by another command or from other files."""
    path = _record_of(task, logs)
    if not path.exists():
        if task.done():
            raise UserError(f"{task.name} is there, but not how it was made ({path}): choose another --out")
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), _command_of(task)
    # What it writes was not there when it began.
    read = {word: now["read"].get(word) for word in before["read"]}
    if (before["module"], before["words"], before["read"]) != (now["module"], now["words"], read):
        raise UserError(
            f"{task.name} was made by another command, or from other files, than it would be now ({path}): "
            "choose another --out"
        )


def _completed(todo: Sequence[Task], logs: Path, jobs: int, threads: int) -> Iterator[Task]:
    failed = threading.Event()

    def run(task: Task) -> bool:
        if not failed.is_set():
            try:
                _run(task, logs, threads)
            except BaseException:
                failed.set()
                raise
        return task.done()

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, task): task for task in todo}
        for future in as_completed(running):
            if future.result():  # raises what the task raised, after the others have ended
                yield running[future]


def _run(task: Task, logs: Path, threads: int) -> None:
    from video_opd.training.run_folder import git_commit

    path = logs / f"{task.name}.log"
    asked = _command_of(task)
    if not _record_of(task, logs).exists():
        write_text(_record_of(task, logs), json.dumps({**asked, "commit": git_commit()}, indent=1) + "\n")
    code = run_command(task.module, asked["words"], path, threads)
    if code or not task.done():
        said = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:]
        raise UserError(f"{task.name} ended with exit code {code} ({path}): " + " / ".join(said))
