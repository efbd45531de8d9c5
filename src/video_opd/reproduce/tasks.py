"""Commands that are run several at a time. What is finished is not run again, so a killed run continues.

Beside what a command says stands ``NAME.json``: its words, the digests of what it was given to read, and the
commit. What was made by other words, or from other files, is not taken for what is asked for.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
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
    there is nothing left to do; ``seconds`` is its expected time on one thread. ``after`` names the tasks
    that it waits for; None: all those of the stages before.
    """

    name: str  # unique; its output is kept in ``name + ".log"``
    words: Callable[[], Sequence[Any]]
    done: Callable[[], bool]
    seconds: float
    module: str = "video_opd"
    after: tuple[str, ...] | None = None

    def waiting_for(self, *others: Task) -> Task:
        """The same task, which waits for no others than these."""
        return replace(self, after=tuple(task.name for task in others))


Stage = Sequence[Task]
"""Tasks that do not wait for one another, but for those of the stages before."""


def settings_words(settings: Mapping[str, Any]) -> Iterator[str]:
    """``--key value`` for each setting of a recipe; a text is YAML, as on a command line."""
    for key, value in settings.items():
        yield from (f"--{key}", value) if isinstance(value, str) else override_words({key: value})


def expected_seconds(stages: Iterable[Stage], jobs: int) -> float:
    """How long the tasks that are not done will take, if ``jobs`` of them share the machine evenly."""
    return sum(task.seconds for stage in stages for task in stage if not task.done()) / jobs


def run_stages(stages: Sequence[Stage], logs: Path, jobs: int) -> None:
    """Runs the tasks that are not done, ``jobs`` at a time, each on its share of the cores.

    A stage waits for those before it; a task of it that says so waits for less (:attr:`Task.after`). Raises
    UserError with the last lines of a task that fails, after the tasks beside it have ended; repeated, the
    others are not run again. It is raised, too, before a stage in which something was made by another command
    or from other files.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    total_s, done_s, began = expected_seconds(stages, jobs), 0.0, time.monotonic()
    count = sum(not task.done() for stage in stages for task in stage)
    numbers = itertools.count(1)
    schedule = _Schedule(stages, logs)
    running: dict[Future[None], Task] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while running or schedule.ready():
            for task in schedule.start(jobs - len(running)):
                running[pool.submit(_run, task, logs, threads)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()  # raises what the task raised, after the others have ended
                task = running.pop(future)
                schedule.finish(task)
                done_s += task.seconds / jobs
                left_s = (total_s - done_s) * (time.monotonic() - began) / done_s  # at this machine's pace
                log(f"{next(numbers)} of {count} done ({task.name}), about {duration(left_s)} left")


class _Schedule:
    """Which tasks may start: those that wait for no unfinished one."""

    def __init__(self, stages: Sequence[Stage], logs: Path) -> None:
        self._logs = logs
        self._waiting: list[tuple[Task, frozenset[str]]] = []  # with the names of those it waits for
        self._ready: list[Task] = []
        self._finished: set[str] = set()
        self._stage_of = {task.name: number for number, stage in enumerate(stages) for task in stage}
        before: frozenset[str] = frozenset()
        for stage in stages:
            for task in stage:
                self._waiting.append((task, before if task.after is None else frozenset(task.after)))
            before |= {task.name for task in stage}

    def ready(self) -> list[Task]:
        """The tasks that may start. Those that are done count as finished."""
        while opened := [task for task, after in self._waiting if after <= self._finished]:
            names = {task.name for task in opened}
            self._waiting = [(task, after) for task, after in self._waiting if task.name not in names]
            for task in opened:
                _check_as_before(task, self._logs)
            done = {task.name for task in opened if task.done()}
            self._finished |= done
            self._ready += [task for task in opened if task.name not in done]
        # The longest of a stage first, so that no core waits long for the last one.
        self._ready.sort(key=lambda task: (self._stage_of[task.name], -task.seconds))
        return self._ready

    def start(self, most: int) -> list[Task]:
        """The first ones, at most ``most``; they are no longer ready."""
        started, self._ready = self.ready()[:most], self._ready[most:]
        return started

    def finish(self, task: Task) -> None:
        self._finished.add(task.name)


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
