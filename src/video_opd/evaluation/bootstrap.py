"""Bootstrap intervals over videos.

Queries on one video share its frames and their difficulty, so rows are not independent: the videos are drawn
again (a cluster bootstrap). Videos have different numbers of rows, so a metric of a draw is the ratio of two
sums: the rows' values over the number of rows.

Shapes: ``N`` rows, ``V`` videos, ``M`` metrics, ``D`` draws.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np

Interval95: TypeAlias = tuple[float, float] | None
"""Low and high; None if it is not known: the spread between videos does not show in one video."""

DRAWS = 2000
MOST_MULTINOMIAL = 10_000  # videos; drawing their counts takes 0.4 µs each, which is 13 times counting draws
_CHUNK = 4_000_000  # weights held at a time


def group_index(groups: Sequence[Hashable]) -> np.ndarray:
    """int64 [N]: the number of each row's group, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def draws_of_means(
    values_NM: np.ndarray, groups: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Means [D, M] of ``values_NM`` over the rows of V videos drawn with replacement, D times.

    Equal ``groups`` and ``seed`` draw the same videos, so differences of two results are paired.
    """
    values_NM = np.asarray(values_NM, dtype=np.float64)
    index_N = group_index(groups)
    assert values_NM.ndim == 2 and len(values_NM) == len(index_N) > 0, "one group for each row"
    rows_V = np.bincount(index_N).astype(np.float64)
    sums = [np.bincount(index_N, weights=values_N, minlength=len(rows_V)) for values_N in values_NM.T]
    return draws_of_ratios(np.stack(sums, axis=-1), rows_V, draws=draws, seed=seed)


def draws_of_ratios(
    sums_VM: np.ndarray, rows_V: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Ratios [D, M] of the sums of ``sums_VM`` and of ``rows_V`` over V videos drawn with replacement."""
    videos = len(rows_V)
    both_VM = np.concatenate([sums_VM, rows_V[:, None]], axis=1)
    rng = np.random.default_rng(seed)
    if videos <= MOST_MULTINOMIAL:
        totals = []
        chunk = max(1, _CHUNK // videos)
        for done in range(0, draws, chunk):
            size = min(chunk, draws - done)
            # How often each video was drawn: multinomial counts are the draws, without their order.
            weights_DV = rng.multinomial(videos, np.full(videos, 1.0 / videos), size=size)
            totals.append(weights_DV.astype(np.float64) @ both_VM)
        totals_DM = np.concatenate(totals)
    else:
        totals_DM = np.empty((draws, both_VM.shape[1]))
        for d in range(draws):
            drawn_V = rng.integers(0, videos, size=videos, dtype=np.uint32)
            totals_DM[d] = np.bincount(drawn_V, minlength=videos).astype(np.float64) @ both_VM
    return totals_DM[:, :-1] / totals_DM[:, -1:]


def interval95(
    values_NM: np.ndarray, groups: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> list[Interval95]:
    """The percentile interval of each mean of ``values_NM`` [N, M]; None for fewer than two videos."""
    videos = len(set(groups))
    if videos < 2:
        return [None] * np.asarray(values_NM).shape[1]
    return percentiles95(draws_of_means(values_NM, groups, draws=draws, seed=seed), videos)


def percentiles95(draws_DM: np.ndarray, videos: int) -> list[Interval95]:
    """The interval of each column of draws; None if ``videos`` is 1: its draws are all equal."""
    if videos < 2:
        return [None] * draws_DM.shape[1]
    return [(float(low), float(high)) for low, high in np.percentile(draws_DM, [2.5, 97.5], axis=0).T]
