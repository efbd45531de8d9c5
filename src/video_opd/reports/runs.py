"""Run folders, read as they are: whatever a run has not written (yet) is simply absent.

Nothing is loaded but JSON and YAML, so a report can be made anywhere, also of a run that is still going on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl

ROLES = ("base", "student", "teacher")  # how models of one run are ordered and coloured
METRICS = ("mIoU", "R@0.3", "R@0.5", "R@0.7")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One metrics file: a model on a test set. Scores are percent.

    Example: ``Evaluation(model="student", testset="short", n=96, scores={"mIoU": 61.0},
    ci95={"mIoU": (55.2, 66.1)}, record={...})``.
    """

    model: str
    testset: str
    n: int
    scores: Mapping[str, float]
    ci95: Mapping[str, tuple[float, float]]
    record: Mapping[str, Any]  # the file as it is

    @property
    def best_constant(self) -> float | None:
        """mIoU in percent of the best answer that ignores the video."""
        return self._control("best_constant", "mIoU")

    @property
    def query_swap(self) -> float | None:
        """Percent of answers that are nearer to their own event than to the other query's (chance: 50)."""
        return self._control("query_swap", "share")

    def _control(self, name: str, figure: str) -> float | None:
        """A figure of a control: written plainly or inside its record."""
        value = self.record.get(name)
        if isinstance(value, Mapping):
            value = value.get(figure)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds."""

    folder: Path
    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    rollouts: tuple[Mapping[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    selection: Mapping[str, Any] | None = None
    timelines: tuple[Mapping[str, Any], ...] = ()

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "")) or "run"

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric; rows that lack it are left out."""
        points = [(row["step"], row[key]) for row in self.metrics if _is_number(row.get(key))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def evaluation(self, model: str, testset: str) -> Evaluation | None:
        found = [e for e in self.evaluations if (e.model, e.testset) == (model, testset)]
        return found[0] if found else None

    @property
    def models(self) -> list[str]:
        names = dict.fromkeys(e.model for e in self.evaluations)
        return sorted(names, key=lambda name: (ROLES.index(name) if name in ROLES else len(ROLES), name))

    @property
    def testsets(self) -> list[str]:
        return list(dict.fromkeys(e.testset for e in self.evaluations))


def read_run(folder: str | Path) -> Run:
    """Reads one run folder.

    Raises UserError when the folder is not there, holds nothing of a run, or holds a file that is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a run (run.dir of its recipe)")
    recipe_path = folder / "recipe.yaml"
    recipe_text = recipe_path.read_text(encoding="utf-8") if recipe_path.exists() else ""
    run = Run(
        folder=folder,
        name=folder.resolve().name,
        recipe=_yaml(recipe_text, recipe_path),
        recipe_text=recipe_text,
        environment=_json(folder / "environment.json") or {},
        metrics=_by_step(_rows(folder / "metrics.jsonl")),
        rollouts=tuple(_rows(folder / "rollouts.jsonl")),
        evaluations=_evaluations(folder / "eval"),
        selection=_json(folder / "select.json") or _json(folder / "eval" / "select.json"),
        timelines=tuple(_rows(folder / "eval" / "timelines.jsonl")),
    )
    if not (run.recipe or run.metrics or run.evaluations):
        raise UserError(f"{folder}: holds no recipe.yaml, metrics.jsonl or eval/*.json; name a run's folder")
    return run


def _evaluations(folder: Path) -> tuple[Evaluation, ...]:
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        record = _json(path) or {}
        if not _is_number(record.get("mIoU")):
            continue  # some other record
        model, _, testset = path.stem.partition("-")
        found.append(
            Evaluation(
                model=str(record.get("model") or model),
                testset=str(record.get("testset") or testset or "test"),
                n=int(record.get("n") or 0),
                scores={key: float(record[key]) for key in METRICS if _is_number(record.get(key))},
                ci95={key: (float(lo), float(hi)) for key, (lo, hi) in (record.get("ci95") or {}).items()},
                record=record,
            )
        )
    order = {"short": 0, "long": 1, "subtle": 2}
    return tuple(sorted(found, key=lambda e: (order.get(e.testset, len(order)), e.testset)))


def _by_step(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """One row a step, the last one written: a step that was repeated after a kill counts once."""
    by_step = {row["step"]: row for row in rows if _is_number(row.get("step"))}
    return tuple(by_step[step] for step in sorted(by_step))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may be missing, or be written at this moment (a half last line is ignored)."""
    if not path.exists():
        return []
    rows = []
    try:
        for _, row in read_jsonl(path):
            rows.append(row)
    except UserError as error:
        whole_lines = path.read_bytes().count(b"\n")
        if f"{path}:{whole_lines + 1}:" not in str(error):
            raise
    return rows


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it or write it again") from None
    return value if isinstance(value, dict) else None


def _yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({getattr(error, 'problem', error)}); write it again") from None
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
