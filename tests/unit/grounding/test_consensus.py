"""Agreement and consensus against counting on a grid, and by hand."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_opd.grounding.consensus import agreement, consensus
from video_opd.temporal import Interval

SPAN = st.none() | st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda s: s[0] < s[1])
SPANS = st.lists(SPAN, min_size=2, max_size=6)


def overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> Fraction:
    """IoU by counting seconds."""
    if a is None or b is None:
        return Fraction(0)
    return Fraction(len({*range(*a)} & {*range(*b)}), len({*range(*a)} | {*range(*b)}))


@given(SPANS)
def test_agreement_is_the_mean_iou_of_pairs(spans: list[tuple[int, int] | None]) -> None:
    pairs = [(a, b) for i, a in enumerate(spans) for b in spans[:i]]
    expected = sum((overlap(a, b) for a, b in pairs), Fraction(0)) / len(pairs)
    assert agreement(spans) == pytest.approx(float(expected), abs=1e-12)
    assert (agreement(spans) == 1.0) == (len(set(spans)) == 1 and spans[0] is not None)


def test_by_hand() -> None:
    spans: list[Interval | None] = [(0, 4), (0, 4), (2, 4)]
    assert agreement(spans) == pytest.approx((1 + 0.5 + 0.5) / 3)
    # Mean IoUs to the others: 0.75, 0.75, 0.5; the second is the likelier of the two.
    assert consensus(spans, [-0.3, -0.2, -0.1]) == 1
    # Two who cannot be read do not agree with each other.
    assert agreement([None, None, (0, 4)]) == 0.0
    assert consensus([None, None, (0, 4)], [-0.1, -0.1, -5.0]) == 2
    # Three clusters: the larger one wins over the likelier.
    assert consensus([(0, 2), (10, 12), (10, 13)], [0.0, -9.0, -8.0]) == 2


@given(SPANS, st.data())
def test_the_consensus_is_nearest_to_the_others(
    spans: list[tuple[int, int] | None], data: st.DataObject
) -> None:
    logprobs = [-float(data.draw(st.integers(0, 3))) for _ in spans]
    chosen = consensus(spans, logprobs)
    sums = [
        sum((overlap(s, o) for j, o in enumerate(spans) if j != i), Fraction(0)) for i, s in enumerate(spans)
    ]
    readable = [i for i, span in enumerate(spans) if span is not None] or list(range(len(spans)))
    best = [i for i in readable if sums[i] == max(sums[j] for j in readable)]
    likeliest = max(logprobs[i] for i in best)
    assert chosen == next(i for i in best if logprobs[i] == likeliest)


@given(SPANS)
def test_the_order_of_samples_does_not_matter(spans: list[tuple[int, int] | None]) -> None:
    for order in itertools.islice(itertools.permutations(range(len(spans))), 8):
        turned = [spans[i] for i in order]
        assert agreement(turned) == pytest.approx(agreement(spans))
        logprobs = [-float(i) for i in order]
        assert (
            turned[consensus(turned, logprobs)]
            == spans[consensus(spans, [-float(i) for i in range(len(spans))])]
        )


def test_one_answer_is_its_own_consensus() -> None:
    assert consensus([None], [-1.0]) == 0
