"""The tables of a report: evaluations, several runs side by side, selections, rounds, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from video_opd.config import recipe_from_dict
from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.reports.charts import number
from video_opd.reports.records import METRICS
from video_opd.reports.runs import ROLES, Evaluation, Run, round_number
from video_opd.reports.story import METHODS, REVERSE_KL, STEP_S, interval, score
from video_opd.terminal import visible


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the before/after table; ``low`` and ``high`` are None where no interval is known."""

    model: str
    colour: str
    scores: Sequence[str]
    value: float
    low: float | None
    high: float | None
    faults: str
    swap: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """The rows of one test set."""

    testset: str
    n: int
    constant: float | None
    protocol: str
    rows: Sequence[Row]


def blocks(run: Run) -> list[Block]:
    """Makes the before/after table: a block a test set, a row a model, base first."""
    result = []
    for testset in run.testsets:
        found = [e for model in run.models if (e := run.evaluation(model, testset))]
        constants = [e.best_constant for e in found if e.best_constant is not None]
        result.append(
            Block(
                testset=testset,
                n=max(e.n for e in found),
                constant=constants[0] if constants else None,
                protocol=_protocols(found),
                rows=[_row(e) for e in found],
            )
        )
    return result


def _protocols(found: Sequence[Evaluation]) -> str:
    """``"paper"``, or where the models' differ ``"paper (base); paper, but max_new_tokens 16 (student)"``."""
    models: dict[str, list[str]] = {}
    for e in found:
        models.setdefault(e.protocol, []).append(e.model)
    if len(models) == 1:
        return found[0].protocol
    return "; ".join(f"{protocol or 'unknown'} ({', '.join(names)})" for protocol, names in models.items())


def _row(e: Evaluation) -> Row:
    low, high = e.ci95.get("mIoU", (None, None))
    unparsed, missing = int(e.record.get("unparsed") or 0), int(e.record.get("missing") or 0)
    return Row(
        model=e.model,
        colour=colour_of(e.model),
        scores=[score(e, metric) for metric in METRICS],
        value=e.scores["mIoU"],
        low=low,
        high=high,
        faults=str(unparsed) + (f" + {missing} missing" if missing else ""),
        swap="–" if e.query_swap is None else f"{e.query_swap:.0f}%",
    )


def colour_of(model: str) -> str:
    """CSS class of a model; the student keeps its colour from round to round."""
    return "student" if round_number(model) else model if model in ROLES else "other"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side: ``rows`` of cells below ``header``, and the settings in which the recipes differ."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    settings: Sequence[tuple[str, Sequence[str]]]


def compare(runs: Sequence[Run]) -> Comparison:
    testsets = list(dict.fromkeys(name for run in runs for name in run.testsets))
    scores = [f"mIoU {name}" for name in testsets]
    header = ["run", "method", "steps", *scores, "reverse KL at the end", "time a step"]
    rows = []
    for run in runs:
        _, kl = run.series(REVERSE_KL)
        _, step_s = run.series(STEP_S)
        trained = [_trained(run, name) for name in testsets]
        rows.append(
            [
                run.name,
                METHODS.get(run.method, run.method),
                f"{len(run.metrics):,}",
                *("–" if e is None else interval(e) for e in trained),
                number(fmean(kl[-max(1, len(kl) // 10) :])) if kl else "–",
                f"{fmean(step_s):.2f} s" if step_s else "–",
            ]
        )
    flat = _flat_recipes(runs)
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    differing = [key for key in keys if len({repr(recipe.get(key)) for recipe in flat}) > 1]
    settings = [(key, [_plain(recipe.get(key)) for recipe in flat]) for key in differing]
    return Comparison(header=header, rows=rows, settings=settings)


def _flat_recipes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the settings of the recipes by key, as today's reader understands them.

    An earlier version wrote the keys of all methods, which differ from a new run's in nothing. If one of the
    recipes cannot be read so, all are compared as they are written.
    """
    try:
        trees = [recipe_from_dict(run.recipe).to_dict() for run in runs]
    except UserError:
        trees = [dict(run.recipe) for run in runs]
    return [dict(flatten(tree)) for tree in trees]


def _trained(run: Run, testset: str) -> Evaluation | None:
    """Returns the evaluation of the trained model: the student, or the only model there is."""
    found = [e for e in run.evaluations if e.testset == testset]
    return run.evaluation(run.student, testset) or (found[0] if len(found) == 1 else None)


def selection_facts(selection: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the facts of select.json (the summary of ``video-opd select``) as label and value."""
    labels = {
        "strategy": "strategy",
        "rank_by": "ranked by",
        "rows": "rows in the pool",
        "unannotated": "without annotation",
        "unscored": "without a score",
        "not_asked": "not asked: cannot be selected",
        "min_teacher_iou": "gate: teacher IoU at least",
        "failed_gate": "stopped by the gate",
        "candidates": "passed the gate",
        "selected": "selected",
        "filled": "of these, filled from the rest",
    }
    if not selection.get("min_teacher_iou"):
        labels["candidates"] = "candidates"  # there was no gate to pass
    known = [(label, selection.get(key)) for key, label in labels.items()]
    return [(label, _plain(value)) for label, value in known if value]


ROUND_HEADER = (
    "round",
    "rows in the pool",
    "used before",
    "without annotation",
    "not asked",
    "stopped by the gate",
    "candidates",
    "selected",
    "δ of all scored",
    "δ of the selected",
    "steps",
)


def rounds_table(run: Run) -> list[list[str]]:
    """Returns the counts of each round's selection, below :data:`ROUND_HEADER`; δ is its mean."""
    records = {record["round"]: record for record in (run.summary or {}).get("rounds", [])}
    rows = []
    for each in run.rounds:
        chosen, delta = each.selection or {}, records.get(each.number, {}).get("delta", {})
        counts = ("rows", "used_before", "unannotated", "not_asked", "failed_gate", "candidates", "selected")
        means = [delta.get(name, {}).get("mean") for name in ("scored", "selected")]
        rows.append(
            [
                str(each.number),
                *(f"{chosen[key]:,}" if key in chosen else "–" for key in counts),
                *("–" if mean is None else f"{mean:+.2f}" for mean in means),
                f"{len(each.metrics):,}",
            ]
        )
    return rows


def table(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _plain(value)) for key, value in flatten(tree)]


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))
