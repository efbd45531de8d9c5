"""Responses token by token: the colour of r_t, and the tokens that student and teacher found likeliest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from video_opd.reports.charts import number
from video_opd.reports.row_records import MOST_DETAILED
from video_opd.reports.runs import SHOWN_ROLLOUTS, Run

MOST_EXPLAINED = 6000  # tokens of a page that have alternatives: a page of a usual size
R_FULL = 2.0  # |r_t| in nats at which a token has its full colour

# How to read the colours of the tokens, by method.
TOKEN_HELP = {
    "video-opd": (
        "responses that the student wrote in training. Orange tokens are those that the teacher finds "
        "less likely than the student did (r_t < 0) and are pushed down; blue ones are pushed up. Colour "
        "fades as the two agree."
    ),
    "grpo": (
        "responses that the student wrote in training. All tokens of a response share its advantage: "
        "orange responses overlap less with the truth than the others of their group and are pushed down; "
        "blue ones are pushed up."
    ),
    "sft": "annotations in the answer format. Every token is pushed up; there is no other signal.",
    "op-rkd": (
        "annotations in the answer format. Orange tokens are those that the teacher finds less likely "
        "than the student did (r_t < 0) and are pushed down; blue ones are pushed up."
    ),
    "op-fkd": (
        "annotations in the answer format. Orange tokens are those that the teacher finds less likely "
        "than the student did; the loss compares whole distributions at each of them."
    ),
}
HOW_TO_ASK = (
    "Point at a token, tap it, or go there with Tab and the arrow keys: it shows what each model would "
    "rather have written, with its probability."
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What one model thought of a token: its probability, and the likeliest tokens with theirs."""

    name: str
    probability: str
    likeliest: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """``identity`` is the number of a token that has details to show; 0 without any."""

    text: str
    sign: str  # "up", "down"
    strength: float  # 0–1
    signal: str
    identity: int = 0
    models: Sequence[Model] = ()


@dataclass(frozen=True, kw_only=True)
class RolloutView:
    step: int
    query: str
    note: str
    tokens: Sequence[TokenView]
    more: int  # tokens that are not shown


class Explainer:
    """Makes the tokens of one page, and counts those that have details."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count(1)
        self._left = MOST_EXPLAINED

    def tokens(self, row: Mapping[str, Any]) -> list[TokenView]:
        """Returns the tokens of a row of ``rollouts.jsonl`` or ``failures-DATA.jsonl``."""
        credit = credits_of(row)
        views = []
        for t, (text, r) in enumerate(zip(row["tokens"][:MOST_DETAILED], credit, strict=False)):
            shown = text.replace("\n", "⏎") or "∅"
            models = self._models(row, t) if self._left > 0 else []
            self._left -= bool(models)
            views.append(
                TokenView(
                    text=shown,
                    sign="down" if r is not None and r < 0 else "up",
                    strength=0.0 if r is None else strength(r),
                    signal="no finite signal" if r is None else f"signal {number(r)}",
                    identity=next(self._numbers) if models else 0,
                    models=models,
                )
            )
        return views

    def rollouts(self, run: Run) -> tuple[list[RolloutView], list[RolloutView]]:
        """Returns responses of the first and of the last steps; of few, the second list is empty."""
        rows = [row for row in run.rollouts if row.get("tokens")]
        late = rows[-SHOWN_ROLLOUTS:] if len(rows) >= 2 * SHOWN_ROLLOUTS else []
        return [self._rollout(row) for row in rows[:SHOWN_ROLLOUTS]], [self._rollout(row) for row in late]

    def _rollout(self, row: Mapping[str, Any]) -> RolloutView:
        note = f"IoU {row['iou']:.2f}" if row.get("iou") is not None else ""
        if row.get("truncated"):
            note += " · cut off at the length limit"
        return RolloutView(
            step=int(row["step"]),
            query=str(row.get("query") or row.get("id")),
            note=note,
            tokens=self.tokens(row),
            more=max(0, len(row["tokens"]) - MOST_DETAILED),
        )

    def _models(self, row: Mapping[str, Any], t: int) -> list[Model]:
        found = []
        for name in ("student", "teacher"):
            own, top = row.get(f"{name}_logprobs"), row.get(f"{name}_top")
            probability = "" if own is None or own[t] is None else percent(own[t])
            likeliest = [] if top is None else [(word or "∅", percent(value)) for word, value in top[t]]
            if probability or likeliest:
                found.append(Model(name=name, probability=probability, likeliest=likeliest))
        return found


def credits_of(row: Mapping[str, Any]) -> Sequence[float | None]:
    """Returns the signal of each token of a row: r_t, or the advantage if there is no teacher."""
    credit: Sequence[float | None] = row["r"]
    return row.get("advantage") or credit if all(r is None for r in credit) else credit


def percent(logprob: float) -> str:
    """Returns a log-prob as a probability: ``61%``, ``1.5%``, ``0.02%``, ``below 0.01%``."""
    value = 100 * math.exp(min(logprob, 0.0))
    if value < 0.01:
        return "below 0.01%"
    return f"{value:.0f}%" if value >= 9.95 else f"{value:.2g}%"


def strength(r: float) -> float:
    """Returns how strong the colour of a signal is, 0 to 1."""
    return round(min(1.0, abs(r) / R_FULL), 3)
