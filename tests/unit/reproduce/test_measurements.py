"""Paired differences against a plain bootstrap, and mean IoUs against the evaluation's."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from video_opd.evaluation.metrics import evaluate
from video_opd.reproduce.measurements import Measured, difference, measure, spread
from video_opd.types import Prediction, Sample

VIDEOS = [f"v{i // 3}" for i in range(60)]  # three rows each


def measured(scores_NS: np.ndarray) -> Measured:
    return Measured(
        scores_NS=scores_NS,
        sets_N=("short",) * len(scores_NS),
        videos_N=tuple(VIDEOS[: len(scores_NS)]),
    )


def test_with_one_seed_the_interval_is_that_of_videos_drawn_again():
    rng = np.random.default_rng(0)
    since = rng.uniform(0, 100, size=(60, 1))
    rises = rng.normal(4, 10, size=(60, 1)) + np.repeat(rng.normal(0, 8, size=20), 3)[:, None]
    found = difference(measured(since + rises), measured(since))
    assert found.rise == pytest.approx(rises.mean()) and found.among == 1
    by_video = rises.reshape(20, 3).mean(axis=1)
    draw = random.Random(7)
    means = [statistics.fmean(draw.choices(list(by_video), k=20)) for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))


def test_where_only_seeds_differ_the_interval_is_students():
    base = np.random.default_rng(1).uniform(0, 100, size=(60, 3))
    same = difference(measured(base + 5), measured(base))
    assert (same.low, same.high) == (pytest.approx(5), pytest.approx(5))
    apart = difference(measured(base + np.array([0, 5, 10])), measured(base))
    half = 4.3027 * 5 / math.sqrt(3)  # the 97.5% point of two degrees of freedom
    assert apart.low == pytest.approx(5 - half, rel=0.03) and apart.high == pytest.approx(5 + half, rel=0.03)
    assert apart.count_above == "2 of 3 seeds"


@pytest.mark.parametrize("between_seeds", [0.0, 4.0])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds: int, between_seeds: float):
    """Rows of a video are alike in all seeds; a seed lifts all rows. The true rise is 2."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        rises = 2 + np.repeat(rng.normal(0, 8, size=20), 3)[:, None] + rng.normal(0, 8, size=(60, seeds))
        rises += rng.normal(0, between_seeds, size=seeds)
        found = difference(measured(rises), measured(np.zeros((60, 1))), draws=500)
        covered.append(found.low <= 2 <= found.high)
    assert statistics.fmean(covered) > 0.92  # 95% less twice the error of 200 trials


def test_a_model_without_seeds_is_compared_with_every_seed():
    base = np.random.default_rng(2).uniform(0, 100, size=(60, 1))
    found = difference(measured(base + np.array([1, 2, 3])), measured(base))
    assert found.rise == pytest.approx(2) and found.count_above == "3 of 3 seeds"


def test_arms_on_other_rows_are_not_compared():
    with pytest.raises(AssertionError, match="same rows"):
        difference(measured(np.zeros((60, 1))), measured(np.zeros((59, 1))))


def test_mean_ious_are_those_of_evaluate(tmp_path: Path) -> None:
    rng = random.Random(3)
    sets = {name: [sample(name, i) for i in range(10)] for name in ("short", "long")}
    spans: list[dict[str, tuple[float, float]]] = []
    files: list[dict[str, Path]] = []
    for seed in (0, 1):
        files.append({name: tmp_path / f"{name}-{seed}.jsonl" for name in sets})
        spans.append({})
        for name, samples in sets.items():
            # In each set the second seed misses a row, which counts 0.
            made = {s.id: tuple(map(float, sorted(rng.sample(range(20), 2)))) for s in samples[seed:]}
            text = "".join(json.dumps({"id": id, "span": span}) + "\n" for id, span in made.items())
            files[seed][name].write_text(text)
            spans[seed] |= made  # type: ignore[arg-type]
    found = measure(sets, files)
    for seed in (0, 1):
        predictions = {
            id: Prediction(id=id, responses=(), rules=("given",), spans=(span,))
            for id, span in spans[seed].items()
        }
        for name, samples in sets.items():
            assert found.means(name)[seed] == pytest.approx(evaluate(samples, predictions).miou)
        pooled = [s for samples in sets.values() for s in samples]
        assert found.to_json()["all"][seed] == pytest.approx(evaluate(pooled, predictions).miou)
    assert set(found.to_json()) == {"short", "long", "all"}


def sample(name: str, i: int) -> Sample:
    """A row; two ask about one video."""
    video = Path(f"{name}{i // 2}")
    return Sample(id=f"{name}-{i}", video=video, query="q", duration_s=20.0, spans=((2.0, 8.0),))


def test_spread():
    assert spread([50.0, 52.0, 54.0]) == "52.0 ± 2.0"
    assert spread([50.04]) == "50.0"
