"""The bootstrap against resampling by hand, the textbook error, and its promise: 95% coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from video_opd.evaluation import bootstrap
from video_opd.evaluation.bootstrap import draws_of_means, group_index, interval95


def known(interval: tuple[float, float] | None) -> tuple[float, float]:
    assert interval is not None
    return interval


@pytest.fixture(params=["few videos", "many videos"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of few videos are drawn at once, those of many are counted from draws."""
    if request.param == "many videos":
        monkeypatch.setattr(bootstrap, "MOST_MULTINOMIAL", 0)


def test_group_index_numbers_in_order_of_appearance() -> None:
    assert group_index(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]


@pytest.mark.usefixtures("both_ways")
def test_draws_resample_whole_videos_with_replacement() -> None:
    values = np.array([[1.0], [3.0], [10.0]])
    groups = ["v", "v", "w"]
    # Two videos: v twice, v and w, w twice; means of rows, so v counts double.
    possible = {2.0, 14 / 3, 10.0}
    means = draws_of_means(values, groups, draws=4000, seed=1)[:, 0]
    assert {round(m, 9) for m in means} == {round(p, 9) for p in possible}
    shares = [np.isclose(means, p).mean() for p in sorted(possible)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.usefixtures("both_ways")
def test_spread_is_that_of_resampling_one_by_one() -> None:
    rng = np.random.default_rng(0)
    groups = [f"v{i}" for i in range(30) for _ in range(1 + i % 4)]
    effects = {g: rng.normal() for g in groups}
    values = np.array([[effects[g] + 0.3 * rng.normal()] for g in groups])
    slow = []
    names = sorted(set(groups))
    for _ in range(1500):
        rows = [i for name in rng.choice(names, len(names)) for i, g in enumerate(groups) if g == name]
        slow.append(values[rows].mean())
    fast = draws_of_means(values, groups, draws=4000, seed=3)[:, 0]
    assert fast.mean() == pytest.approx(np.mean(slow), abs=0.02)
    assert fast.std() == pytest.approx(np.std(slow), rel=0.1)


def test_independent_rows_give_the_textbook_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=(400, 1))
    low, high = known(interval95(values, list(range(400)))[0])
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_rows_of_one_video_do_not_count_as_independent() -> None:
    values = np.random.default_rng(0).normal(size=(40, 1))
    groups = list(range(40))
    single = known(interval95(values, groups)[0])
    copied = known(interval95(np.repeat(values, 10, axis=0), np.repeat(groups, 10).tolist())[0])
    assert copied == pytest.approx(single, abs=1e-9)


@pytest.mark.usefixtures("both_ways")
def test_equal_seeds_draw_equal_videos_whatever_the_values() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50, 1))
    groups = [i // 2 for i in range(50)]
    difference = draws_of_means(a - b, groups, seed=5)
    assert difference == pytest.approx(draws_of_means(a, groups, seed=5) - draws_of_means(b, groups, seed=5))
    assert not np.allclose(draws_of_means(a, groups, seed=5), draws_of_means(a, groups, seed=6))


VIDEOS, CALLS, COLUMNS = 150, 10, 200
SIMULATIONS = CALLS * COLUMNS
# Three standard errors of a binomial share of 95%: 1.5 points.
TOLERANCE = 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS)


def simulated(rng: np.random.Generator) -> tuple[list[int], dict[str, tuple[np.ndarray, float]]]:
    """The video of each row, and for each kind of metric its values [N, COLUMNS] with its true mean.

    A video has one to five queries that share most of their difficulty (correlation 0.64). IoUs are uniform;
    the second model of the difference is worse on the same videos. A column is a data set of its own.
    """
    videos = np.repeat(np.arange(VIDEOS), rng.integers(1, 6, size=VIDEOS))
    shared = 0.8 * rng.normal(size=(VIDEOS, COLUMNS))[videos]
    iou, other = (_uniform(shared + 0.6 * rng.normal(size=shared.shape)) for _ in range(2))
    return videos.tolist(), {
        "mIoU": (iou, 0.5),
        "R@0.5": ((iou >= 0.5).astype(float), 0.5),
        "R@0.7": ((iou >= 0.7).astype(float), 0.3),
        "difference": (np.sqrt(iou) - other, 2 / 3 - 1 / 2),
    }


GRID = np.linspace(-8, 8, 4001)
NORMAL_CDF = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in GRID])


def _uniform(normal: np.ndarray) -> np.ndarray:
    return np.interp(normal, GRID, NORMAL_CDF)  # off by less than 1e-6


def coverage(over_videos: bool, calls: int = CALLS) -> dict[str, float]:
    """How often the interval holds the truth, in ``calls`` times COLUMNS data sets."""
    rng = np.random.default_rng(7)
    covered: dict[str, int] = {}
    for call in range(calls):
        videos, metrics = simulated(rng)
        for name, (values, truth) in metrics.items():
            groups = videos if over_videos else list(range(len(videos)))
            low, high = np.array(interval95(values, groups, seed=call)).T
            covered[name] = covered.get(name, 0) + int(((low <= truth) & (truth <= high)).sum())
    return {name: count / (calls * COLUMNS) for name, count in covered.items()}


def test_intervals_cover_the_truth_at_the_nominal_rate() -> None:
    for name, share in coverage(over_videos=True).items():
        assert share == pytest.approx(0.95, abs=TOLERANCE), name


def test_intervals_over_rows_would_not_cover_it() -> None:
    """Intervals over rows are too narrow, because the rows of a video are not independent. (A difference of
    two models suffers less: the error that they share cancels out.)"""
    shares = coverage(over_videos=False, calls=2)
    assert all(shares[name] < 0.90 for name in ("mIoU", "R@0.5", "R@0.7"))


def test_one_video_has_no_interval() -> None:
    """Each of its draws is the video itself: an interval of no width would claim that nothing varies."""
    values = np.random.default_rng(0).normal(size=(40, 2))
    assert interval95(values, ["film"] * 40) == [None, None]
    assert None not in interval95(values, ["film"] * 39 + ["other"])


def test_no_rows_have_no_interval() -> None:
    assert interval95(np.zeros((0, 4)), []) == [None] * 4
