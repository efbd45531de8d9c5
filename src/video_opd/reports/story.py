"""What happened in a run, in words and tables, computed from its numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from video_opd.progress import duration
from video_opd.reports.charts import number
from video_opd.reports.runs import METRICS, ROLES, Evaluation, Run, round_number
from video_opd.strict import flatten

METHODS = {
    "video-opd": "Video-OPD",
    "grpo": "GRPO",
    "sft": "supervised fine-tuning",
    "op-rkd": "off-policy reverse-KL distillation",
    "op-fkd": "off-policy forward-KL distillation",
}
STEP_S = "time/step_s"
REVERSE_KL = "reverse_kl/sampled"
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure at the top of the page."""

    label: str
    value: str
    note: str


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


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Mean mIoU in percent over the test sets that base and student share (teacher: if it has them all)."""

    testsets: Sequence[str]
    base: float
    student: float
    teacher: float | None

    @property
    def closed(self) -> float | None:
        """Share of the way from base to teacher; None where there is no way to go."""
        if self.teacher is None or self.teacher - self.base < 0.5:
            return None
        return (self.student - self.base) / (self.teacher - self.base)


def gap(run: Run) -> Gap | None:
    shared = [t for t in run.testsets if run.evaluation("base", t) and run.evaluation(run.student, t)]
    if not shared:
        return None

    def mean(model: str) -> float | None:
        found = [run.evaluation(model, name) for name in shared]
        values = [e.scores["mIoU"] for e in found if e is not None]
        return fmean(values) if len(values) == len(shared) else None

    base, student = mean("base"), mean(run.student)
    assert base is not None and student is not None
    return Gap(testsets=shared, base=base, student=student, teacher=mean("teacher"))


def headline(run: Run) -> list[str]:
    """One sentence that says what happened, then the ones that say how sure that is."""
    found = gap(run)
    method = METHODS.get(run.method, run.method)
    if found is None:
        first = f"{_plural(len(run.metrics), 'step')} of {method} were made"
        scores = _student_only(run)
        return [first + (f"; {scores}" if scores else "") + ".", *_training(run)]
    total = len(found.testsets)
    where = "on the test set" if total == 1 else f"on average over {_word(total)} test sets"
    rounds = f" in {_plural(len(run.rounds), 'round')}" if run.rounds else ""
    first = (
        f"After {_plural(len(run.metrics), 'step')} of {method}{rounds} the student's answers overlap the "
        f"true moments by {found.student:.1f}%, {_change(found)} {found.base:.1f}%"
    )
    first += "." if found.teacher is None else f"; its teacher's by {found.teacher:.1f}%."
    return [first, f"This is mIoU {where}{_against(run, found)}.", *_certainty(run, found), *_training(run)]


def _change(found: Gap) -> str:
    way = _way(found.base, found.student)
    return "as before:" if way == 0 else "up from" if way > 0 else "down from"


def _way(before: float, after: float) -> int:
    """1 up, -1 down, 0 where both are written alike: in percent, with one decimal."""
    old, new = float(f"{before:.1f}"), float(f"{after:.1f}")
    return (new > old) - (new < old)


def _against(run: Run, found: Gap) -> str:
    """The test sets on which the student went the other way than on average, where that went any."""
    way, parts = _way(found.base, found.student), []
    for name in found.testsets:
        base, student = run.evaluation("base", name), run.evaluation(run.student, name)
        assert base is not None and student is not None
        old, new = base.scores["mIoU"], student.scores["mIoU"]
        if way * _way(old, new) < 0:
            parts.append(f"on {name} it {'fell' if new < old else 'rose'}, from {old:.1f}% to {new:.1f}%")
    return "".join(f"; {part}" for part in parts)


def _certainty(run: Run, found: Gap) -> list[str]:
    above = [name for name in found.testsets if _apart(run, "base", run.student, name)]
    total = len(found.testsets)
    below = [name for name in found.testsets if _apart(run, run.student, "base", name)]
    if total == 1 and below:
        sure = "The 95% interval of the student lies below the base's."
    elif total == 1:
        sure = f"The 95% intervals of base and student {'do not overlap' if above else 'overlap'}."
    elif len(above) == total:
        sure = "The 95% intervals of base and student do not overlap on any test set."
    else:
        sure = f"The student's 95% interval lies above the base's on {_share(len(above), total)}"
        sure += f", and below it on {_share(len(below), total)}." if below else "."
    if found.closed is not None:
        sure += f" The student went {found.closed:.0%} of the way from the base to the teacher."
    constants = [e.best_constant for name in found.testsets if (e := run.evaluation(run.student, name))]
    known = [value for value in constants if value is not None]
    if known:
        sure += f" The best answer that ignores the video would score {fmean(known):.1f}%."
    return [sure]


def _training(run: Run) -> list[str]:
    _, kl = run.series(REVERSE_KL)
    if len(kl) < 2:
        return [f"Training took {duration(seconds)}."] if (seconds := train_seconds(run)) else []
    few = max(1, len(kl) // 10)
    start, end = fmean(kl[:few]), fmean(kl[-few:])
    old, new = f"{start:.2g}", f"{end:.2g}"
    fell = f"stayed at {new}" if old == new else f"{'fell' if end < start else 'rose'} from {old} to {new}"
    time = f" Training took {duration(seconds)}." if (seconds := train_seconds(run)) else ""
    distance = f"Its distance to the teacher (reverse KL) {fell} nats a token."
    return [distance + time]


def _student_only(run: Run) -> str:
    parts = [f"{e.model} reaches {e.scores['mIoU']:.1f}% mIoU on {e.testset}" for e in run.evaluations]
    return ", ".join(parts[:4])


def _apart(run: Run, lower: str, upper: str, testset: str) -> bool:
    """Whether the interval of model ``upper`` lies above that of ``lower``."""
    low, high = run.evaluation(lower, testset), run.evaluation(upper, testset)
    assert low is not None and high is not None
    return "mIoU" in low.ci95 and "mIoU" in high.ci95 and high.ci95["mIoU"][0] > low.ci95["mIoU"][1]


def train_seconds(run: Run) -> float:
    """Wall time of all steps; 0 where it was not recorded."""
    return sum(run.series(STEP_S)[1])


def tiles(run: Run) -> list[Tile]:
    found, shown = gap(run), []
    if found is not None:
        base = f"base {found.base:.1f}%"
        note = base if found.teacher is None else f"{base} · teacher {found.teacher:.1f}%"
        change = f"{found.student - found.base:+.1f}"
        shown.append(Tile(label="Student mIoU", value=f"{found.student:.1f}%", note=note))
        shown.append(Tile(label="Gain over the base", value=change, note="points of mIoU"))
        if found.closed is not None:
            note = "0% is the base, 100% the teacher"
            shown.append(Tile(label="Way to the teacher", value=f"{found.closed:.0%}", note=note))
    _, kl = run.series(REVERSE_KL)
    if len(kl) >= 2:
        few = max(1, len(kl) // 10)
        value = f"{fmean(kl[:few]):.2g} → {fmean(kl[-few:]):.2g}"
        shown.append(Tile(label="Reverse KL", value=value, note="nats a token, first and last steps"))
    if run.metrics:
        seconds = train_seconds(run)
        note = duration(seconds) + " in all" if seconds else "optimiser steps"
        shown.append(Tile(label="Steps", value=f"{len(run.metrics):,}", note=note))
    return shown


def blocks(run: Run) -> list[Block]:
    """The before/after table: a block a test set, a row a model, base first."""
    result = []
    for testset in run.testsets:
        found = [e for model in run.models if (e := run.evaluation(model, testset))]
        constants = [e.best_constant for e in found if e.best_constant is not None]
        result.append(
            Block(
                testset=testset,
                n=max(e.n for e in found),
                constant=constants[0] if constants else None,
                protocol="; ".join(dict.fromkeys(e.protocol for e in found if e.protocol)),
                rows=[_row(e) for e in found],
            )
        )
    return result


def _row(e: Evaluation) -> Row:
    low, high = e.ci95.get("mIoU", (None, None))
    unparsed, missing = int(e.record.get("unparsed") or 0), int(e.record.get("missing") or 0)
    return Row(
        model=e.model,
        colour=colour_of(e.model),
        scores=[_score(e, metric) for metric in METRICS],
        value=e.scores["mIoU"],
        low=low,
        high=high,
        faults=str(unparsed) + (f" + {missing} missing" if missing else ""),
        swap="–" if e.query_swap is None else f"{e.query_swap:.0f}%",
    )


def colour_of(model: str) -> str:
    """CSS class of a model; the student keeps its colour from round to round."""
    return "student" if round_number(model) else model if model in ROLES else "other"


def _score(e: Evaluation, metric: str) -> str:
    return f"{e.scores[metric]:.1f}" if metric in e.scores else "–"


def interval(e: Evaluation, metric: str = "mIoU") -> str:
    """``61.2 [55.0, 66.8]``"""
    text = _score(e, metric)
    return f"{text} [{e.ci95[metric][0]:.1f}, {e.ci95[metric][1]:.1f}]" if metric in e.ci95 else text


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
    flat = [dict(flatten(run.recipe)) for run in runs]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    differing = [key for key in keys if len({repr(recipe.get(key)) for recipe in flat}) > 1]
    settings = [(key, [_plain(recipe.get(key)) for recipe in flat]) for key in differing]
    return Comparison(header=header, rows=rows, settings=settings)


def _trained(run: Run, testset: str) -> Evaluation | None:
    """The evaluation of what the run trained: the student, or the only model there is."""
    found = [e for e in run.evaluations if e.testset == testset]
    return run.evaluation(run.student, testset) or (found[0] if len(found) == 1 else None)


def selection_facts(selection: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What select.json (the summary of ``video-opd select``) says, as label and value, in a fixed order."""
    labels = {
        "strategy": "strategy",
        "rank_by": "ranked by",
        "rows": "rows in the pool",
        "unannotated": "without annotation",
        "unscored": "without a score",
        "min_teacher_iou": "gate: teacher IoU at least",
        "failed_gate": "stopped by the gate",
        "candidates": "passed the gate",
        "selected": "selected",
        "filled": "of these, filled from the rest",
    }
    known = [(label, selection.get(key)) for key, label in labels.items()]
    return [(label, _plain(value)) for label, value in known if value]


ROUND_HEADER = (
    "round",
    "rows in the pool",
    "used before",
    "without annotation",
    "stopped by the gate",
    "candidates",
    "selected",
    "δ of all scored",
    "δ of the selected",
    "steps",
)


def rounds_table(run: Run) -> list[list[str]]:
    """What each round chose from what, below :data:`ROUND_HEADER`; δ is its mean."""
    records = {record["round"]: record for record in (run.summary or {}).get("rounds", [])}
    rows = []
    for r, part in enumerate(run.rounds, start=1):
        chosen, delta = part.selection or {}, records.get(r, {}).get("delta", {})
        counts = ("rows", "used_before", "unannotated", "failed_gate", "candidates", "selected")
        means = [delta.get(name, {}).get("mean") for name in ("scored", "selected")]
        rows.append(
            [
                str(r),
                *(f"{chosen[key]:,}" if key in chosen else "–" for key in counts),
                *("–" if mean is None else f"{mean:+.2f}" for mean in means),
                f"{len(part.metrics):,}",
            ]
        )
    return rows


def table(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _plain(value)) for key, value in flatten(tree)]


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _share(n: int, total: int) -> str:
    return f"{_word(n) if n else 'none'} of the {_word(total)} test sets"


def _word(n: int) -> str:
    return COUNTS[n] if n < len(COUNTS) else str(n)
