"""Answers on frames: timelines of a run, and its failures sorted by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from video_opd.evaluation.failures import FAILURES, choose_failures, other_event, outcome
from video_opd.evaluation.rows import RowScore, score_rows
from video_opd.reports.rows import EvaluatedRows
from video_opd.reports.runs import Run, in_order
from video_opd.reports.tables import colour_of
from video_opd.reports.tokens import Explainer, TokenView
from video_opd.temporal import Interval, best_iou

MOST_TIMELINES = 12
OPEN = 3  # failures of a kind that are shown at once
FRAMES = 8  # frames of a film, each above its share of the video
FEWER = {"of-4": 4, "of-3": 3, "of-2": 2}  # CSS class → frames where there is less room
MOST_PICTURE_BYTES = 6_000_000  # in a page
DEFINITIONS: Mapping[str, str] = {
    "no span": "The response holds no span, or a reversed or empty one.",
    "another event": (
        "Neither the prediction nor the annotated span holds the middle of the other: the model looked at "
        "another stretch of the video."
    ),
    "loose boundaries": (
        "The right event, too wide, too narrow or shifted: one of the two spans holds the middle of the "
        "other, and their IoU is below 0.5."
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One bar of a timeline; ``spans`` are (left, width) in percent of the duration."""

    label: str
    colour: str
    spans: Sequence[tuple[float, float]]
    text: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A picture, and the CSS classes that say among how few frames it is still shown."""

    uri: str
    time: str  # seconds
    classes: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """``frames`` each stand above an equal share of the video."""

    id: str
    query: str
    duration: str
    frames: Sequence[Frame]
    lanes: Sequence[Lane]
    note: str = ""
    response: str = ""
    tokens: Sequence[TokenView] = ()


@dataclass(frozen=True, kw_only=True)
class FailureKind:
    kind: str
    definition: str
    count: int  # the student's, over all test sets
    shown: Sequence[Timeline]
    more: Sequence[Timeline]  # shown on demand


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """``table`` has a row a test set and model: how many predictions of each kind, in percent."""

    header: Sequence[str]
    table: Sequence[Sequence[str]]
    kinds: Sequence[FailureKind]
    without_frames: bool

    @property
    def explained(self) -> bool:
        """Whether any response is shown token by token."""
        return any(example.tokens for kind in self.kinds for example in (*kind.shown, *kind.more))


class Pictures:
    """Hands out the frames of a page until there are enough of them."""

    def __init__(self, most_bytes: int = MOST_PICTURE_BYTES) -> None:
        self._left = most_bytes

    def film(self, frames: Sequence[str], times_s: Sequence[float], duration_s: float) -> list[Frame]:
        """Returns at most FRAMES frames: of each equal share of the video the one nearest its middle."""
        count = min(FRAMES, len(frames))
        middles = [(i + 0.5) * duration_s / count for i in range(count)]
        nearest = [min(range(len(frames)), key=lambda k: abs(times_s[k] - middle)) for middle in middles]
        chosen = list(dict.fromkeys(nearest))
        size = sum(len(frames[k]) for k in chosen)
        if size > self._left:
            return []
        self._left -= size
        few = {name: {int((i + 0.5) * len(chosen) / n) for i in range(n)} for name, n in FEWER.items()}
        return [
            Frame(
                uri=frames[k] if frames[k].startswith("data:") else f"data:image/jpeg;base64,{frames[k]}",
                time=f"{times_s[k]:.1f}",
                classes=" ".join(name for name, kept in few.items() if i in kept),
            )
            for i, k in enumerate(chosen)
        ]


def timeline(row: Mapping[str, Any], pictures: Pictures) -> Timeline:
    """Turns one row of eval/timelines.jsonl into bars in percent of the duration."""
    duration_s = float(row["duration"])
    truth = [(float(s), float(e)) for s, e in row["truth"]]
    return Timeline(
        id=str(row["id"]),
        query=str(row["query"]),
        duration=f"{duration_s:.1f} s",
        frames=pictures.film(row.get("frames") or [], row.get("frame_times_s") or [], duration_s),
        lanes=lanes(truth, row["answers"], duration_s),
    )


def lanes(truth: Sequence[Interval], answers: Mapping[str, Any], duration_s: float) -> list[Lane]:
    """Returns a bar for the annotation and for each model's answer."""

    def lane(label: str, colour: str, spans: Sequence[Interval], note: str = "") -> Lane:
        inside = [(s, min(e, duration_s)) for s, e in spans if s < duration_s]
        shown = [(100 * s / duration_s, 100 * (e - s) / duration_s) for s, e in inside]
        text = ", ".join(f"{s:.1f}–{e:.1f} s" for s, e in spans) or "no span"
        return Lane(label=label, colour=colour, spans=shown, text=text + note)

    found = [lane("truth", "truth", truth)]
    for model, span in answers.items():
        spans = [(float(span[0]), float(span[1]))] if span else []
        note = f" · IoU {best_iou(spans[0], truth):.2f}" if spans else ""
        found.append(lane(model, colour_of(model), spans, note))
    return found


def gallery(run: Run, pictures: Pictures, explainer: Explainer, most: int) -> Gallery | None:
    """Sorts the failures of a run's student, and shows at most ``most`` of a kind and test set.

    None if the folder does not hold the rows of a test set.
    """
    tests = {name: rows for name, rows in run.rows.items() if run.student in rows.predictions}
    if not tests:
        return None
    table = []
    counts = dict.fromkeys(FAILURES, 0)
    for name, rows in tests.items():
        for model in in_order(rows.predictions):
            kinds = _kinds(rows, model)
            share = [
                f"{100 * sum(k == kind for k in kinds) / len(kinds):.0f}%" for kind in (*FAILURES, "right")
            ]
            table.append([name, model, f"{len(kinds):,}", *share])
            if model == run.student:
                for kind in FAILURES:
                    counts[kind] += sum(k == kind for k in kinds)
    chosen: dict[str, list[tuple[int, str, RowScore]]] = {kind: [] for kind in FAILURES}
    for name, rows in tests.items():
        own = rows.predictions[run.student]
        for row in choose_failures(list(rows.samples.values()), own, rows.protocol, count=most):
            cases = chosen[outcome(row.span, row.sample.spans)]
            cases.append((sum(case[1] == name for case in cases), name, row))
    # The first of each test set, then the second of each.
    shown = {
        kind: [
            _card(name, tests[name], row, run.student, pictures, explainer)
            for _, name, row in sorted(cases, key=lambda case: case[0])
        ]
        for kind, cases in chosen.items()
    }
    return Gallery(
        header=("test set", "model", "rows", *FAILURES, "right"),
        table=table,
        kinds=[
            FailureKind(
                kind=kind,
                definition=DEFINITIONS[kind],
                count=counts[kind],
                shown=shown[kind][:OPEN],
                more=shown[kind][OPEN:],
            )
            for kind in FAILURES
        ],
        without_frames=any(not card.frames for cards in shown.values() for card in cards),
    )


def _kinds(rows: EvaluatedRows, model: str) -> list[str]:
    """The outcome of each annotated row; a row without a prediction has no span."""
    scored = score_rows(rows.samples.values(), rows.predictions[model], rows.protocol)
    return [outcome(row.span, row.sample.spans) for row in scored]


def _card(
    testset: str,
    rows: EvaluatedRows,
    row: RowScore,
    student: str,
    pictures: Pictures,
    explainer: Explainer,
) -> Timeline:
    """Shows a failure. Its spans are as the protocol compares them, and so are their IoUs."""
    sample, span = row.sample, row.span
    prediction, kept = rows.predictions[student][sample.id], rows.failures.get(sample.id, {})
    answers = {
        model: score_rows([sample], rows.predictions[model], rows.protocol)[0].span
        for model in in_order(rows.predictions)
    }
    known = [end for _, end in sample.spans] + [found[1] for found in answers.values() if found]
    duration_s = sample.duration_s or max(known, default=1.0)
    note = ""
    if span is not None and (other := other_event(span, sample, rows.samples.values())) is not None:
        note = f"The student answered the event of “{other.query}”."
    response = prediction.responses[0] if prediction.responses else ""
    tokens = explainer.tokens(kept) if kept.get("tokens") else []
    return Timeline(
        id=f"{sample.id} · {testset}",
        query=sample.query,
        duration=f"{duration_s:.1f} s",
        frames=pictures.film(kept.get("frames") or [], kept.get("frame_times_s") or [], duration_s),
        lanes=lanes(sample.spans, answers, duration_s),
        note=note,
        response="" if tokens else response,
        tokens=tokens,
    )
