"""The query swap: does a model listen to the query? No torch.

For every two queries on one video whose events hardly overlap, each of the two predictions is compared with
both events. A prediction is nearer its own event if its IoU with it is higher. Equal IoUs (as a rule 0 and
0) are decided by the distance of the centres, and if that is equal, too, the comparison counts half. A row
without a span is nearer nothing and counts 0. One span for both queries is right for one of them, so a
model that does not listen scores 50%.

A film can have thousands of queries, so the pairs are not gone through one by one. A prediction that
overlaps its own event is nearer it than any event that it does not touch, and a prediction that overlaps
nothing is compared by centres, which are sorted once. Only pairs of rows in which an event overlaps the
other event or the other prediction are compared singly. The work is n log n in the queries of a video, plus
the number of these pairs. Rows with several spans are compared with every row of their video.

Shapes: ``N`` rows, ``V`` videos, ``K`` spans a row (filled up with the first), ``P`` pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from video_opd.evaluation.bootstrap import DRAWS, Interval95, draws_of_ratios, group_index, percentiles95
from video_opd.evaluation.protocols import Protocol
from video_opd.evaluation.rows import PERCENT, RowScore, score_rows
from video_opd.temporal import centre_s
from video_opd.types import Prediction, Sample

# Two events of one video are told apart by a prediction only if they hardly overlap.
MAX_EVENT_OVERLAP = 0.1
_CHUNK = 500_000  # pairs that are compared at a time


@dataclass(frozen=True, kw_only=True)
class QuerySwap:
    """How often a prediction is nearer its own event than the other query's; chance is 50%."""

    share: float  # percent of comparisons
    ci95: Interval95
    same_answer: float  # percent of pairs of queries that got one and the same span
    comparisons: int  # prediction × other query of the same video
    videos: int

    def to_json(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "ci95": self.ci95,
            "same_answer": self.same_answer,
            "comparisons": self.comparisons,
            "videos": self.videos,
        }


def query_swap(
    samples: Iterable[Sample],
    predictions: Mapping[str, Prediction],
    protocol: str | Protocol = "paper",
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> QuerySwap | None:
    """Compares each prediction with its own event and with those of the other queries on its video.

    Pairs whose events overlap with an IoU above 0.1 are left out. None if no video has two other queries.
    """
    return swap_of_rows(score_rows(samples, predictions, protocol), draws=draws, seed=seed)


def swap_of_rows(rows: Sequence[RowScore], *, draws: int = DRAWS, seed: int = 0) -> QuerySwap | None:
    """Returns the query swap of scored rows, as :func:`query_swap` does."""
    if not rows:
        return None
    counts = _count(_Rows(rows))
    compared = counts.comparisons_V > 0  # both directions of a pair
    if not compared.any():
        return None
    comparisons_V = counts.comparisons_V[compared]
    nearer_V1 = PERCENT * counts.nearer_V[compared][:, None]
    draws_D1 = draws_of_ratios(nearer_V1, comparisons_V, draws=draws, seed=seed)
    (interval,) = percentiles95(draws_D1, len(comparisons_V))
    return QuerySwap(
        share=float(nearer_V1.sum() / comparisons_V.sum()),
        ci95=interval,
        same_answer=float(PERCENT * (counts.same_V.sum() / comparisons_V.sum())),
        comparisons=int(comparisons_V.sum()),
        videos=int(compared.sum()),
    )


class _Rows:
    """The rows as arrays, those of a video one after another."""

    def __init__(self, rows: Sequence[RowScore]) -> None:
        video_N = group_index([str(row.sample.video) for row in rows])
        order = np.argsort(video_N, kind="stable")
        rows = [rows[i] for i in order.tolist()]
        self.video_N = video_N[order]
        self.videos = int(self.video_N[-1]) + 1
        most = max(len(row.sample.spans) for row in rows)
        spans = [row.sample.spans + row.sample.spans[:1] * (most - len(row.sample.spans)) for row in rows]
        self.events_NK2 = np.array(spans, dtype=np.float64)
        self.has_span_N = np.array([row.span is not None for row in rows])
        self.predicted_N2 = np.array([row.span or (np.nan, np.nan) for row in rows], dtype=np.float64)
        self.iou_N = np.array([row.iou for row in rows], dtype=np.float64)
        self.centre_NK = _centres(self.events_NK2)
        self.predicted_centre_N = _centres(self.predicted_N2)
        self.distance_N = np.abs(self.predicted_centre_N[:, None] - self.centre_NK).min(axis=1)
        # Rows that are compared with every row of their video: several spans, or no proper interval.
        several_N = np.array([len(row.sample.spans) > 1 for row in rows])
        infinite_N = self.has_span_N & ~np.isfinite(self.predicted_N2).all(axis=1)
        self.single_N = ~(several_N | infinite_N) & _proper(self.events_NK2).all(axis=1)


def _centres(spans: np.ndarray) -> np.ndarray:
    return np.asarray(centre_s((spans[..., 0], spans[..., 1])))  # type: ignore[arg-type]  # elementwise


def _proper(spans: np.ndarray) -> np.ndarray:
    return np.isfinite(spans).all(axis=-1) & (spans[..., 0] < spans[..., 1])


@dataclass
class _Counts:
    """Sums over the comparisons of each video; every pair of rows counts in both directions."""

    nearer_V: np.ndarray
    same_V: np.ndarray
    comparisons_V: np.ndarray

    def add(self, rows: _Rows, own_P: np.ndarray, nearer: Any, same: Any, comparisons: Any) -> None:
        videos_P = rows.video_N[own_P]
        for sums_V, values in (
            (self.nearer_V, nearer),
            (self.same_V, same),
            (self.comparisons_V, comparisons),
        ):
            values_P = np.broadcast_to(np.asarray(values, dtype=np.float64), videos_P.shape)
            sums_V += np.bincount(videos_P, weights=values_P, minlength=len(sums_V))


def _count(rows: _Rows) -> _Counts:
    counts = _Counts(*(np.zeros(rows.videos) for _ in range(3)))
    single = np.flatnonzero(rows.single_N)
    # All pairs of single rows, as if no event overlapped another event or prediction.
    others_S = np.bincount(rows.video_N[single], minlength=rows.videos)[rows.video_N[single]] - 1
    counts.add(rows, single, _far_sum(rows, single, others_S), _equal_predictions(rows, single), others_S)
    # The pairs in which one does.
    for own_P, other_P in _touching_pairs(rows, single):
        apart_P, nearer_P, same_P = _compare(rows, own_P, other_P)
        far_P = _far(rows, own_P, other_P)
        counts.add(rows, own_P, apart_P * nearer_P - far_P, (apart_P - 1.0) * same_P, apart_P - 1.0)
    for own_P, other_P in _pairs_of_the_rest(rows):
        apart_P, nearer_P, same_P = _compare(rows, own_P, other_P)
        counts.add(rows, own_P, apart_P * nearer_P, apart_P * same_P, apart_P)
    return counts


def _compare(rows: _Rows, own_P: np.ndarray, other_P: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns three arrays of 0 or 1: the events differ, the prediction is nearer its own (or 0.5 for a tie),
    both predictions are the same."""
    own_events, other_events = rows.events_NK2[own_P], rows.events_NK2[other_P]
    overlap_P = _ious(own_events[:, :, None], other_events[:, None]).max(axis=(1, 2))
    own_iou_P = rows.iou_N[own_P]
    other_iou_P = _ious(rows.predicted_N2[own_P][:, None], other_events).max(axis=1)
    nearer_P = np.where(
        own_iou_P != other_iou_P, own_iou_P > other_iou_P, _nearer_by_centre(rows, own_P, other_P)
    )
    same_P = (rows.predicted_N2[own_P] == rows.predicted_N2[other_P]).all(axis=1)
    return (overlap_P <= MAX_EVENT_OVERLAP) * 1.0, nearer_P * rows.has_span_N[own_P], same_P * 1.0


def _ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """:func:`video_opd.temporal.iou` elementwise."""
    shared = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
    hull = np.maximum(a[..., 1], b[..., 1]) - np.minimum(a[..., 0], b[..., 0])
    overlaps = _proper(a) & _proper(b) & (shared > 0)
    return np.divide(shared, hull, out=np.zeros_like(shared), where=overlaps)


def _nearer_by_centre(rows: _Rows, own_P: np.ndarray, other_P: np.ndarray) -> np.ndarray:
    own_s = rows.distance_N[own_P]
    other_s = np.abs(rows.predicted_centre_N[own_P][:, None] - rows.centre_NK[other_P]).min(axis=1)
    return np.where(own_s == other_s, 0.5, own_s < other_s)


def _far(rows: _Rows, own_P: np.ndarray, other_P: np.ndarray) -> np.ndarray:
    """Returns 1 if the prediction is nearer its own event, 0.5 for a tie, else 0; none overlaps the other."""
    by_centre_P = _nearer_by_centre(rows, own_P, other_P)
    return np.where(rows.iou_N[own_P] > 0, 1.0, by_centre_P) * rows.has_span_N[own_P]


def _far_sum(rows: _Rows, single: np.ndarray, others_S: np.ndarray) -> np.ndarray:
    """:func:`_far` of each single row, summed over the other single rows of its video."""
    sums_S = others_S.astype(np.float64)
    sums_S[~rows.has_span_N[single]] = 0.0
    silent = np.flatnonzero(rows.has_span_N[single] & (rows.iou_N[single] == 0) & (others_S > 0))
    if not len(silent):
        return sums_S
    order = _VideoOrder(rows.video_N[single], rows.centre_NK[single, 0])
    asked = single[silent]
    video, at_s, within_s = rows.video_N[asked], rows.predicted_centre_N[asked], rows.distance_N[asked]
    nearer = order.count_within(video, at_s, within_s, strict=True)
    equal = order.count_within(video, at_s, within_s, strict=False) - nearer
    sums_S[silent] -= nearer + 0.5 * (equal - 1)  # its own centre is among the equal ones
    return sums_S


def _equal_predictions(rows: _Rows, single: np.ndarray) -> np.ndarray:
    """How many other single rows of its video have the same span as each single row."""
    keys = np.column_stack([rows.video_N[single], rows.predicted_N2[single] + 0.0])  # -0.0 is 0.0
    found = np.zeros(len(single))
    predicted = np.flatnonzero(rows.has_span_N[single])
    if len(predicted):
        _, group, sizes = np.unique(keys[predicted], axis=0, return_inverse=True, return_counts=True)
        found[predicted] = sizes[group.reshape(-1)] - 1
    return found


class _VideoOrder:
    """Values of each video in ascending order, all videos in one array that is searched at once."""

    def __init__(self, video_N: np.ndarray, value_N: np.ndarray) -> None:
        self.order = np.lexsort((value_N, video_N))
        self._known = np.unique(value_N)
        self._keys = self._key(video_N[self.order], value_N[self.order])

    def _key(self, video: np.ndarray, value: np.ndarray) -> np.ndarray:
        """A number that sorts as (video, value) does. It holds the value's rank, so nothing is rounded."""
        return video * (len(self._known) + 1) + np.searchsorted(self._known, value)

    def first_at_least(self, video: np.ndarray, value: np.ndarray) -> np.ndarray:
        """The place of the first value of a video that is not below ``value``."""
        return np.searchsorted(self._keys, self._key(video, value))

    def count_within(
        self, video: np.ndarray, at: np.ndarray, within: np.ndarray, *, strict: bool
    ) -> np.ndarray:
        """How many values of each video are less than ``within`` away from ``at``; or as far, if not strict.

        Sums of floats are rounded, so the places that a search finds are moved until the distances agree.
        """
        keys, firsts = np.unique(self._keys, return_index=True)  # each value of a video once
        counts = np.append(firsts, len(self._keys))
        values = self._known[keys % (len(self._known) + 1)]
        begin = np.searchsorted(keys, video * (len(self._known) + 1))
        end = np.searchsorted(keys, (video + 1) * (len(self._known) + 1))

        def inside(place: np.ndarray) -> np.ndarray:
            away = np.abs(at - values[np.clip(place, 0, len(values) - 1)])
            near = away < within if strict else away <= within
            return near & (place >= begin) & (place < end)

        # The values within reach are one stretch: the distance falls towards ``at`` and rises after it.
        low = np.searchsorted(keys, self._key(video, at - within))
        high = np.maximum(np.searchsorted(keys, self._key(video, np.nextafter(at + within, np.inf))), low)
        while (moved := (low < high) & ~inside(low)).any():
            low = low + moved
        while (moved := (low < high) & ~inside(high - 1)).any():
            high = high - moved
        while (moved := inside(low - 1)).any():
            low = low - moved
        while (moved := inside(high)).any():
            high = high + moved
        return (counts[high] - counts[low]).astype(np.float64)


def _touching_pairs(rows: _Rows, single: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, once each, the ordered pairs of single rows whose event or span overlaps the other event."""
    events_S2 = rows.events_NK2[single, 0]
    length_S = events_S2[:, 1] - events_S2[:, 0]
    # Events of about one length lie close together if they overlap one interval.
    _, exponent_S = np.frexp(length_S)
    for size in np.unique(exponent_S // 2).tolist():
        these = single[exponent_S // 2 == size]
        order = _VideoOrder(rows.video_N[these], rows.events_NK2[these, 0, 0])
        longest = float((rows.events_NK2[these, 0, 1] - rows.events_NK2[these, 0, 0]).max()) * (1 + 1e-9)
        candidates = these[order.order]
        for intervals_N2, by_event in ((rows.events_NK2[:, 0], True), (rows.predicted_N2, False)):
            asking = single if by_event else single[rows.has_span_N[single]]
            start, end = intervals_N2[asking].T
            low = order.first_at_least(rows.video_N[asking], start - longest - np.spacing(np.abs(start)))
            high = order.first_at_least(rows.video_N[asking], end)
            for own, place in _expanded(low, np.maximum(high, low)):
                own_P, other_P = asking[own], candidates[place]
                kept = (own_P != other_P) & _overlap(intervals_N2[own_P], rows.events_NK2[other_P, 0])
                if not by_event:  # its event found these before
                    kept &= ~_overlap(rows.events_NK2[own_P, 0], rows.events_NK2[other_P, 0])
                yield own_P[kept], other_P[kept]


def _overlap(a_P2: np.ndarray, b_P2: np.ndarray) -> np.ndarray:
    return (a_P2[:, 0] < b_P2[:, 1]) & (b_P2[:, 0] < a_P2[:, 1])


def _expanded(low: np.ndarray, high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, place) for every place from ``low[i]`` up to ``high[i]``, in chunks."""
    sizes = high - low
    ends = np.cumsum(sizes)
    begin = 0
    while begin < len(sizes):
        done = int(ends[begin - 1]) if begin else 0
        stop = max(begin + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
        part = sizes[begin:stop]
        index = np.repeat(np.arange(begin, stop), part)
        offset = np.arange(len(index)) - np.repeat(np.cumsum(part) - part, part)
        if len(index):
            yield index, low[index] + offset
        begin = stop


def _pairs_of_the_rest(rows: _Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Directed pairs of one video of which a row at least is not single, in chunks."""
    rest = np.flatnonzero(~rows.single_N)
    begin = np.searchsorted(rows.video_N, rows.video_N[rest])
    end = np.searchsorted(rows.video_N, rows.video_N[rest], side="right")
    for index, place in _expanded(begin, end):
        own_P = rest[index]
        kept = own_P != place
        yield own_P[kept], place[kept]
        back = kept & rows.single_N[place]
        yield place[back], own_P[back]
