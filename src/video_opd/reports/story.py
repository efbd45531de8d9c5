"""A run's headline, its tiles and its outcome, computed from its numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from video_opd.progress import duration
from video_opd.reports.pairs import change, signed, verdict
from video_opd.reports.runs import Evaluation, Run, round_number

METHODS = {
    "video-opd": "Video-OPD",
    "grpo": "GRPO",
    "sft": "supervised fine-tuning",
    "op-rkd": "off-policy reverse-KL distillation",
    "op-fkd": "off-policy forward-KL distillation",
}
STEP_S = "time/step_s"
REVERSE_KL = "reverse_kl/sampled"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One figure at the top of the page."""

    label: str
    value: str
    note: str


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


def gap(run: Run, testsets: Sequence[str] | None = None) -> Gap | None:
    """Returns the gap over ``testsets``, all of the run's by default; None if base and student share none."""
    names = run.testsets if testsets is None else testsets
    shared = [t for t in names if run.evaluation("base", t) and run.evaluation(run.student, t)]
    if not shared:
        return None

    def mean(model: str) -> float | None:
        found = [run.evaluation(model, name) for name in shared]
        values = [e.scores["mIoU"] for e in found if e is not None]
        return fmean(values) if len(values) == len(shared) else None

    base, student = mean("base"), mean(run.student)
    assert base is not None and student is not None
    return Gap(testsets=shared, base=base, student=student, teacher=mean("teacher"))


def headline(run: Run) -> str:
    """Returns a sentence that says what happened, and another if a round is not evaluated yet."""
    found = gap(run)
    method = METHODS.get(run.method, run.method)
    if found is None:
        first = f"{_plural(len(run.metrics), 'step')} of {method} were made"
        scores = _scores(run)
        return first + (f"; {scores}" if scores else "") + "."
    last = round_number(run.student) or len(run.rounds)  # the last round that is evaluated
    trained = [each for each in run.rounds if each.number <= last]
    steps = sum(len(each.metrics) for each in trained) if trained else len(run.metrics)
    rounds = f" in {_plural(len(trained), 'round')}" if trained else ""
    first = (
        f"After {_plural(steps, 'step')} of {method}{rounds} the student's predictions overlap "
        f"the true moments by {found.student:.1f}%, {_change(found)} {found.base:.1f}%"
    )
    teacher = "." if found.teacher is None else f"; its teacher's by {found.teacher:.1f}%."
    going_on = (
        f" Round {each.number} has made {_plural(len(each.metrics), 'step')} and is not evaluated yet."
        for each in run.rounds
        if each.number > last
    )
    return "".join((first, teacher, *going_on))


def _change(found: Gap) -> str:
    before, after = float(f"{found.base:.1f}"), float(f"{found.student:.1f}")  # as they are written
    return "as before:" if after == before else "up from" if after > before else "down from"


def _scores(run: Run) -> str:
    parts = [f"{e.model} reaches {e.scores['mIoU']:.1f}% mIoU on {e.testset}" for e in run.evaluations]
    return ", ".join(parts[:4])


OUTCOME_HEADER = (
    "mIoU",
    "base",
    "student",
    "change",
    "the interval says",
    "way to the teacher",
    "best constant",
)


def outcome(run: Run) -> list[list[str]]:
    """Returns base and student on each shared test set, and their mean, below :data:`OUTCOME_HEADER`.

    The change has a paired interval if the folder holds the predictions; otherwise ``the interval says``
    whether the student's interval lies above or below the base's, or overlaps with it. The best constant is
    the best prediction that ignores the video.
    """
    found = gap(run)
    if found is None:
        return []
    rows = []
    for name in found.testsets:
        base, student, here = (
            run.evaluation("base", name),
            run.evaluation(run.student, name),
            gap(run, [name]),
        )
        assert base is not None and student is not None and here is not None
        paired = change(run, "base", run, run.student, name)
        constant = "–" if student.best_constant is None else f"{student.best_constant:.1f}"
        cells = [
            interval(base),
            interval(student),
            _signed(here) if paired is None else signed(paired.miou),
            _place(base, student) if paired is None else verdict(paired.miou),
            _way(here),
            constant,
        ]
        rows.append([name, *cells])
    if len(rows) > 1:
        cells = [f"{found.base:.1f}", f"{found.student:.1f}", _signed(found), "", _way(found), ""]
        rows.append(["mean", *cells])
    return rows


def _signed(found: Gap) -> str:
    return f"{found.student - found.base:+.1f}"


def _way(found: Gap) -> str:
    return "–" if found.closed is None else f"{found.closed:.0%}"


def _place(base: Evaluation, student: Evaluation) -> str:
    if "mIoU" not in base.ci95 or "mIoU" not in student.ci95:
        return "–"
    (base_low, base_high), (low, high) = base.ci95["mIoU"], student.ci95["mIoU"]
    return "above the base's" if low > base_high else "below the base's" if high < base_low else "overlaps"


def score(e: Evaluation, metric: str) -> str:
    return f"{e.scores[metric]:.1f}" if metric in e.scores else "–"


def interval(e: Evaluation, metric: str = "mIoU") -> str:
    """``61.2 [55.0, 66.8]``"""
    text = score(e, metric)
    return f"{text} [{e.ci95[metric][0]:.1f}, {e.ci95[metric][1]:.1f}]" if metric in e.ci95 else text


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


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
