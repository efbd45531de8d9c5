"""Reads run folders as they are: files that a run has not written (yet) are simply absent.

Only JSON and YAML are loaded, so a report can be made anywhere, also of a run that is still going on. A run
that was killed, or whose disk failed, is read as far as it can be: ``Run.left_out`` says what was not usable.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from video_opd.errors import UserError
from video_opd.reports import records, row_records
from video_opd.reports.records import METRICS
from video_opd.reports.rows import EvaluatedRows, known_protocol, read_rows, with_predictions
from video_opd.reports.run_files import Note, RunFiles
from video_opd.terminal import visible

T = TypeVar("T")

ROLES = ("base", "student", "teacher")  # how models of one run are ordered and coloured
SHOWN_ROLLOUTS = 8  # of the first steps, and as many of the last
ROUND = "round "  # and a number: the student after that round


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
    record: Mapping[str, Any]  # the file, as ``records.metrics_record`` returns it
    stem: str = ""  # its name without .json

    @property
    def best_constant(self) -> float | None:
        """mIoU in percent of the best constant, which ignores the video."""
        return self._control("best_constant", "mIoU")

    @property
    def query_swap(self) -> float | None:
        """Percent of predictions that are nearer their own event than the other query's (chance: 50)."""
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
    rollouts: tuple[Mapping[str, Any], ...] = ()  # the first and the last few
    evaluations: tuple[Evaluation, ...] = ()
    selection: Mapping[str, Any] | None = None
    timelines: tuple[Mapping[str, Any], ...] = ()
    rows: Mapping[str, EvaluatedRows] = field(default_factory=dict)  # by test set
    scores: tuple[Mapping[str, Any], ...] = ()
    selected: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by id, in rank order
    summary: Mapping[str, Any] | None = None  # rounds.json
    rounds: tuple[Run, ...] = ()  # a folder of rounds has them; its other fields join those of all rounds
    number: int = 0  # number of the round, from 1
    left_out: tuple[str, ...] = ()  # a line for each kind of damage that reading passed over

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "")) or "run"

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric; rows that lack it are left out."""
        points = [(row["step"], row[key]) for row in self.metrics if key in row]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def evaluation(self, model: str, testset: str) -> Evaluation | None:
        found = [e for e in self.evaluations if (e.model, e.testset) == (model, testset)]
        return found[0] if found else None

    @property
    def models(self) -> list[str]:
        return in_order({e.model for e in self.evaluations})

    @property
    def student(self) -> str:
        """The name under which the final model was evaluated."""
        rounds = [name for name in self.models if round_number(name)]
        return rounds[-1] if rounds else "student"

    @property
    def testsets(self) -> list[str]:
        return list(dict.fromkeys(e.testset for e in self.evaluations))


def in_order(models: Iterable[str]) -> list[str]:
    """Returns the models in the order of their roles, students by round; models without a role come last."""

    def place(model: str) -> tuple[int, int, str]:
        number = round_number(model)
        role = "student" if number else model
        return (ROLES.index(role) if role in ROLES else len(ROLES), number, model)

    return sorted(models, key=place)


def round_number(model: str) -> int:
    """3 for ``"round 3"``; 0 for any other model."""
    number = model.removeprefix(ROUND)
    return int(number) if number != model and number.isdecimal() else 0


def read_run(folder: str | Path) -> Run:
    """Reads one run folder, or a folder of rounds.

    Raises UserError if the folder is not there or holds nothing of a run that can be read.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; name the folder of a run (run.dir of its recipe)")
    folder = Path(folder)
    files = RunFiles(folder)
    run = _read(files)
    rounds = []
    for name in files.names("", lambda name: bool(_ROUND_FOLDER.fullmatch(name))):
        if not os.path.lexists(folder / name / "recipe.yaml"):
            if os.path.isdir(folder / name):  # a round writes its recipe when it begins to train
                continue
            files.note(name, "no folder of a round")
            continue
        if os.path.realpath(folder / name) == os.path.realpath(folder):
            files.note(name, "a link to its own run")
            continue
        rounds.append(replace(_read(RunFiles(folder / name, f"{name}/")), number=int(name[len("round-") :])))
    run = replace(run, left_out=files.left_out)
    if not (run.recipe or run.metrics or run.evaluations or rounds):
        why = f" that can be read ({'; '.join(run.left_out)})" if run.left_out else ""
        raise UserError(
            f"{folder}: holds no recipe.yaml, metrics.jsonl or eval/*.json{why}; name a run's folder"
        )
    return _together(run, rounds)


_ROUND_FOLDER = re.compile(r"round-[1-9][0-9]{0,5}")


def _read(files: RunFiles) -> Run:
    recipe, recipe_text = files.recipe("recipe.yaml")
    evaluations = _evaluations(files)
    return Run(
        folder=files.folder,
        name=visible(Path(os.path.realpath(files.folder)).name),
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_record(files, "environment.json", records.tree) or {},
        metrics=_by_step(list(files.rows("metrics.jsonl", records.metrics_row))),
        rollouts=_rollouts(files),
        evaluations=evaluations,
        rows=_evaluated_rows(files, evaluations),
        scores=_scores(files),
        selected={row["id"]: row for row in files.rows("selected.jsonl", row_records.selected_row)},
        selection=_record(files, "select.json", records.selection)
        or _record(files, "eval/select.json", records.selection),
        timelines=tuple(files.rows("eval/timelines.jsonl", records.timeline_row)),
        summary=_record(files, "rounds.json", records.rounds_record),
        left_out=files.left_out,
    )


def _rollouts(files: RunFiles) -> tuple[dict[str, Any], ...]:
    """The first and the last rollouts with tokens: those that are shown."""
    first: list[dict[str, Any]] = []
    last: deque[dict[str, Any]] = deque(maxlen=SHOWN_ROLLOUTS)
    for row in files.rows("rollouts.jsonl", row_records.rollout_row):
        if row["tokens"]:
            (first if len(first) < SHOWN_ROLLOUTS else last).append(row)
    return tuple(row | row.pop("details")() for row in (*first, *last))


def _evaluated_rows(files: RunFiles, evaluations: Sequence[Evaluation]) -> dict[str, EvaluatedRows]:
    """The rows of each test set, with the predictions of the models that were evaluated on it."""
    found: dict[str, EvaluatedRows] = {}
    for e in evaluations:
        name = str((e.record.get("protocol") or {}).get("name", ""))
        protocol = known_protocol(name)
        if protocol is None:
            files.note(f"eval/{e.stem}.json", f"protocol {name} is not known here: its rows are not used")
            continue
        if e.testset not in found:
            found[e.testset] = read_rows(files, e.stem.partition("-")[2], protocol)
        if found[e.testset].protocol == protocol:
            miou = e.scores["mIoU"]
            found[e.testset] = with_predictions(found[e.testset], files, e.stem, e.model, miou)
    return {name: rows for name, rows in found.items() if rows.predictions}


def _scores(files: RunFiles) -> tuple[dict[str, Any], ...]:
    """The scores of the pool, one row an id."""
    return tuple({row["id"]: row for row in files.rows("scores.jsonl", row_records.score_row)}.values())


def _record(files: RunFiles, file: str, check: Callable[[dict[str, Any], Note], T | None]) -> T | None:
    record = files.record(file)
    return None if record is None else check(record, lambda reason: files.note(file, reason))


def _together(run: Run, rounds: list[Run]) -> Run:
    """Adds the contents of the rounds to ``run``: their steps one after another, their students by round."""
    if not rounds:
        return run
    metrics: list[Mapping[str, Any]] = []
    rollouts: list[Mapping[str, Any]] = []
    evaluations = list(run.evaluations)
    left_out = list(run.left_out)
    rows = dict(run.rows)
    for each in rounds:
        before = metrics[-1]["step"] if metrics else 0
        metrics += [{**row, "step": before + row["step"]} for row in each.metrics]
        rollouts += [{**row, "step": before + row["step"]} for row in each.rollouts]
        evaluations += [
            replace(e, model=f"{ROUND}{each.number}") for e in each.evaluations if e.model == "student"
        ]
        left_out += each.left_out
        for name, here in each.rows.items():
            before = rows.get(name) or EvaluatedRows(protocol=here.protocol)
            rows[name] = before.with_student(here, f"{ROUND}{each.number}")
    return replace(
        run,
        environment=rounds[-1].environment,
        metrics=tuple(metrics),
        rollouts=tuple(rollouts),
        evaluations=_by_testset(evaluations),
        rounds=tuple(rounds),
        rows=rows,
        left_out=tuple(left_out),
    )


def _evaluations(files: RunFiles) -> tuple[Evaluation, ...]:
    found = []
    for name in files.names("eval", lambda name: name.endswith(".json") and not name.startswith(".")):
        record = _record(files, f"eval/{name}", records.metrics_record)
        if record is None:
            continue  # some other record
        model, _, testset = visible(name.removesuffix(".json")).partition("-")
        found.append(
            Evaluation(
                model=record["model"] or model,
                testset=record["testset"] or testset or "test",
                n=record["n"],
                scores={key: record[key] for key in METRICS if key in record},
                ci95=record["ci95"],
                record=record,
                stem=visible(name.removesuffix(".json")),
            )
        )
    return _by_testset(found)


def _by_testset(found: list[Evaluation]) -> tuple[Evaluation, ...]:
    order = {"short": 0, "long": 1, "subtle": 2}
    return tuple(sorted(found, key=lambda e: (order.get(e.testset, len(order)), e.testset)))


def _by_step(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Keeps one row a step, the last one written: a step that was repeated after a kill counts once."""
    by_step = {row["step"]: row for row in rows}
    return tuple(by_step[step] for step in sorted(by_step))
