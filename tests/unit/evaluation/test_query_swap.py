"""The query swap of many queries a video equals a comparison of every pair, without comparing every pair."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from video_opd.evaluation import query_swap as module
from video_opd.evaluation.bootstrap import draws_of_means
from video_opd.evaluation.query_swap import query_swap
from video_opd.evaluation.rows import score_rows
from video_opd.types import Prediction, Sample

Span = tuple[float, float]


def iou(a: Span, b: Span) -> float:
    shared = min(a[1], b[1]) - max(a[0], b[0])
    return shared / (max(a[1], b[1]) - min(a[0], b[0])) if shared > 0 and a[0] < a[1] and b[0] < b[1] else 0.0


def best(span: Span, spans: tuple[Span, ...]) -> float:
    return max(iou(span, other) for other in spans)


def nearer(span: Span | None, own: tuple[Span, ...], other: tuple[Span, ...]) -> float:
    """The definition, for one comparison."""
    if span is None:
        return 0.0
    if best(span, own) != best(span, other):
        return float(best(span, own) > best(span, other))
    centre = (span[0] + span[1]) / 2
    away = [min(abs(centre - (s + e) / 2) for s, e in spans) for spans in (own, other)]
    return 0.5 if away[0] == away[1] else float(away[0] < away[1])


def pair_by_pair(samples: list[Sample], predictions: dict[str, Prediction], protocol: str) -> tuple | None:
    spans = {row.sample.id: row.span for row in score_rows(samples, predictions, protocol)}
    by_video: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.spans:
            by_video.setdefault(str(sample.video), []).append(sample)
    values: list[float] = []
    same: list[bool] = []
    videos: list[str] = []
    for video, rows in by_video.items():
        for a, b in combinations(rows, 2):
            if max(best(span, b.spans) for span in a.spans) > 0.1:
                continue
            values += [nearer(spans[a.id], a.spans, b.spans), nearer(spans[b.id], b.spans, a.spans)]
            same.append(spans[a.id] is not None and spans[a.id] == spans[b.id])
            videos += [video, video]
    if not values:
        return None
    draws = draws_of_means(100 * np.array(values)[:, None], videos)
    return (
        100 * np.mean(values),
        100 * np.mean(same),
        len(values),
        len(set(videos)),
        *np.percentile(draws, [2.5, 97.5]),
    )


def random_case(seed: int) -> tuple[list[Sample], dict[str, Prediction]]:
    """Videos of 1 to 40 queries. Times lie on a grid, so that IoUs and distances tie; some rows are odd."""
    rng = np.random.default_rng(seed)
    grid_s = float(rng.choice([0.01, 0.5, 2.0]))
    lengths_s = float(rng.choice([3.0, 20.0, 90.0]))
    several = float(rng.choice([0.0, 0.0, 0.3]))
    samples: list[Sample] = []
    predictions: dict[str, Prediction] = {}

    def span() -> Span:
        start = round(rng.uniform(0, 100) / grid_s) * grid_s
        return start, start + max(1, round(rng.exponential(lengths_s) / grid_s)) * grid_s

    for v in range(int(rng.integers(1, 8))):
        for q in range(int(rng.integers(1, 41))):
            spans = tuple(span() for _ in range(int(rng.integers(2, 4)) if rng.random() < several else 1))
            if rng.random() < 0.2 and samples:
                spans = samples[-1].spans  # two queries about one event
            if rng.random() < 0.05:
                spans = ()
            sample = Sample(id=f"{v}-{q}", video=Path(f"{v}.mp4"), query="q", spans=spans)
            samples.append(sample)
            kind = rng.random()
            predicted = span() if kind < 0.6 or not spans else spans[0] if kind < 0.8 else None
            if kind > 0.95:
                predicted = (50.0, 60.0)  # one span for many
            if kind < 0.97:
                rule = () if predicted is None else ("given",)
                predictions[sample.id] = Prediction(
                    id=sample.id, responses=(), spans=(predicted,), rules=rule
                )
    return [samples[i] for i in rng.permutation(len(samples))], predictions


@pytest.mark.parametrize("seed", range(60))
def test_every_pair_is_compared_as_defined(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", [500_000, 7][seed % 2])
    samples, predictions = random_case(seed)
    protocol = ["paper", "timelens"][seed // 2 % 2]  # whole seconds may leave a prediction empty
    expected, found = pair_by_pair(samples, predictions, protocol), query_swap(samples, predictions, protocol)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.comparisons, found.videos) == expected[2:4]
    assert (found.share, found.same_answer) == pytest.approx(expected[:2], abs=1e-9)
    if found.videos > 1:
        assert found.ci95 == pytest.approx(expected[4:], abs=1e-9)


def test_values_within_a_distance_are_those_that_are_measured_so() -> None:
    """Sums of decimals are rounded; what counts is the distance itself, whichever way it was rounded."""
    rng = np.random.default_rng(0)
    video_N, value_N = rng.integers(0, 5, 3000), rng.integers(-200, 200, 3000) * 0.1
    order = module._VideoOrder(video_N, value_N)
    video_Q, at_Q = rng.integers(0, 5, 4000), rng.integers(-200, 200, 4000) * 0.3
    within_Q = np.abs(at_Q - value_N[rng.integers(0, 3000, 4000)])
    away_QN = np.where(video_Q[:, None] == video_N, np.abs(at_Q[:, None] - value_N), np.inf)
    for strict, near_QN in ((True, away_QN < within_Q[:, None]), (False, away_QN <= within_Q[:, None])):
        found = order.count_within(video_Q, at_Q, within_Q, strict=strict)
        assert found.tolist() == near_QN.sum(axis=1).tolist()


def test_thousands_of_queries_on_a_film_are_not_gone_through_in_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short events on a long film: the pairs that are compared singly are a small part of all."""
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 7000, 2000)
    samples = [
        Sample(id=f"{i}", video=Path("film.mp4"), query="q", spans=((start, start + rng.uniform(1, 8)),))
        for i, start in enumerate(starts.tolist())
    ]
    predictions = {
        s.id: Prediction(id=s.id, responses=(), spans=((s.spans[0][0] + 1, s.spans[0][1] + 20),), rules=())
        for s in samples
    }
    compared = 0
    original = module._compare

    def counting(rows: module._Rows, own_P: np.ndarray, other_P: np.ndarray) -> tuple[np.ndarray, ...]:
        nonlocal compared
        compared += len(own_P)
        return original(rows, own_P, other_P)

    monkeypatch.setattr(module, "_compare", counting)
    found = query_swap(samples, predictions)
    assert found is not None and found.comparisons > 3_900_000
    assert 2000 < compared < found.comparisons / 50
