"""Accuracies of scored rows, with bootstrap intervals over videos. No torch, nothing of lmms-eval.

Two means of a benchmark's subtasks are in use: over the subtasks, each counting the same (TempCompass,
MVBench), and over all questions (Video-MME).

Shapes: ``N`` rows, ``S`` subtasks, ``D`` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from video_opd.evaluation.bootstrap import draws_of_means
from video_opd.suites.benchmarks import BENCHMARKS, Benchmark, Mean, Task
from video_opd.suites.letters import UNREAD

PERCENT = 100.0
MISSING = "missing"  # the rule of a row whose video failed


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """``score`` is 0 or 1, as lmms-eval gave it; ``rule`` says how the answer was read."""

    task: str
    video: str
    score: float
    rule: str
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """``accuracy`` and ``ci95`` in percent; unread and missing rows are wrong, and in ``n``."""

    accuracy: float
    ci95: tuple[float, float]
    n: int
    videos: int
    unparsed: int
    missing: int

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "ci95": list(self.ci95),
            "n": self.n,
            "videos": self.videos,
            "unparsed": self.unparsed,
            "missing": self.missing,
        }


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """A benchmark's accuracy, and that of its subtasks and groups. ``left_out`` are subtasks not run."""

    benchmark: Benchmark
    overall: Accuracy
    tasks: Mapping[str, Accuracy]
    groups: Mapping[str, Accuracy]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.overall.to_json(),
            "mean_over": self.benchmark.mean,
            "tasks": {name: part.to_json() for name, part in self.tasks.items()},
            "left_out": list(self.left_out),
            **({"by": {name: part.to_json() for name, part in self.groups.items()}} if self.groups else {}),
        }


def accuracy(rows: Sequence[ScoredRow], mean: Mean = "questions") -> Accuracy:
    """The accuracy of ``rows`` and its interval: videos are drawn again, with all their rows."""
    assert rows
    tasks = list(dict.fromkeys(row.task for row in rows))
    videos = [row.video for row in rows]
    scores_N = np.array([row.score for row in rows])
    if mean == "questions":
        value, draws_D = scores_N.mean(), draws_of_means(scores_N[:, None], videos)[:, 0]
    else:
        member_NS = np.array([[row.task == task for task in tasks] for row in rows], dtype=np.float64)
        value = float(np.mean((scores_N @ member_NS) / member_NS.sum(axis=0)))
        draws_DC = draws_of_means(np.concatenate([scores_N[:, None] * member_NS, member_NS], axis=1), videos)
        right_DS, all_DS = draws_DC[:, : len(tasks)], draws_DC[:, len(tasks) :]
        # A draw may hold no row of a small subtask: it is then the mean of the others.
        there_DS = all_DS > 0
        shares_DS = np.divide(right_DS, all_DS, out=np.zeros_like(right_DS), where=there_DS)
        draws_D = shares_DS.sum(axis=1) / there_DS.sum(axis=1)
    low, high = np.percentile(draws_D, [2.5, 97.5])
    return Accuracy(
        accuracy=PERCENT * float(value),
        ci95=(PERCENT * float(low), PERCENT * float(high)),
        n=len(rows),
        videos=len(set(videos)),
        unparsed=sum(row.rule == UNREAD for row in rows),
        missing=sum(row.rule == MISSING for row in rows),
    )


def benchmark_scores(rows: Mapping[Task, Sequence[ScoredRow]]) -> list[BenchmarkScore]:
    """One score for each benchmark that has rows, in the fixed order."""
    scores = []
    for benchmark in BENCHMARKS.values():
        ran = [task for task in benchmark.tasks if rows.get(task)]
        if not ran:
            continue
        together = [row for task in ran for row in rows[task]]
        scores.append(
            BenchmarkScore(
                benchmark=benchmark,
                overall=accuracy(together, benchmark.mean),
                tasks={task.name: accuracy(rows[task]) for task in ran},
                groups=_parts(together, lambda row: row.group),
                left_out=tuple(task.name for task in benchmark.tasks if task not in ran),
            )
        )
    return scores


def _parts(rows: Sequence[ScoredRow], key: Callable[[ScoredRow], str | None]) -> dict[str, Accuracy]:
    values = [value for value in dict.fromkeys(map(key, rows)) if value is not None]
    return {value: accuracy([row for row in rows if key(row) == value]) for value in values}
