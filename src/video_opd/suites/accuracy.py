"""Accuracies of scored rows, with bootstrap intervals over videos. Neither torch nor lmms-eval is imported.

A benchmark's accuracy is the mean over its subtasks, each counting the same (TempCompass, MVBench), or the
mean over all of its questions (Video-MME).

Shapes: ``N`` rows, ``S`` subtasks, ``D`` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from video_opd.evaluation.bootstrap import Interval95, draws_of_means, percentiles95
from video_opd.suites.benchmarks import BENCHMARKS, Benchmark, Mean, Task
from video_opd.suites.letters import UNREAD

PERCENT = 100.0
MISSING = "missing"  # the rule of a row whose video failed


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """``score`` is lmms-eval's, 0 or 1; ``rule`` is the rule of letters.py that read the response."""

    task: str
    video: str
    score: float
    rule: str
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """``accuracy`` and ``ci95`` in percent; unread and missing rows are wrong, and in ``n``."""

    accuracy: float
    ci95: Interval95
    n: int
    videos: int
    unparsed: int
    missing: int

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "ci95": self.ci95,
            "n": self.n,
            "videos": self.videos,
            "unparsed": self.unparsed,
            "missing": self.missing,
        }


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """The accuracy of a benchmark, of its subtasks and its groups. ``left_out`` names subtasks not run."""

    benchmark: Benchmark
    overall: Accuracy
    tasks: Mapping[str, Accuracy]
    groups: Mapping[str, Accuracy]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.overall.to_json(),
            "mean_over": self.benchmark.mean,
            "tasks": {name: found.to_json() for name, found in self.tasks.items()},
            "left_out": list(self.left_out),
            **({"by": {name: found.to_json() for name, found in self.groups.items()}} if self.groups else {}),
        }


def accuracy(rows: Sequence[ScoredRow], mean: Mean = "questions") -> Accuracy:
    """The accuracy of ``rows`` with its interval; the bootstrap draws videos with all of their rows."""
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
        # A draw may hold no row of a small subtask; it is then the mean of the other subtasks.
        there_DS = all_DS > 0
        shares_DS = np.divide(right_DS, all_DS, out=np.zeros_like(right_DS), where=there_DS)
        draws_D = shares_DS.sum(axis=1) / there_DS.sum(axis=1)
    (interval,) = percentiles95(PERCENT * draws_D[:, None], len(set(videos)))
    return Accuracy(
        accuracy=PERCENT * float(value),
        ci95=interval,
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
                groups=_by_value(together, lambda row: row.group),
                left_out=tuple(task.name for task in benchmark.tasks if task not in ran),
            )
        )
    return scores


def _by_value(rows: Sequence[ScoredRow], key: Callable[[ScoredRow], str | None]) -> dict[str, Accuracy]:
    values = [value for value in dict.fromkeys(map(key, rows)) if value is not None]
    return {value: accuracy([row for row in rows if key(row) == value]) for value in values}
