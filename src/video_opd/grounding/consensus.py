"""How much several responses to one query agree, and which of them is the answer. Imports no torch.

Both definitions rest on the IoU of spans (:func:`video_opd.temporal.iou`). A response without a span has an
IoU of 0 with every other response, even with another one without a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from video_opd.temporal import Interval, iou


def agreement(spans: Sequence[Interval | None]) -> float:
    """The mean IoU over all pairs of responses, in [0, 1]. It is 1 only if all have the same span.

    ``spans`` has two entries or more. Example: ``[(0, 4), (0, 4), (2, 4)]`` gives (1 + 0.5 + 0.5) / 3.
    """
    assert len(spans) >= 2, "agreement needs two responses or more"
    pairs = list(combinations(spans, 2))
    return sum(iou(a, b) for a, b in pairs) / len(pairs)


def consensus(spans: Sequence[Interval | None], logprobs: Sequence[float]) -> int:
    """The index of the medoid: the response whose mean IoU with the others is the highest.

    A response with a span always comes before one without. Of equal responses the one with the higher
    log-probability is chosen, and then the first.
    """
    assert len(spans) == len(logprobs) >= 1

    def rank(i: int) -> tuple[bool, float, float]:
        others = (iou(spans[i], other) for j, other in enumerate(spans) if j != i)
        return spans[i] is not None, round(sum(others), 9), logprobs[i]

    return max(range(len(spans)), key=rank)  # max returns the first of several
