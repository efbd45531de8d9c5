"""Reads run folders as they are: files that a run has not written (yet) are simply absent.

Only JSON and YAML are loaded, so a report can be made anywhere, also of a run that is still going on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl

ROLES = ("base", "student", "teacher")  # how models of one run are ordered and coloured
ROUND = "round "  # and a number: the student after that round
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

    @property
    def protocol(self) -> str:
        """``"paper"``, ``"paper, but max_new_tokens 16"``; empty where the file does not say."""
        protocol = self.record.get("protocol")
        if not isinstance(protocol, Mapping):
            return ""
        deviations = protocol.get("deviations") or {}
        others = ", ".join(f"{key} {value}" for key, value in deviations.items())
        return f"{protocol.get('name', '')}, but {others}" if others else str(protocol.get("name", ""))

    def _control(self, name: str, figure: str) -> float | None:
        """Returns a figure of a control, which is written plainly or inside its record."""
        value = self.record.get(name)
        if isinstance(value, Mapping):
            value = value.get(figure)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run folder."""

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
    summary: Mapping[str, Any] | None = None  # rounds.json
    rounds: tuple[Run, ...] = ()  # of a folder of rounds; the other fields are then of all of them together

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

        def place(name: str) -> tuple[int, int, str]:
            number = round_number(name)
            role = "student" if number else name
            return (ROLES.index(role) if role in ROLES else len(ROLES), number, name)

        return sorted(names, key=place)

    @property
    def student(self) -> str:
        """The name under which the final model was evaluated."""
        rounds = [name for name in self.models if round_number(name)]
        return rounds[-1] if rounds else "student"

    @property
    def testsets(self) -> list[str]:
        return list(dict.fromkeys(e.testset for e in self.evaluations))


def round_number(model: str) -> int:
    """3 for ``"round 3"``; 0 for any other model."""
    number = model.removeprefix(ROUND)
    return int(number) if number != model and number.isdecimal() else 0


def read_run(folder: str | Path) -> Run:
    """Reads one run folder, or a folder of rounds.

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
        summary=_json(folder / "rounds.json"),
    )
    if not (run.recipe or run.metrics or run.evaluations):
        raise UserError(f"{folder}: holds no recipe.yaml, metrics.jsonl or eval/*.json; name a run's folder")
    found = sorted(folder.glob("round-*"), key=lambda path: (len(path.name), path.name))
    return _together(run, [read_run(path) for path in found if (path / "recipe.yaml").exists()])


def _together(run: Run, rounds: list[Run]) -> Run:
    """Adds the contents of the rounds to ``run``: their steps one after another, their students by round."""
    if not rounds:
        return run
    metrics: list[Mapping[str, Any]] = []
    rollouts: list[Mapping[str, Any]] = []
    evaluations = list(run.evaluations)
    for number, part in enumerate(rounds, start=1):
        before = metrics[-1]["step"] if metrics else 0
        metrics += [{**row, "step": before + row["step"]} for row in part.metrics]
        rollouts += [{**row, "step": before + row["step"]} for row in part.rollouts if "step" in row]
        evaluations += [
            replace(e, model=f"{ROUND}{number}") for e in part.evaluations if e.model == "student"
        ]
    return replace(
        run,
        environment=rounds[-1].environment,
        metrics=tuple(metrics),
        rollouts=tuple(rollouts),
        evaluations=_in_order(evaluations),
        rounds=tuple(rounds),
    )


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
                ci95={k: (float(ci[0]), float(ci[1])) for k, ci in (record.get("ci95") or {}).items() if ci},
                record=record,
            )
        )
    return _in_order(found)


def _in_order(found: list[Evaluation]) -> tuple[Evaluation, ...]:
    order = {"short": 0, "long": 1, "subtle": 2}
    return tuple(sorted(found, key=lambda e: (order.get(e.testset, len(order)), e.testset)))


def _by_step(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Keeps one row a step, the last one written: a step that was repeated after a kill counts once."""
    by_step = {row["step"]: row for row in rows if _is_number(row.get("step"))}
    return tuple(by_step[step] for step in sorted(by_step))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Reads a file that may be missing, or be written at this moment (a half last line is ignored)."""
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
