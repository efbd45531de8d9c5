"""Annotations as loose as the web's: spans that are wrong in ways that are known.

The paper trains on rows that people and machines annotated in passing, and tests on rows that TimeLens
corrected by hand. The generated world is annotated exactly, which no data set is. At level 1 the spans of the
training split have the errors of :data:`KINDS`, each with a share of the rows and a size:

- *widened*: each side lies |N(0, 0.8)| lengths of the event outside, because a whole shot or step is marked;
- *another event*: the span of another event of the same video, because the query fits both, or to neither;
- *shifted*: the span lies N(0, 0.7) lengths earlier or later, because narration and picture are apart.

A level between 0 and 1 multiplies the shares and leaves the sizes. A row that is wrong at one level is wrong
in the same way at every higher one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from video_opd.errors import UserError
from video_opd.temporal import Interval
from video_opd.world.scene import Scene, scene_rng

KINDS = {"widened": 0.50, "another event": 0.10, "shifted": 0.15}  # shares of the rows at level 1
EXACT = "exact"
WIDENED_SD, SHIFTED_SD = 0.8, 0.7  # in lengths of the event
DECIMALS = 2  # of an annotated time in seconds


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """The annotated span of a query in seconds, and its kind of error: a key of KINDS, or "exact"."""

    span: Interval
    kind: str


def check_level(level: float) -> None:
    """Raises UserError if ``level`` is no number from 0 to 1."""
    if not (math.isfinite(level) and 0 <= level <= 1):
        raise UserError(f"annotation noise is {level}; it must be from 0 (exact) to 1")


def annotate(scene: Scene, level: float) -> list[Annotation]:
    """Annotates each query of a scene, in their order; ``level`` 0 gives the true spans.

    The result depends on the scene's split, seed and index and on ``level`` alone.
    """
    rng = scene_rng(scene.split, scene.seed, scene.index, "annotations")
    found = []
    for question in scene.questions:
        # The same draws at every level, so that levels differ in nothing but how many rows are wrong.
        rank, which, other = rng.uniform(size=3)
        left, right = rng.normal(size=2)
        kind = _kind(rank, which, level)
        others = [q.span for q in scene.questions if q.span != question.span]
        if kind == "another event" and not others:
            kind = "shifted"
        start, end = question.span
        length = end - start
        if kind == "widened":
            start -= abs(left) * WIDENED_SD * length
            end += abs(right) * WIDENED_SD * length
        elif kind == "another event":
            start, end = others[int(other * len(others))]
        elif kind == "shifted":
            start = min(max(start + left * SHIFTED_SD * length, 0.0), scene.duration_s - length)
            end = start + length
        span = (round(max(start, 0.0), DECIMALS), round(min(end, scene.duration_s), DECIMALS))
        found.append(Annotation(span=span, kind=kind))
    return found


def _kind(rank: float, which: float, level: float) -> str:
    """Row number ``rank`` of 0 to 1 is wrong at ``level``, and ``which`` of 0 to 1 chooses the error."""
    wrong = sum(KINDS.values())
    if rank >= level * wrong:
        return EXACT
    left = which * wrong
    for kind, share in KINDS.items():
        if left < share:
            return kind
        left -= share
    return kind  # ``which`` is 1 but for rounding
