"""Several rounds of TVDF (section 3.2, table 6): each trains the last student on what it has not learned yet.

    (score → gate → rank → select → train → evaluate)*, in RUN/round-1, RUN/round-2, …

Every stage does what the command of the same name does, and is skipped if its files are there. A round is a
run folder with three more files: ``scores.jsonl``, ``selected.jsonl`` and, when both are complete,
``select.json``. If the rounds are killed and repeated, they end the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from video_opd.algorithms.registry import make_reward
from video_opd.config import GRPORecipe, Recipe, dump_recipe
from video_opd.curriculum.pool import inference_configs, score_pool
from video_opd.curriculum.score_files import read_scores
from video_opd.curriculum.scores import ScoreSettings
from video_opd.curriculum.terminal import summary_lines
from video_opd.curriculum.tvdf import select_file
from video_opd.data.annotations import read_annotations, read_samples
from video_opd.errors import UserError
from video_opd.evaluation.rows import METRICS
from video_opd.files import write_text
from video_opd.locks import locked_folder
from video_opd.models.inference import chosen_device, with_video_form
from video_opd.models.loading import release_memory
from video_opd.processes import Processes, launched_count
from video_opd.progress import log
from video_opd.serving.connect import check_served_teacher
from video_opd.training.components import build_components, check_libraries
from video_opd.training.digests import file_digest, with_own_digest
from video_opd.training.final_evaluation import (
    check_evaluation_files,
    evaluate_base,
    evaluate_teacher,
    is_evaluated,
)
from video_opd.training.launch import check_launch, check_trackers, make_accelerator, processes_of
from video_opd.training.loop import Build, train
from video_opd.training.run_folder import RunFolder, read_record
from video_opd.training.run_plan import plan_of_run
from video_opd.types import Sample

_COUNTS = {"rows", "used_before", "unannotated", "unscored", "unmeasured", "failed_gate"}
_COUNTS |= {"candidates", "selected", "shortfall"}


@dataclass(frozen=True, kw_only=True)
class RoundsResult:
    """The places of the rounds' results. ``summary`` is the content of ``rounds.json``."""

    path: Path
    model: Path  # the last round's
    summary: dict[str, Any]


def run_rounds(
    recipe: Recipe, build: Build = build_components, after_round: Callable[[Path], object] | None = None
) -> RoundsResult:
    """Runs all rounds. Rounds that were killed are continued; finished ones return at once.

    ``after_round`` is called with the folder after each round and at the end. Raises :class:`UserError` for
    what a user can get wrong, at the earliest moment, if another command is writing in the folder, and if the
    first selection is empty. A later empty selection ends the rounds, and ``rounds.json`` says so.
    """
    recipe.check_rounds()
    check_launch(recipe)
    recipe = with_video_form(recipe)
    several = launched_count() > 1
    processes = processes_of(make_accelerator(recipe)) if several else Processes()
    rounds = Rounds(recipe, build, processes)
    with locked_folder(rounds.folder.path, processes):
        processes.on_first(rounds.open)
        return _run(rounds, after_round or (lambda folder: None))


def _run(rounds: Rounds, after_round: Callable[[Path], object]) -> RoundsResult:
    if not rounds.processes.on_first(lambda: rounds.finished):
        rounds.run(after_round)
    else:
        log(f"{rounds.folder.path} is finished: nothing to do")
    rounds.processes.on_first(lambda: after_round(rounds.folder.path))
    summary = json.loads(rounds.summary.read_text(encoding="utf-8"))
    model = rounds.folder.path / summary["rounds"][-1]["model"]
    return RoundsResult(path=rounds.folder.path, model=model, summary=summary)


class Rounds:
    """The rounds of one folder, and the objects that they share."""

    def __init__(self, recipe: Recipe, build: Build, processes: Processes) -> None:
        self.recipe, self.build, self.processes = recipe, build, processes
        self.folder = RunFolder(recipe.run.dir)
        self.summary = self.folder.path / "rounds.json"

    def open(self) -> None:
        """Makes the folder these rounds' own. It raises as :meth:`RunFolder.claim_for_rounds` does."""
        self.folder.claim_for_rounds(self.recipe)
        self.folder.discard_unfinished()

    @property
    def finished(self) -> bool:
        record = read_record(self.summary)
        if record is None or record.get("finished") is not True:
            return False
        rounds = record.get("rounds")
        if not isinstance(rounds, list) or not rounds or not all(map(_names_model, rounds)):
            return False
        return not RunFolder(self.folder.round(len(rounds))).damaged_folders()  # its model is the result

    def run(self, after_round: Callable[[Path], object]) -> None:
        count, on_first = self.recipe.rounds.count, self.processes.on_first
        on_first(self._check)
        data = self.recipe.data
        self.samples = on_first(lambda: read_samples(data.train, data.video_root)[: data.limit])
        self._check_memory()
        self._evaluate_others()
        done, ended = 0, None
        for number in range(1, count + 1):
            self._select(number)
            ended, trained = on_first(partial(self._prepare, number))
            if ended is not None:
                break
            if not trained:
                log(f"round {number} of {count}: training")
                train(self.round_recipe(number), self.build)
                release_memory()
            done = number
            on_first(partial(self._end_round, done, after_round))
        on_first(partial(self._end, done, ended))
        log(f"{done} of {count} rounds are done" + (f"; {ended}" if ended else ""))

    def _check(self) -> None:
        """Finds what is wrong with the recipe's files before hours are spent."""
        recipe = self.recipe
        check_libraries(recipe)
        check_evaluation_files(recipe)
        check_trackers(recipe)
        if isinstance(recipe, GRPORecipe):
            make_reward(recipe)
        if recipe.teacher.urls and self._asks_teacher:  # before the pool is scored
            check_served_teacher(recipe, recipe.model.path)

    def _check_memory(self) -> None:
        """Finds a GPU that is surely too small to train on. The first selection is not known yet, so its
        videos are taken to be the shortest ones of the pool."""
        recipe = self.recipe
        shortest = sorted(self.samples, key=_known_duration_s)[: recipe.tvdf.k]
        device = torch.device(chosen_device(None))
        plan_of_run(recipe, shortest, device, self.processes.count, say=lambda line: None)

    @property
    def _asks_teacher(self) -> bool:
        """Whether a part of the rounds that is still to do may ask the teacher."""
        recipe = self.recipe
        evaluated = not recipe.evaluate.data or is_evaluated("teacher", recipe, self.folder.evaluations)
        last = RunFolder(self.folder.round(recipe.rounds.count))
        selected = not recipe.tvdf.asks_teacher or _selection(last) is not None
        return recipe.asks_servers or not (evaluated and selected)

    def _prepare(self, number: int) -> tuple[str | None, bool]:
        """Returns (why a round has nothing to train on, whether it was trained before)."""
        folder = RunFolder(self.folder.round(number))
        ended = _nothing_selected(number, _selection(folder) or {})
        trained = folder.finished and not folder.damaged_folders()  # the next round begins with its model
        if ended is None and not trained:
            # Written anew, because the folder may have been moved. It follows from the run's recipe.
            write_text(folder.recipe, dump_recipe(self.round_recipe(number)))
        return ended, trained

    def _end_round(self, number: int, after_round: Callable[[Path], object]) -> None:
        self._write_summary(number, None, finished=False)
        after_round(self.folder.path)

    def _end(self, done: int, ended: str | None) -> None:
        if not done:
            raise UserError(f"{self.folder.path}: {ended}")
        self._write_summary(done, ended, finished=True)

    def round_recipe(self, number: int) -> Recipe:
        """Returns a round's recipe for ``train``: it starts from the last student, with new rows and seed."""
        recipe, folder = self.recipe, self.folder.round(number)
        return recipe.changed(
            **{
                "model.path": self._student(number),
                "data.train": str(folder / "selected.jsonl"),
                "data.limit": None,
                "run.dir": str(folder),
                "run.seed": recipe.run.seed + number - 1,
            }
        )

    def _student(self, number: int) -> str:
        """The model that a round starts from."""
        return self.recipe.model.path if number == 1 else str(self.folder.round(number - 1) / "model")

    def _evaluate_others(self) -> None:
        """Evaluates the base and the teacher, which the rounds are compared with."""
        recipe, out = self.recipe, self.folder.evaluations
        models = {"base": evaluate_base, "teacher": evaluate_teacher}
        for name, evaluate in models.items():
            if not recipe.evaluate.data or (name == "teacher" and not recipe.teacher.named):
                continue
            if self.processes.on_first(partial(is_evaluated, name, recipe, out)):
                continue
            evaluate(recipe, out, self.processes)
            release_memory()

    def _select(self, number: int) -> None:
        """Writes ``scores.jsonl``, then ``selected.jsonl``, then ``select.json``.

        The processes divide the scoring among themselves. The scores are lazy if the strategy allows it.
        """
        recipe, tvdf, folder = self.recipe, self.recipe.tvdf, self.folder.round(number)
        if self.processes.on_first(lambda: _selection(RunFolder(folder)) is not None):
            return
        used = set() if recipe.rounds.reuse else self.processes.on_first(partial(self._used, number))
        wanted = [s for s in self.samples if s.id not in used and (s.spans or not tvdf.gated)]
        log(f"round {number} of {recipe.rounds.count}: scoring {len(wanted)} rows of the pool")
        student, teacher = inference_configs(self.round_recipe(number))
        scored = score_pool(
            student,
            teacher if tvdf.asks_teacher else None,
            wanted,
            folder / "scores.jsonl",
            settings=ScoreSettings.of(recipe),
            for_topk=tvdf.for_topk,
            batch_size=tvdf.batch_size,
            cache_dir=recipe.data.cache_dir,
            teacher_from=[
                self.folder.round(n) / "scores.jsonl" for n in range(1, number) if tvdf.asks_teacher
            ],
            repeatable=True,
            processes=self.processes,
        )
        release_memory()
        self.processes.on_first(partial(self._check_failed_share, scored.failed, len(wanted)))
        self.processes.on_first(partial(self._choose, number, used))

    def _check_failed_share(self, failed: int, rows: int) -> None:
        """A selection is final. A disk that is away for some minutes must not decide it."""
        share = self.recipe.data.max_failed_share
        if failed > share * rows:
            raise UserError(
                f"the videos of {failed} of the {rows} rows that were to be scored cannot be read, more than "
                f"{share:.0%}: video-opd data check says why; repeat the command, which scores the missing "
                "rows, or raise data.max_failed_share"
            )

    def _choose(self, number: int, used: set[str]) -> None:
        """Selects by the scores."""
        recipe, tvdf, folder = self.recipe, self.recipe.tvdf, self.folder.round(number)
        _, summary = select_file(
            recipe.data.train,
            folder / "scores.jsonl",
            tvdf,
            seed=recipe.run.seed + number - 1,
            exclude=used,
            video_root=recipe.data.video_root,
            out=folder / "selected.jsonl",
        )
        for line in summary_lines(summary):
            log(line)
        record = {
            **summary.to_json(),
            "delta": _deltas_scored(folder),  # here, because scores.jsonl may be changed later
            "sha256": file_digest(folder / "selected.jsonl"),
        }
        write_text(folder / "select.json", with_own_digest(record))

    def _used(self, number: int) -> set[str]:
        """The ids that earlier rounds trained on."""
        files = [self.folder.round(n) / "selected.jsonl" for n in range(1, number)]
        return {sample.id for file in files for sample in read_annotations(file).samples}

    def _write_summary(self, done: int, ended: str | None, *, finished: bool) -> None:
        """Writes ``rounds.json``, which is a function of the other files."""
        out = self.folder.evaluations
        summary = {
            "base": self._figures("base", out),
            "teacher": self._figures("teacher", out),
            "rounds": [self._record(number) for number in range(1, done + 1)],
            "ended": ended,
            "finished": finished,
        }
        write_text(self.summary, with_own_digest(summary))

    def _record(self, number: int) -> dict[str, Any]:
        folder = RunFolder(self.folder.round(number))
        chosen = {"not_asked": 0, **(_selection(folder) or {})}  # 0: from before there were lazy scores
        counts = ("rows", "used_before", "unannotated", "unscored", "unmeasured", "failed_gate")
        rows = read_annotations(folder.path / "selected.jsonl").samples
        blocks = [sample.row.get("tvdf") for sample in rows]
        deltas = [block.get("delta") for block in blocks if isinstance(block, dict)]
        return {
            "round": number,
            "model": folder.model.relative_to(self.folder.path).as_posix(),
            **{key: chosen[key] for key in (*counts, "not_asked", "candidates", "selected", "shortfall")},
            "used": len(self._used(number + 1)),
            "delta": {
                # Earlier versions did not note it with the selection.
                "scored": chosen.get("delta") or _deltas_scored(folder.path),
                "selected": _statistics(deltas),
            },
            "steps": folder.last_metrics().get("step", 0),
            "evaluation": self._figures("student", folder.evaluations),
        }

    def _figures(self, name: str, folder: Path) -> dict[str, Any]:
        """The figures that table 6 shows of a model, by data file."""
        keys = ("n", *METRICS, "ci95", "unparsed", "missing")
        figures = {}
        for path in map(Path, self.recipe.evaluate.data):
            file = folder / f"{name}-{path.stem}.json"
            if (record := read_record(file)) is not None:
                figures[path.stem] = {key: record.get(key) for key in keys}
        return figures


def _known_duration_s(sample: Sample) -> float:
    return math.inf if sample.duration_s is None else sample.duration_s


def _names_model(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("model"), str)


def _selection(folder: RunFolder) -> dict[str, Any] | None:
    """The content of a round's ``select.json``; None if it or ``selected.jsonl`` is missing or damaged.

    Those of earlier versions have no digest of ``selected.jsonl``.
    """
    record, rows = read_record(folder.path / "select.json"), folder.path / "selected.jsonl"
    if record is None or not rows.exists() or not all(type(record.get(key)) is int for key in _COUNTS):
        return None
    if record.get("sha256", digest := file_digest(rows)) != digest:
        log(f"{rows} is damaged: it is made again")
        return None
    return record


def _nothing_selected(number: int, chosen: dict[str, Any]) -> str | None:
    """The reason why a round has nothing to train on; None if it has rows."""
    if chosen["selected"]:
        return None
    reasons = {
        "used_before": "were used before (rounds.reuse allows them)",
        "unannotated": "have no spans",
        "unscored": "have no score (can their videos be read?)",
        "not_asked": "cannot be selected, so the teacher was not asked",
        "unmeasured": "have a score that is not finite",
        "failed_gate": "failed the gate (tvdf.min_teacher_iou)",
    }
    counts = [f"{chosen[key]} {what}" for key, what in reasons.items() if chosen.get(key)]
    return (
        f"round {number} has nothing to train on: of the pool's {chosen['rows']} rows, "
        f"{', '.join(counts) or 'none is left'}"
    )


def _deltas_scored(folder: Path) -> dict[str, float | int | None]:
    """The statistics of δ of all rows that a round scored."""
    return _statistics(score.delta for score in read_scores(folder / "scores.jsonl").values())


def _statistics(values: Iterable[float | None]) -> dict[str, float | int | None]:
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    if not known:
        return {"n": 0, "mean": None, "min": None, "max": None}
    return {"n": len(known), "mean": fmean(known), "min": min(known), "max": max(known)}
