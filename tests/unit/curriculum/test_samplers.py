"""Samplers against eqs 13–22 and 30–31 written a second time: fractions, plain loops, direct simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.config import SelectionConfig, read_settings
from video_opd.curriculum.samplers import (
    SAMPLERS,
    Selection,
    select,
    uniform_positions,
)
from video_opd.errors import UserError
from video_opd.types import Score, Strategy

STRATEGIES = get_args(Strategy)


def chosen(scores: list[Score], strategy: Strategy, k: int, *, seed: int = 0, **more: Any) -> Selection:
    fill = more.pop("fill", True)
    return select(scores, SelectionConfig(strategy=strategy, k=k, **more), seed=seed, fill=fill)


def score(identity: str, teacher_iou: float, student_iou: float, reverse_kl: float | None = None) -> Score:
    return Score(id=identity, teacher_iou=teacher_iou, student_iou=student_iou, reverse_kl=reverse_kl)


def with_deltas(*deltas: float) -> list[Score]:
    """Scores a, b, c … with exactly these δ."""
    return [score(f"{i:04d}", max(delta, 0.0), max(-delta, 0.0)) for i, delta in enumerate(deltas)]


QUARTERS = st.integers(-4, 4).map(lambda n: n / 4)  # many ties, negative ones, exact in floats
DELTAS = st.lists(QUARTERS, min_size=0, max_size=40)
SOME_SCORES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan]),
        st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]),
        st.sampled_from([None, 0.0, 0.5, 2.0, math.nan, math.inf]),
    ),
    max_size=30,
).map(lambda rows: [score(f"{i:03d}", *row) for i, row in enumerate(rows)])


# --- a second implementation, from the paper


def reference_order(scores: list[Score]) -> list[str]:
    """eq 13, ties by id: sort by id, then stably by falling δ."""
    rows = [(s.id, s.teacher_iou - s.student_iou) for s in scores]
    rows.sort(key=lambda row: row[0])
    rows.sort(key=lambda row: row[1], reverse=True)
    return [identity for identity, _ in rows]


def reference_dsus(order: list[str], k: int) -> list[str]:
    if k == 1:
        return order[:1]
    n = len(order)
    return [order[math.floor(1 + (n - 1) * Fraction(t, k - 1)) - 1] for t in range(k)]  # eq 14


def reference_bbds(scores: list[Score], k: int, count: int, fill: bool) -> tuple[set[str], int]:
    delta = {s.id: Fraction(s.teacher_iou) - Fraction(s.student_iou) for s in scores}
    low, high = min(delta.values()), max(delta.values())
    chosen: set[str] = set()
    order = reference_order(scores)
    for b in range(1, count + 1):
        start, stop = low + (b - 1) * (high - low) / count, low + b * (high - low) / count  # eq 18
        last = b == count
        members = [i for i in order if start <= delta[i] and (delta[i] < stop or (last and delta[i] == high))]
        share = k // count + (1 if b <= k % count else 0)  # eq 19
        chosen |= set(reference_dsus(members, min(share, len(members)))) if members and share else set()
    filled = [i for i in order if i not in chosen][: k - len(chosen)] if fill else []
    return chosen | set(filled), len(filled)


# --- deterministic samplers


@given(st.integers(1, 300), st.data())
def test_uniform_positions_are_eq_14_exactly(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    positions = uniform_positions(n, k)
    assert positions == [int(i) for i in reference_dsus([str(i) for i in range(n)], k)]
    assert len(set(positions)) == k
    assert positions[0] == 0
    if k > 1:
        assert positions[-1] == n - 1


def test_eq_14_where_floats_fall_one_short() -> None:
    """⌊1 + (n−1)·t/(k−1)⌋ through a float t/(k−1) is one short for some whole results."""
    short = 0
    for n, k in itertools.product(range(2, 120), range(2, 120)):
        if k <= n:
            through_floats = [math.floor(1 + (n - 1) * (t / (k - 1))) - 1 for t in range(k)]
            short += uniform_positions(n, k) != through_floats
    assert short > 0  # so the integers matter


@given(DELTAS, st.integers(1, 45))
def test_topk_and_dsus(deltas: list[float], k: int) -> None:
    scores = with_deltas(*deltas)
    order = reference_order(scores)
    size = min(k, len(order))
    assert list(chosen(scores, "topk", k).ids) == order[:k]
    dsus = chosen(scores, "dsus", k)
    assert list(dsus.ids) == (reference_dsus(order, size) if size else [])
    assert [order[rank - 1] for rank in dsus.ranks] == list(dsus.ids)


@settings(max_examples=200)
@given(DELTAS.filter(bool), st.integers(1, 45), st.sampled_from([1, 2, 4, 5, 8]), st.booleans())
def test_bbds(deltas: list[float], k: int, buckets: int, fill: bool) -> None:
    # δ in quarters, so with 1, 2, 4 and 8 buckets many lie exactly on an edge; fifths are never on one
    # except at the ends, unless the range is 5/4.
    scores = with_deltas(*deltas)
    size = min(k, len(scores))
    expected, filled = reference_bbds(scores, size, buckets, fill)
    selection = chosen(scores, "bbds", k, buckets=buckets, fill=fill)
    assert set(selection.ids) == expected
    assert selection.filled == filled
    assert len(selection.ids) == (size if fill else size - reference_bbds(scores, size, buckets, True)[1])


def test_bbds_by_hand() -> None:
    # Range 0 to 1 in two buckets; the upper one has a single member, so one of k = 4 is filled in.
    scores = with_deltas(1.0, 0.25, 0.2, 0.1, 0.05, 0.0)
    literal = chosen(scores, "bbds", 4, buckets=2, fill=False)
    assert literal.ids == ("0000", "0001", "0005") and literal.filled == 0
    filled = chosen(scores, "bbds", 4, buckets=2)
    assert filled.ids == ("0000", "0001", "0002", "0005") and filled.filled == 1
    assert filled.ranks == (1, 2, 3, 6)


def test_bbds_of_equal_deltas_fills_from_one_bucket() -> None:
    selection = chosen(with_deltas(*[0.5] * 10), "bbds", 7)
    # All lie in the last bucket, whose share is 7 // 5 = 1: the first of it, and six filled in order.
    assert selection.ids == tuple(f"{i:04d}" for i in range(7)) and selection.filled == 6


def test_reverse_kl_ranks_when_asked() -> None:
    scores = [
        score("a", 0.9, 0.0, 0.1),
        score("b", 0.6, 0.5, 3.0),
        score("c", 0.9, 0.9, 1.0),
        score("d", 1.0, 0.0),
    ]
    picked = chosen(scores, "topk", 2, rank_by="reverse_kl")
    assert picked.ids == ("b", "c") and picked.candidates == 3 and picked.excluded == 1
    assert chosen(scores, "topk", 2).ids == ("d", "a")


# --- random samplers


def inclusion(strategy: Strategy, scores: list[Score], k: int, runs: int, **more: float) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for seed in range(runs):
        counts.update(chosen(scores, strategy, k, seed=seed, **more).ids)
    return {s.id: counts[s.id] / runs for s in scores}


def simulated(weights: np.ndarray, k: int, runs: int) -> np.ndarray:
    """eq 22 literally: one categorical draw after the other, the drawn one taken out."""
    rng = np.random.default_rng(0)
    counts = np.zeros(len(weights))
    for _ in range(runs):
        left = weights.copy()
        for _ in range(k):
            drawn = rng.choice(len(left), p=left / left.sum())
            counts[drawn] += 1
            left[drawn] = 0.0
    return counts / runs


RUNS = 4000
TOLERANCE = 4 * math.sqrt(2 * 0.25 / RUNS)  # four standard errors of a difference of two shares


def test_gwds_inclusion_is_that_of_eq_22() -> None:
    deltas = [0.95, 0.7, 0.5, 0.3, 0.0]
    found = inclusion("gwds", with_deltas(*deltas), 2, RUNS)
    weights = np.exp(-((np.array(deltas) - 0.9) ** 2) / (2 * 0.2**2))  # eq 21
    assert list(found.values()) == pytest.approx(simulated(weights, 2, RUNS).tolist(), abs=TOLERANCE)


def test_gaussian_difficulty_is_over_the_students_iou() -> None:
    ious = [0.0, 0.2, 0.35, 0.6, 0.9]
    scores = [score(f"{i}", math.nan, iou) for i, iou in enumerate(ious)]
    found = inclusion("gaussian", scores, 2, RUNS)
    weights = np.exp(-((np.array(ious) - 0.3) ** 2) / (2 * 0.2**2))  # eq 30
    assert list(found.values()) == pytest.approx(simulated(weights, 2, RUNS).tolist(), abs=TOLERANCE)
    assert chosen(scores, "gaussian", 5).ids == ("2", "1", "0", "3", "4")  # rank 1 is nearest to μ


def test_center_and_sigma_move_the_choice() -> None:
    found = inclusion("gwds", with_deltas(0.9, 0.5, 0.1), 1, 300, center=0.1, sigma=0.05)
    assert found["0002"] == 1.0
    flat = inclusion("gwds", with_deltas(0.9, 0.5, 0.1), 1, 2000, sigma=1e6)
    assert list(flat.values()) == pytest.approx([1 / 3] * 3, abs=0.05)


def test_random_is_uniform_without_replacement() -> None:
    found = inclusion("random", with_deltas(*[0.1 * i for i in range(6)]), 3, 2000)
    assert list(found.values()) == pytest.approx([0.5] * 6, abs=0.05)


def test_weights_too_small_for_floats_still_give_a_full_selection() -> None:
    scores = with_deltas(*[-1.0 + i / 100 for i in range(20)])
    selection = chosen(scores, "gwds", 5, sigma=0.001)
    assert len(set(selection.ids)) == 5
    assert selection.ids[0] == "0019"  # the nearest to the centre is all but certain


# --- all of them


@given(SOME_SCORES, st.sampled_from(STRATEGIES), st.integers(1, 35), st.integers(0, 3), st.randoms())
def test_a_selection_is_a_set_of_measured_ids_in_rank_order(
    scores: list[Score], strategy: Strategy, k: int, seed: int, random: object
) -> None:
    selection = chosen(scores, strategy, k, seed=seed)
    measured = [s for s in scores if math.isfinite(s.student_iou if strategy == "gaussian" else s.delta)]
    assert selection.candidates == len(measured) and selection.excluded == len(scores) - len(measured)
    assert len(set(selection.ids)) == len(selection.ids) == min(k, len(measured))
    assert set(selection.ids) <= {s.id for s in measured}
    assert list(selection.ranks) == sorted(selection.ranks)
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert chosen(shuffled, strategy, k, seed=seed) == selection
    for small, large in ((selection, chosen(scores, strategy, len(scores) + 1, seed=seed)),):
        assert set(small.ids) <= set(large.ids) == {s.id for s in measured}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_choose_from(strategy: Strategy) -> None:
    empty = Selection(ids=(), ranks=(), strategy=strategy, candidates=0, excluded=0, filled=0)
    assert chosen([], strategy, 5) == empty


@pytest.mark.parametrize("strategy", ["gwds", "gaussian", "random"])
def test_seeds_change_random_choices(strategy: Strategy) -> None:
    scores = with_deltas(*[i / 50 for i in range(50)])
    picked = {chosen(scores, strategy, 10, seed=seed).ids for seed in range(5)}
    assert len(picked) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": "best"}, "strategy is 'best'; choose one of: topk, dsus"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"strategy": "gwds", "sigma": 0.0}, "sigma must be at least 1e-06"),
        ({"strategy": "gwds", "sigma": 1e-200}, "sigma must be at least 1e-06"),
        ({"strategy": "gaussian", "sigma": math.inf}, r"sigma must be at most 1e\+06"),
        ({"strategy": "gaussian", "center": math.inf}, r"center must be at most 1e\+06"),
        ({"strategy": "gwds", "center": -1e200}, r"center must be at least -1e\+06"),
        ({"strategy": "gwds", "center": math.nan}, "center must be a number"),
        ({"strategy": "bbds", "buckets": 0}, "buckets must be at least 1"),
        ({"rank_by": "iou"}, "iou_gap"),
        ({"strategy": "topk", "center": 0.5}, r"center means nothing to strategy topk \(only to gwds"),
        ({"min_teacher_iou": 50}, "min_teacher_iou must be at most 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(SelectionConfig, wrong)


def test_every_strategy_has_a_sampler() -> None:
    assert set(SAMPLERS) == set(STRATEGIES)
