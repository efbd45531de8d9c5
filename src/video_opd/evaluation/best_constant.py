"""The best constant prediction: how far a prior reaches that looks at neither video nor query. No torch.

Shapes: ``N`` rows, ``A`` constant predictions, ``K`` annotated spans a row, ``G`` points of the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from video_opd.evaluation.rows import METRICS, metric_values
from video_opd.types import Sample

_CHUNK = 2_000_000  # IoUs that are held at a time


@dataclass(frozen=True, kw_only=True)
class ConstantPrediction:
    """The best prediction that ignores video and query: the same share of the duration every time."""

    start_fraction: float
    end_fraction: float
    n: int  # annotated rows with a duration
    values: Mapping[str, float]  # as Metrics.values

    @property
    def miou(self) -> float:
        return self.values["mIoU"]

    def to_json(self) -> dict[str, Any]:
        return {
            "start_fraction": self.start_fraction,
            "end_fraction": self.end_fraction,
            "n": self.n,
            **self.values,
        }


def best_constant(samples: Iterable[Sample], *, steps: int = 100) -> ConstantPrediction | None:
    """Finds the constant prediction of highest mIoU on a grid of ``steps`` equal intervals of the duration.

    It is found on the test rows themselves, so it is an upper bound for what a prior can reach. None if no
    annotated row has a duration.
    """
    # IoU does not change with the unit of time, so everything is in durations.
    spans = [
        [(start / s.duration_s, end / s.duration_s) for start, end in s.spans]
        for s in samples
        if s.spans and s.duration_s
    ]
    if not spans:
        return None
    starts_A, ends_A = np.triu_indices(steps + 1, k=1)
    grid_A2 = np.stack([starts_A, ends_A], axis=-1) / steps
    single = [row[0] for row in spans if len(row) == 1 and row[0][0] < row[0][1]]
    others = [row for row in spans if len(row) > 1 or not row[0][0] < row[0][1]]
    totals_A = _single_totals(np.array(single).reshape(-1, 2), steps)[starts_A, ends_A]
    totals_A += _totals(grid_A2, others)
    # These sums are rounded in another order than those of IoUs: the best by a hair are summed again.
    near = np.flatnonzero(totals_A >= totals_A.max() - 1e-7 * len(spans))
    best_2 = grid_A2[near[int(_totals(grid_A2[near], spans).argmax())]]
    ious = [ious_NA[:, 0] for ious_NA in _iou_chunks(best_2[None], spans)]
    return ConstantPrediction(
        start_fraction=float(best_2[0]),
        end_fraction=float(best_2[1]),
        n=len(spans),
        values=dict(zip(METRICS, metric_values(np.concatenate(ious)).mean(axis=0).tolist(), strict=True)),
    )


def _single_totals(single_N2: np.ndarray, steps: int) -> np.ndarray:
    """The sums [G, G] of the IoUs of every prediction [start, end] of the grid with rows of one span.

    Not every prediction of the grid is tried on every row. With a truth (u, v), the IoU of (s, e) is one of
    four fractions, by where s and e lie, and the terms that depend on the row are summed once:

    - e ≥ v, s ≤ u: (v − u) / (e − s)
    - e < v, s > u: (e − s) / (v − u)
    - e < v, s ≤ u: (e − u) / (v − s), if e > u: for each s sums over the rows
    - e ≥ v, s > u: (v − s) / (e − u), if s < v: for each e sums over the rows
    """
    grid = np.arange(steps + 1) / steps
    totals = np.zeros((steps + 1, steps + 1))
    if not len(single_N2):
        return totals
    u, v = single_N2.T
    # Row n belongs to the starts s ≤ u and the ends e ≥ v: s up to last_s[n], e from first_e[n].
    last_s = np.searchsorted(grid, u, side="right") - 1
    first_e = np.searchsorted(grid, v, side="left")
    cell = (last_s + 1) * (steps + 3) + np.minimum(first_e, steps + 1)

    def by_cell(weights: np.ndarray) -> np.ndarray:
        """Sums [G + 1, G + 2] by (last_s + 1, first_e)."""
        return np.bincount(cell, weights=weights, minlength=(steps + 2) * (steps + 3)).reshape(
            steps + 2, steps + 3
        )[:, : steps + 2]

    def corner(weights: np.ndarray, *, s_before: bool, e_after: bool) -> np.ndarray:
        """Sums [G, G] over the rows with s ≤ u (or s > u) and e ≥ v (or e < v) for each (s, e)."""
        sums = by_cell(weights)
        up = np.cumsum(sums[::-1], axis=0)[::-1] if s_before else np.cumsum(sums, axis=0)
        up = up[1:] if s_before else up[:-1]
        along = np.cumsum(up, axis=1)
        return along[:, :-1] if e_after else along[:, -1:] - along[:, :-1]

    s, e = grid[:, None], grid[None, :]
    length = np.where(e > s, e - s, 1.0)
    totals += corner(v - u, s_before=True, e_after=True) / length
    totals += corner(1 / (v - u), s_before=False, e_after=False) * length
    first_e_after_u = np.searchsorted(grid, u, side="right")  # e > u
    last_s_before_v = np.searchsorted(grid, v, side="left") - 1  # s < v
    for i, at in enumerate(grid):
        # The start is at i, before u; ends e with u < e < v: from first_e_after_u up to first_e − 1.
        here = last_s >= i
        share = 1 / (v[here] - at)
        first, stop = first_e_after_u[here], first_e[here]
        ones = _between(first, stop, share, steps)
        totals[i] += grid * ones - _between(first, stop, u[here] * share, steps)
        # The end is at i, from v on; starts s with u < s < v: from last_s + 1 up to last_s_before_v.
        here = first_e <= i
        share = 1 / (at - u[here])
        first, stop = last_s[here] + 1, last_s_before_v[here] + 1
        ones = _between(first, stop, share, steps)
        totals[:, i] += _between(first, stop, v[here] * share, steps) - grid * ones
    return totals


def _between(first_N: np.ndarray, stop_N: np.ndarray, weights_N: np.ndarray, steps: int) -> np.ndarray:
    """Sums [G] of the weights over the rows with first ≤ g < stop, for each point g of the grid."""
    stop_N = np.maximum(first_N, stop_N)
    rises = np.bincount(first_N, weights=weights_N, minlength=steps + 2)
    falls = np.bincount(stop_N, weights=weights_N, minlength=steps + 2)
    return np.cumsum(rises - falls)[: steps + 1]


def _totals(grid_A2: np.ndarray, spans: Sequence[Sequence[tuple[float, float]]]) -> np.ndarray:
    """The sums [A] of the IoUs of each prediction with the rows."""
    totals_A = np.zeros(len(grid_A2))
    for ious_NA in _iou_chunks(grid_A2, spans):
        totals_A += ious_NA.sum(axis=0)
    return totals_A


def _iou_chunks(grid_A2: np.ndarray, spans: Sequence[Sequence[tuple[float, float]]]) -> Iterator[np.ndarray]:
    """The best IoUs [N, A] of each prediction with the spans of each row, for some rows at a time."""
    if not spans:
        return
    most = max(map(len, spans))
    chunk = max(1, _CHUNK // (len(grid_A2) * most))
    for done in range(0, len(spans), chunk):
        # Rows are filled up with their first span, which changes no maximum.
        part = [[*row, *[row[0]] * (most - len(row))] for row in spans[done : done + chunk]]
        yield _ious(grid_A2, np.array(part))


def _ious(grid_A2: np.ndarray, truth_NK2: np.ndarray) -> np.ndarray:
    """The best IoU [N, A] of each prediction with the spans of each row."""
    start_A, end_A = grid_A2.T
    start_NK1, end_NK1 = truth_NK2[..., 0, None], truth_NK2[..., 1, None]
    shared_NKA = np.minimum(end_A, end_NK1) - np.maximum(start_A, start_NK1)
    hull_NKA = np.maximum(end_A, end_NK1) - np.minimum(start_A, start_NK1)
    return (shared_NKA.clip(min=0) / hull_NKA).max(axis=1)
