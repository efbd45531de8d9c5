"""Bootstrap intervals over videos.

Queries on one video share its frames and their difficulty, so rows are not independent; videos are what is
drawn again (a cluster bootstrap). Videos have different numbers of rows, so a metric of a draw is the ratio
of two sums: of the rows' values over the number of rows.

Shapes: ``N`` rows, ``V`` videos, ``M`` metrics, ``D`` draws.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 2000
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
    videos = int(index_N.max()) + 1
    sums_VM = np.zeros((videos, values_NM.shape[1]))
    np.add.at(sums_VM, index_N, values_NM)
    rows_V = np.bincount(index_N, minlength=videos).astype(np.float64)

    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CHUNK // videos)
    for done in range(0, draws, chunk):
        size = min(chunk, draws - done)
        # How often each video was drawn: multinomial counts are the draws, without their order.
        weights_DV = rng.multinomial(videos, np.full(videos, 1.0 / videos), size=size).astype(np.float64)
        means.append((weights_DV @ sums_VM) / (weights_DV @ rows_V)[:, None])
    return np.concatenate(means)


def interval95(
    values_NM: np.ndarray, groups: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Percentile intervals [M, 2] of the means of ``values_NM`` [N, M]; NaN where there are no rows."""
    if len(groups) == 0:
        return np.full((np.asarray(values_NM).shape[1], 2), np.nan)
    means_DM = draws_of_means(values_NM, groups, draws=draws, seed=seed)
    return np.percentile(means_DM, [2.5, 97.5], axis=0).T
