"""The benchmarks, their subtasks in lmms-eval, and the schemas of their rows. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from video_opd.errors import UserError

LMMS_EVAL = "0.7.3"  # the release whose prompts and scoring are used
# The names of our task files begin with it: lmms-eval silently prefers its own file of the same name.
PREFIX = "vopd_"

Mean: TypeAlias = Literal["subtasks", "questions"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of lmms-eval.

    Example: ``Task(name="mvbench_action_count", benchmark="mvbench", subset="action_count",
    stock="mvbench/mvbench_action_count.yaml", hook="mvbench")``.
    """

    name: str
    benchmark: str
    subset: str  # the name of its rows: the stem of a file, a configuration on the hub
    stock: str  # lmms-eval's task file, relative to its folder of tasks
    hook: str  # the function of hooks.py that scores a row
    judged: bool = False  # only a judge model can score it

    @property
    def prefixed(self) -> str:
        return PREFIX + self.name


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """``keys`` are the keys that a row must have, with the type of each value.

    ``metric`` is lmms-eval's name of the accuracy, ``mean`` says what it is averaged over. ``group_by`` is a
    key: the results hold the accuracy of each of its values, too.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    metric: str
    mean: Mean
    keys: Mapping[str, type]
    group_by: str | None = None


MVBENCH_SUBSETS = (
    "action_sequence",
    "action_prediction",
    "action_antonym",
    "fine_grained_action",
    "unexpected_action",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "moving_direction",
    "action_localization",
    "scene_transition",
    "action_count",
    "moving_count",
    "moving_attribute",
    "state_change",
    "fine_grained_pose",
    "character_order",
    "egocentric_navigation",
    "episodic_reasoning",
    "counterfactual_inference",
)


def _tempcompass(name: str, subset: str, file: str, judged: bool = False) -> Task:
    return Task(
        name=f"tempcompass_{name}",
        benchmark="tempcompass",
        subset=subset,
        stock=f"tempcompass/{file}.yaml",
        hook=f"tempcompass_{name}",
        judged=judged,
    )


BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="tempcompass",
            title="TempCompass",
            tasks=(
                _tempcompass("multi_choice", "multi-choice", "tempcompass_mc"),
                _tempcompass("yes_no", "yes_no", "tempcompass_yes_no"),
                _tempcompass("caption_matching", "caption_matching", "tempcompass_caption_matching"),
                _tempcompass("captioning", "captioning", "tempcompass_captioning", judged=True),
            ),
            metric="avg_accuracy",
            mean="subtasks",
            keys={"video_id": str, "question": str, "answer": str, "dim": str},
            group_by="dim",
        ),
        Benchmark(
            name="mvbench",
            title="MVBench",
            tasks=tuple(
                Task(
                    name=f"mvbench_{subset}",
                    benchmark="mvbench",
                    subset=subset,
                    stock=f"mvbench/mvbench_{subset}.yaml",
                    hook="mvbench",
                )
                for subset in MVBENCH_SUBSETS
            ),
            metric="mvbench_accuracy",
            mean="subtasks",
            keys={"video": str, "question": str, "candidates": list, "answer": str},
        ),
        Benchmark(
            name="videomme",
            title="Video-MME",
            tasks=(
                Task(
                    name="videomme",
                    benchmark="videomme",
                    subset="test",
                    stock="videomme/videomme.yaml",
                    hook="videomme",
                ),
            ),
            metric="videomme_perception_score",
            mean="questions",
            keys={
                "videoID": str,
                "question_id": str,
                "question": str,
                "options": list,
                "answer": str,
                "duration": str,
                "domain": str,
                "sub_category": str,
                "task_type": str,
            },
            group_by="duration",
        ),
    )
}

CAPTIONING_KEYS: Mapping[str, type] = {
    "video_id": str,
    "question": str,
    "mc_question": str,
    "mc_answer": str,
    "dim": str,
}


def keys_of(task: Task) -> Mapping[str, type]:
    """The keys that a row of the task must have, with the type of each value."""
    return CAPTIONING_KEYS if task.judged else BENCHMARKS[task.benchmark].keys


def choose_tasks(
    only: Sequence[str] | None = None, skip: Sequence[str] = (), *, judge: bool = False
) -> list[Task]:
    """The tasks that ``only`` names (all if it is None) without those that ``skip`` names, in a fixed order.

    A name is that of a benchmark or of a task. A task that needs a judge is left out without ``judge``.
    Raises :class:`UserError` for an unknown name, and if no task is left.
    """
    every = [task for benchmark in BENCHMARKS.values() for task in benchmark.tasks]
    known = {*BENCHMARKS, *(task.name for task in every)}
    for name in (*(only or ()), *skip):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)
            raise UserError(f"no benchmark or task {name!r}; did you mean {near[0]!r}?")
    named = {task.name for task in every if task.judged and task.name in (only or ())}
    if named and not judge:
        raise UserError(f"{', '.join(sorted(named))}: only a judge model can score it; add --judge")

    def among(task: Task, names: Iterable[str]) -> bool:
        return not {task.name, task.benchmark}.isdisjoint(names)

    chosen = [
        task
        for task in every
        if (only is None or among(task, only)) and not among(task, skip) and (judge or not task.judged)
    ]
    if not chosen:
        raise UserError("no task is left: take something out of --skip")
    return chosen


def check_row(row: Mapping[str, Any], keys: Mapping[str, type], where: str) -> None:
    """Raises :class:`UserError`, beginning with ``where``, for a missing key or a value of another type."""
    for key, kind in keys.items():
        value = row.get(key)
        right = isinstance(value, kind) and (
            not isinstance(value, list) or all(isinstance(x, str) for x in value)
        )
        if not right:
            wanted = "a list of strings" if kind is list else "a string"
            found = "is missing" if key not in row else f"is {value!r}"
            raise UserError(f'{where}: "{key}" {found}; it must be {wanted}')
