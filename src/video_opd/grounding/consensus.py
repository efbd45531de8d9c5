"""How much several answers to one question agree, and which of them to take. No torch.

Every definition is in terms of IoU (:func:`video_opd.temporal.iou`); an answer without a span overlaps with
nothing, not even with another one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from video_opd.temporal import Interval, iou


def agreement(spans: Sequence[Interval | None]) -> float:
    """Mean IoU over all pairs of answers, in [0, 1]; 1 only where all are the same span.

    Example: of ``[(0, 4), (0, 4), (2, 4)]`` it is (1 + 0.5 + 0.5) / 3. Two answers at least.
    """
    assert len(spans) >= 2, "one answer agrees with nobody"
    pairs = list(combinations(spans, 2))
    return sum(iou(a, b) for a, b in pairs) / len(pairs)


def consensus(spans: Sequence[Interval | None], logprobs: Sequence[float]) -> int:
    """The number of the answer with the highest mean IoU to the others: the medoid.

    Between equals the one with the higher log-probability, then the first; one with a span before one
    without.
    """
    assert len(spans) == len(logprobs) >= 1

    def rank(i: int) -> tuple[bool, float, float]:
        others = (iou(spans[i], other) for j, other in enumerate(spans) if j != i)
        return spans[i] is not None, round(sum(others), 9), logprobs[i]

    return max(range(len(spans)), key=rank)  # the first of the highest
