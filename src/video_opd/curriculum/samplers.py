"""Which k of the ranked candidates to train on (appendix B; GRPO's choice of D.1). No torch.

Every sampler sees the candidates in the order of eq 13: descending in what they are ranked by, ties by id.
Random ones draw a number for each (seed, strategy, id), so a choice depends neither on the order of the file
nor on the machine.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

from video_opd.errors import UserError
from video_opd.seeds import derive_uniform
from video_opd.types import RankBy, Score, Strategy

BUCKETS = 5  # sec. B.3
GWDS_CENTER, GWDS_SIGMA = 0.9, 0.2  # sec. B.4
GAUSSIAN_CENTER, GAUSSIAN_SIGMA = 0.3, 0.2  # sec. D.1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a sampler chose: ``ids`` in rank order, with their ``ranks`` (1 is the first of all candidates).

    Example: ``Selection(ids=("b", "c"), ranks=(1, 3), strategy="dsus", candidates=3, excluded=0, filled=0)``.
    """

    ids: tuple[str, ...]
    ranks: tuple[int, ...]
    strategy: Strategy
    candidates: int  # that had a finite value to rank by
    excluded: int  # that had none
    filled: int  # of BBDS: chosen to make up for buckets with too few members


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """What else a sampler needs. ``center`` and ``sigma`` default to the paper's for the strategy."""

    rank_by: RankBy = "iou_gap"
    buckets: int = BUCKETS
    fill: bool = True
    center: float | None = None
    sigma: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank_by not in get_args(RankBy):
            raise UserError(f"unknown ranking {self.rank_by!r}; choose one of: {', '.join(get_args(RankBy))}")
        if self.buckets < 1:
            raise UserError(f"buckets is {self.buckets}: choose at least 1")
        if self.sigma is not None and not self.sigma > 0:
            raise UserError(f"sigma is {self.sigma}: choose a number above 0")


def select(
    scores: Iterable[Score], strategy: Strategy, k: int, settings: SamplerSettings | None = None
) -> Selection:
    """Chooses min(k, candidates) of ``scores`` (fewer only for BBDS with ``fill=False``).

    Candidates are the scores with a finite value to rank by: δ (eq 12) or the reverse KL; for ``gaussian``
    the student's IoU, with rank 1 nearest to the centre. Raises :class:`UserError` for an unknown strategy
    and for k below 1.
    """
    settings = settings or SamplerSettings()
    if strategy not in SAMPLERS:
        raise UserError(f"unknown strategy {strategy!r}; choose one of: {', '.join(SAMPLERS)}")
    if k < 1:
        raise UserError(f"k is {k}: choose at least 1 sample")
    scores = list(scores)
    valued = [(rank_value(score, strategy, settings), score.id) for score in scores]
    ranked = sorted((pair for pair in valued if math.isfinite(pair[0])), key=lambda pair: (-pair[0], pair[1]))
    values, ids = [value for value, _ in ranked], [identity for _, identity in ranked]
    positions, filled = SAMPLERS[strategy](values, ids, min(k, len(ids)), settings)
    positions = sorted(positions)
    return Selection(
        ids=tuple(ids[i] for i in positions),
        ranks=tuple(i + 1 for i in positions),
        strategy=strategy,
        candidates=len(ids),
        excluded=len(scores) - len(ids),
        filled=filled,
    )


def rank_value(score: Score, strategy: Strategy, settings: SamplerSettings) -> float:
    """What the candidates are ranked by, descending; NaN where it was not measured."""
    if strategy == "gaussian":
        return -abs(score.student_iou - _or(settings.center, GAUSSIAN_CENTER))
    if settings.rank_by == "reverse_kl":
        return math.nan if score.reverse_kl is None else score.reverse_kl
    return score.delta


# A sampler gets descending values, their ids, how many to choose (at most all), and returns their positions
# and how many of them were filled in.
Sampler: TypeAlias = Callable[[Sequence[float], Sequence[str], int, SamplerSettings], tuple[list[int], int]]


def _topk(
    values: Sequence[float], ids: Sequence[str], k: int, settings: SamplerSettings
) -> tuple[list[int], int]:
    """eq 16."""
    return list(range(k)), 0


def uniform_positions(n: int, k: int) -> list[int]:
    """eq 14, 0-based: ⌊(n−1)·t/(k−1)⌋ for t = 0 … k−1, in integers. k = 1 takes the first."""
    assert 0 <= k <= n
    return [0] * k if k <= 1 else [(n - 1) * t // (k - 1) for t in range(k)]


def _dsus(
    values: Sequence[float], ids: Sequence[str], k: int, settings: SamplerSettings
) -> tuple[list[int], int]:
    """eq 13–15."""
    return uniform_positions(len(values), k), 0


def _bbds(
    values: Sequence[float], ids: Sequence[str], k: int, settings: SamplerSettings
) -> tuple[list[int], int]:
    """eq 17–20; what small buckets leave open is filled in descending order."""
    if not values:
        return [], 0
    count, highest, lowest = settings.buckets, values[0], values[-1]
    # eq 18: bucket b holds lower_b ≤ δ < lower_{b+1}, and the last one δ_max as well.
    edges = [lowest + b * (highest - lowest) / count for b in range(1, count)]
    buckets: list[list[int]] = [[] for _ in range(count)]
    for position, value in enumerate(values):
        buckets[bisect_right(edges, value)].append(position)
    chosen: list[int] = []
    for b, members in enumerate(buckets):
        share = k // count + (b < k % count)  # eq 19; b counts from 0 here
        chosen += [members[i] for i in uniform_positions(len(members), min(share, len(members)))]
    if not settings.fill:
        return chosen, 0
    taken = set(chosen)
    rest = [position for position in range(len(values)) if position not in taken][: k - len(chosen)]
    return chosen + rest, len(rest)


def _gwds(
    values: Sequence[float], ids: Sequence[str], k: int, settings: SamplerSettings
) -> tuple[list[int], int]:
    """eq 21–22."""
    center, sigma = _or(settings.center, GWDS_CENTER), _or(settings.sigma, GWDS_SIGMA)
    return _draw(
        [-((value - center) ** 2) / (2 * sigma**2) for value in values], ids, k, "gwds", settings.seed
    ), 0


def _gaussian(
    values: Sequence[float], ids: Sequence[str], k: int, settings: SamplerSettings
) -> tuple[list[int], int]:
    """eq 30–31; ``values`` are negated distances of the student's IoU from the centre."""
    sigma = _or(settings.sigma, GAUSSIAN_SIGMA)
    return _draw([-(value**2) / (2 * sigma**2) for value in values], ids, k, "gaussian", settings.seed), 0


def _random(
    values: Sequence[float], ids: Sequence[str], k: int, settings: SamplerSettings
) -> tuple[list[int], int]:
    return _draw([0.0] * len(ids), ids, k, "random", settings.seed), 0


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


SAMPLERS: dict[str, Sampler] = {
    "topk": _topk,
    "dsus": _dsus,
    "bbds": _bbds,
    "gwds": _gwds,
    "gaussian": _gaussian,
    "random": _random,
}
