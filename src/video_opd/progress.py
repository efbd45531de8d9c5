"""Progress on stderr: bars on a terminal, plain lines elsewhere.

Of several processes only the first prints anything. torchrun and Accelerate say in ``RANK`` which one it is.

Example::

    for batch in track(batches, "predicting", total=len(batches)):
        ...
    with task("training", total=40) as bar:
        bar.advance(note="reverse KL 0.31")
    log("wrote runs/a/report.html")
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from video_opd.terminal import visible

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

LINE_EVERY_S = 10.0  # the time between two plain lines of one task


def log(message: str) -> None:
    """Prints one line on stderr, above the bars if there are any."""
    if not is_first_process():
        return
    message = visible(message, keep="\n")
    if _Bars.live is not None:
        _Bars.live.console.print(message, markup=False, highlight=False, emoji=False)
    else:
        _print(message)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows how many are done. ``total`` defaults to the length of the iterable."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with task(description, total) as bar:
        for item in iterable:
            yield item
            bar.advance()


@contextmanager
def task(description: str, total: int | None = None) -> Iterator[Task]:
    """A task whose progress the caller reports with :meth:`Task.advance`."""
    if not is_first_process():
        yield Task(lambda done, note, total: None, total)
    elif sys.stderr.isatty():
        with _Bars.shown(description, total) as report:
            yield Task(report, total)
    else:
        lines = _Lines(description, total)
        yield Task(lines.report, total)
        lines.finish()


class Task:
    """Counts the items that are done. ``note`` is shown beside the count, a loss for example.

    ``total`` may be set anew where the number of items becomes known on the way.
    """

    def __init__(self, report: Callable[[int, str, int | None], None], total: int | None) -> None:
        self.done, self.total = 0, total
        self._report = report

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self._report(self.done, note, self.total)


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # work goes on if stderr is full or closed
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``"48 s"``, ``"3 min 05 s"``, ``"2 h 07 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def is_first_process() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


class _Lines:
    """Prints a line about a task every ten seconds and when it ends."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total = description, total
        self.started_s = self.last_s = time.monotonic()
        self.done = 0

    def report(self, done: int, note: str, total: int | None) -> None:
        self.done, self.total = done, total
        now_s = time.monotonic()
        if now_s - self.last_s >= LINE_EVERY_S and done != self.total:
            self.last_s = now_s
            self._print(now_s - self.started_s, note)

    def finish(self) -> None:
        if self.done:
            self._print(time.monotonic() - self.started_s, "")

    def _print(self, spent_s: float, note: str) -> None:
        count = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        text = f"{self.description}: {count}, {duration(spent_s)}"
        if self.total and 0 < self.done < self.total:
            text += f", about {duration(spent_s / self.done * (self.total - self.done))} left"
        _print(visible(text + (f", {note}" if note else "")))


class _Bars:
    """One rich display for all open tasks, because rich allows one display a terminal."""

    live: Progress | None = None
    open_tasks = 0

    @classmethod
    @contextmanager
    def shown(cls, description: str, total: int | None) -> Iterator[Callable[[int, str, int | None], None]]:
        from rich import progress as rich_progress
        from rich.console import Console

        if cls.live is None:
            cls.live = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("left"),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            cls.live.start()
        cls.open_tasks += 1
        live = cls.live
        task_id = live.add_task(description, total=total, note="")
        try:
            yield lambda done, note, total: live.update(task_id, completed=done, note=note, total=total)
        finally:
            cls.open_tasks -= 1
            live.stop_task(task_id)
            if cls.open_tasks == 0:
                live.stop()
                cls.live = None
