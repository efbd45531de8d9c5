"""Which k of the ranked candidates are selected (appendix B; GRPO's selection by difficulty, D.1). No torch.

Every sampler gets the candidates in the order of eq 13: descending in the value that they are ranked by,
ties by id. Random samplers draw a number for each (seed, strategy, id), so a selection depends neither on
the order of the file nor on the machine.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from video_opd.config import SelectionConfig
from video_opd.seeds import derive_uniform
from video_opd.types import Score, Strategy

GWDS_CENTER, GWDS_SIGMA = 0.9, 0.2  # sec. B.4
GAUSSIAN_CENTER, GAUSSIAN_SIGMA = 0.3, 0.2  # sec. D.1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The selected candidates: ``ids`` in rank order, with their ``ranks`` (1 is the best candidate).

    Example: ``Selection(ids=("b", "c"), ranks=(1, 3), strategy="dsus", candidates=3, excluded=0, filled=0)``.
    """

    ids: tuple[str, ...]
    ranks: tuple[int, ...]
    strategy: Strategy
    candidates: int  # the given scores (those that passed the gate) with a finite value to rank by
    excluded: int  # the given scores without one
    filled: int  # BBDS: selected in place of members that small buckets lack


def select(
    scores: Iterable[Score], settings: SelectionConfig, *, seed: int = 0, fill: bool = True
) -> Selection:
    """Selects min(k, candidates) of ``scores``; fewer only for BBDS without ``fill`` (eq 20 taken literally).

    Candidates are the scores with a finite value to rank by: δ (eq 12) or the reverse KL; for ``gaussian``
    the student's IoU, with rank 1 nearest to the centre. The gate is not applied here.
    """
    scores = list(scores)
    valued = [(rank_value(score, settings), score.id) for score in scores]
    ranked = sorted((pair for pair in valued if math.isfinite(pair[0])), key=lambda pair: (-pair[0], pair[1]))
    ranking = Ranking(values=[value for value, _ in ranked], ids=[identity for _, identity in ranked])
    k = min(settings.k, len(ranking))
    positions = SAMPLERS[settings.strategy](ranking, k, settings, seed)
    others = sorted(set(range(len(ranking))) - set(positions)) if fill else []
    filled = others[: k - len(positions)]
    positions = sorted([*positions, *filled])
    return Selection(
        ids=tuple(ranking.ids[i] for i in positions),
        ranks=tuple(i + 1 for i in positions),
        strategy=settings.strategy,
        candidates=len(ranking),
        excluded=len(scores) - len(ranking),
        filled=len(filled),
    )


def rank_value(score: Score, settings: SelectionConfig) -> float:
    """The value that candidates are ranked by, descending; NaN where it was not measured."""
    if settings.strategy == "gaussian":
        return -abs(score.student_iou - _or(settings.center, GAUSSIAN_CENTER))
    if settings.rank_by == "reverse_kl":
        return math.nan if score.reverse_kl is None else score.reverse_kl
    return score.delta


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The candidates in the order of eq 13: their values, descending, and their ids."""

    values: Sequence[float]
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)


# A sampler gets the number to select (at most all candidates) and the seed, and returns positions in the
# ranking, at most that many.
Sampler: TypeAlias = Callable[[Ranking, int, SelectionConfig, int], list[int]]


def _topk(ranking: Ranking, k: int, settings: SelectionConfig, seed: int) -> list[int]:
    """eq 16."""
    return list(range(k))


def uniform_positions(n: int, k: int) -> list[int]:
    """eq 14 counted from 0: ⌊(n−1)·t/(k−1)⌋ for t = 0 … k−1, in integers. k = 1 gives the first position."""
    assert 0 <= k <= n
    return [0] * k if k <= 1 else [(n - 1) * t // (k - 1) for t in range(k)]


def _dsus(ranking: Ranking, k: int, settings: SelectionConfig, seed: int) -> list[int]:
    """eq 13–15."""
    return uniform_positions(len(ranking), k)


def _bbds(ranking: Ranking, k: int, settings: SelectionConfig, seed: int) -> list[int]:
    """eq 17–20. A bucket with fewer members than its share gives them all."""
    if not ranking:
        return []
    count, highest, lowest = settings.buckets, ranking.values[0], ranking.values[-1]
    # eq 18: bucket b holds lower_b ≤ δ < lower_{b+1}, and the last one δ_max as well.
    edges = [lowest + b * (highest - lowest) / count for b in range(1, count)]
    buckets: list[list[int]] = [[] for _ in range(count)]
    for position, value in enumerate(ranking.values):
        buckets[bisect_right(edges, value)].append(position)
    chosen: list[int] = []
    for b, members in enumerate(buckets):
        share = k // count + (b < k % count)  # eq 19; b counts from 0 here
        chosen += [members[i] for i in uniform_positions(len(members), min(share, len(members)))]
    return chosen


def _gwds(ranking: Ranking, k: int, settings: SelectionConfig, seed: int) -> list[int]:
    """eq 21–22."""
    center, sigma = _or(settings.center, GWDS_CENTER), _or(settings.sigma, GWDS_SIGMA)
    log_weights = [_log_weight(value - center, sigma) for value in ranking.values]
    return _draw(log_weights, ranking.ids, k, "gwds", seed)


def _gaussian(ranking: Ranking, k: int, settings: SelectionConfig, seed: int) -> list[int]:
    """eq 30–31. The values are negated distances of the student's IoU from the centre."""
    sigma = _or(settings.sigma, GAUSSIAN_SIGMA)
    log_weights = [_log_weight(value, sigma) for value in ranking.values]
    return _draw(log_weights, ranking.ids, k, "gaussian", seed)


def _log_weight(distance: float, sigma: float) -> float:
    """log exp(−d²/2σ²). The quotient is squared: a small σ alone would underflow, a large d overflow."""
    widths = distance / sigma
    return -0.5 * widths * widths


def _random(ranking: Ranking, k: int, settings: SelectionConfig, seed: int) -> list[int]:
    return _draw([0.0] * len(ranking), ranking.ids, k, "random", seed)


def _draw(log_weights: Sequence[float], ids: Sequence[str], k: int, purpose: str, seed: int) -> list[int]:
    """k positions drawn one after another without replacement, each in proportion to the weights left.

    The k largest of log w + Gumbel noise are exactly that draw (Efraimidis and Spirakis 2006), and log
    weights do not underflow far from the centre.
    """
    keys = [
        (weight - math.log(-math.log(derive_uniform(seed, purpose, identity))), identity, position)
        for position, (weight, identity) in enumerate(zip(log_weights, ids, strict=True))
    ]
    keys.sort(key=lambda key: (-key[0], key[1]))
    return [position for _, _, position in keys[:k]]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


SAMPLERS: dict[Strategy, Sampler] = {
    "topk": _topk,
    "dsus": _dsus,
    "bbds": _bbds,
    "gwds": _gwds,
    "gaussian": _gaussian,
    "random": _random,
}
