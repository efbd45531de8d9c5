"""Grounding metrics, and the controls that say what they are worth. No torch.

R@m is the share of rows with IoU ≥ m, mIoU the mean IoU, both in percent. IoU is the best over the annotated
spans. A row without a prediction, or whose first response holds no span, counts as 0. Intervals are a
bootstrap over videos (:mod:`video_opd.evaluation.bootstrap`). Rows without annotation are left out, counted.

Shapes: ``N`` rows, ``M`` metrics, ``A`` constant answers, ``K`` annotated spans a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from video_opd.errors import UserError
from video_opd.evaluation.bootstrap import DRAWS, draws_of_means, interval95
from video_opd.evaluation.protocols import Protocol, get_protocol
from video_opd.temporal import NO_RULE, Interval, best_iou, centre_s
from video_opd.types import Prediction, Sample

THRESHOLDS = (0.3, 0.5, 0.7)
METRICS = (*(f"R@{m}" for m in THRESHOLDS), "mIoU")
# An IoU of 3/10 computed in floats may fall a rounding step short of 0.3.
ROUNDING = 1e-9
PERCENT = 100.0
# Two events of one video are told apart by an answer only where they hardly overlap.
MAX_EVENT_OVERLAP = 0.1
BOOTSTRAP_SEED = 0


# --- rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """One annotated row and how its prediction did. ``span`` is as the protocol compares it."""

    sample: Sample
    span: Interval | None
    iou: float
    missing: bool
    unparsed: bool
    rule: str  # by which the answer was read; empty where it is missing


def score_rows(
    samples: Iterable[Sample], predictions: Mapping[str, Prediction], protocol: str | Protocol = "paper"
) -> list[RowScore]:
    """The annotated rows of ``samples``, scored, in their order."""
    protocol = get_protocol(protocol)
    rows = []
    for sample in samples:
        if not sample.spans:
            continue
        prediction = predictions.get(sample.id)
        span = prediction.spans[0] if prediction is not None and prediction.spans else None
        if span is not None:
            span = protocol.prepare(span)
        rows.append(
            RowScore(
                sample=sample,
                span=span,
                iou=best_iou(span, sample.spans),
                missing=prediction is None,
                unparsed=prediction is not None and span is None,
                rule="" if prediction is None else next(iter(prediction.rules), NO_RULE),
            )
        )
    return rows


def metric_values(ious_N: Sequence[float] | np.ndarray) -> np.ndarray:
    """What each row contributes to each of METRICS [N, M], in percent."""
    ious_N = np.asarray(ious_N, dtype=np.float64)
    columns = [(ious_N >= threshold - ROUNDING).astype(np.float64) for threshold in THRESHOLDS]
    return PERCENT * np.stack([*columns, ious_N], axis=-1)


# --- metrics -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Grounding metrics of one data file, or of one source in it.

    ``values`` and ``ci95`` hold R@0.3, R@0.5, R@0.7 and mIoU in percent; ``rules`` how many of the answers
    each rule of the parser read (``none``: nothing was found).
    """

    n: int
    values: Mapping[str, float]
    ci95: Mapping[str, tuple[float, float]]
    unparsed: int
    missing: int
    rules: Mapping[str, int] = field(default_factory=dict)
    unannotated: int = 0
    protocol: Mapping[str, Any] | None = None
    by_source: Mapping[str, Metrics] | None = None

    @property
    def miou(self) -> float:
        return self.values["mIoU"]

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {"n": self.n, **self.values}
        record["ci95"] = {name: list(interval) for name, interval in self.ci95.items()}
        record |= {"unparsed": self.unparsed, "missing": self.missing, "rules": dict(self.rules)}
        if self.protocol is not None:  # of the whole, not of a source
            record |= {"unannotated": self.unannotated, "protocol": dict(self.protocol)}
            record["by_source"] = {name: part.to_json() for name, part in (self.by_source or {}).items()}
        return record


def evaluate(
    samples: Sequence[Sample],
    predictions: Mapping[str, Prediction],
    protocol: str | Protocol = "paper",
    *,
    deviations: Mapping[str, Any] | None = None,
    draws: int = DRAWS,
    seed: int = BOOTSTRAP_SEED,
) -> Metrics:
    """Metrics of ``predictions`` (by id) on the annotated rows of ``samples``.

    ``deviations`` is what the answers were made with otherwise than the protocol says
    (:func:`video_opd.evaluation.protocols.deviations`; None: nobody knows); it goes into the result's
    ``protocol``. Raises :class:`UserError` where no row is annotated, or no prediction belongs to any row.
    """
    protocol = get_protocol(protocol)
    rows = score_rows(samples, predictions, protocol)
    _need_rows(rows)
    if predictions and all(row.missing for row in rows):
        raise UserError(
            f"none of the {len(predictions)} predictions has the id of an annotated row: "
            "check that they were made from this data file"
        )
    sources: dict[str, list[RowScore]] = {}
    for row in rows:
        sources.setdefault(row.sample.source or "none", []).append(row)
    named = any(row.sample.source is not None for row in rows)
    return _summarise(
        rows,
        draws=draws,
        seed=seed,
        unannotated=len(samples) - len(rows),
        protocol={
            **protocol.to_json(),
            "deviations": None if deviations is None else dict(deviations),
            "ci95": f"bootstrap over videos, {draws} draws, percentiles, seed {seed}",
        },
        by_source={
            source: _summarise(part, draws=draws, seed=seed)
            for source, part in sorted(sources.items())
            if named
        },
    )


def _summarise(rows: Sequence[RowScore], *, draws: int, seed: int, **extra: Any) -> Metrics:
    values_NM = metric_values([row.iou for row in rows])
    intervals_M2 = interval95(values_NM, _videos(rows), draws=draws, seed=seed)
    return Metrics(
        n=len(rows),
        values=dict(zip(METRICS, values_NM.mean(axis=0).tolist(), strict=True)),
        ci95={name: (low, high) for name, (low, high) in zip(METRICS, intervals_M2.tolist(), strict=True)},
        unparsed=sum(row.unparsed for row in rows),
        missing=sum(row.missing for row in rows),
        rules=dict(Counter(row.rule for row in rows if not row.missing).most_common()),
        **extra,
    )


def _videos(rows: Iterable[RowScore]) -> list[str]:
    return [str(row.sample.video) for row in rows]


def _need_rows(rows: Sequence[RowScore]) -> None:
    if not rows:
        raise UserError('no row of the data is annotated: evaluation needs "spans"')


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much a metric rose from one predictions file to another, in percentage points."""

    value: float
    ci95: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": list(self.ci95)}


def paired_difference(
    samples: Sequence[Sample],
    before: Mapping[str, Prediction],
    after: Mapping[str, Prediction],
    protocol: str | Protocol = "paper",
    *,
    draws: int = DRAWS,
    seed: int = BOOTSTRAP_SEED,
) -> dict[str, Difference]:
    """``after`` − ``before`` for each of METRICS; both are seen on the same drawn videos."""
    rows = score_rows(samples, before, protocol)
    _need_rows(rows)
    later = score_rows(samples, after, protocol)
    rise_NM = metric_values([row.iou for row in later]) - metric_values([row.iou for row in rows])
    intervals_M2 = interval95(rise_NM, _videos(rows), draws=draws, seed=seed)
    return {
        name: Difference(value=float(rise), ci95=(float(low), float(high)))
        for name, rise, (low, high) in zip(METRICS, rise_NM.mean(axis=0), intervals_M2, strict=True)
    }


# --- control: the best answer that looks at nothing --------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ConstantPrediction:
    """The best answer that ignores video and query: the same part of the duration every time."""

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
    """The constant answer of highest mIoU on a grid of ``steps`` equal parts of the duration.

    It is found on the test rows themselves, so it is an upper bound for what a prior can reach. None where
    no annotated row has a duration.
    """
    spans = [
        [(start / s.duration_s, end / s.duration_s) for start, end in s.spans]
        for s in samples
        if s.spans and s.duration_s
    ]
    if not spans:
        return None
    most = max(map(len, spans))
    # IoU does not change with the unit of time, so everything is in durations. Rows are filled up with their
    # first span, which changes no maximum.
    truth_NK2 = np.array([row + [row[0]] * (most - len(row)) for row in spans])
    starts, ends = np.triu_indices(steps + 1, k=1)
    answers_A2 = np.stack([starts, ends], axis=-1) / steps

    chunk = max(1, 2_000_000 // (len(answers_A2) * most))
    totals_A = np.zeros(len(answers_A2))
    for done in range(0, len(truth_NK2), chunk):
        totals_A += _ious(answers_A2, truth_NK2[done : done + chunk]).sum(axis=0)
    best = int(totals_A.argmax())
    ious_N = _ious(answers_A2[best : best + 1], truth_NK2)[:, 0]
    return ConstantPrediction(
        start_fraction=float(answers_A2[best, 0]),
        end_fraction=float(answers_A2[best, 1]),
        n=len(spans),
        values=dict(zip(METRICS, metric_values(ious_N).mean(axis=0).tolist(), strict=True)),
    )


def _ious(answers_A2: np.ndarray, truth_NK2: np.ndarray) -> np.ndarray:
    """The best IoU [N, A] of each answer with the spans of each row."""
    start_A, end_A = answers_A2.T
    start_NK1, end_NK1 = truth_NK2[..., 0, None], truth_NK2[..., 1, None]
    shared_NKA = np.minimum(end_A, end_NK1) - np.maximum(start_A, start_NK1)
    hull_NKA = np.maximum(end_A, end_NK1) - np.minimum(start_A, start_NK1)
    return (shared_NKA.clip(min=0) / hull_NKA).max(axis=1)


# --- control: does the answer listen to the query ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class QuerySwap:
    """How often an answer is nearer its own event than the other query's; chance is 50%."""

    share: float  # percent of comparisons
    ci95: tuple[float, float]
    same_answer: float  # percent of pairs of queries that got one and the same answer
    comparisons: int  # answer × other query of the same video
    videos: int

    def to_json(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "ci95": list(self.ci95),
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
    seed: int = BOOTSTRAP_SEED,
) -> QuerySwap | None:
    """Compares each answer with its own event and with those of the other queries on its video.

    An answer is nearer its own event if its IoU with it is higher; equal IoUs (as a rule 0 and 0) are
    decided by the distance of the centres, and where that is equal too it counts half. An unparsed or
    missing answer is nearer nothing and counts 0. Pairs whose events overlap with an IoU above 0.1 are left
    out. One answer to both queries of a pair is right for one of them, so a model that does not listen
    scores 50%. None where no video has two such queries.
    """
    rows_by_video: dict[str, list[RowScore]] = {}
    for row in score_rows(samples, predictions, protocol):
        rows_by_video.setdefault(str(row.sample.video), []).append(row)
    nearer: list[float] = []
    same: list[float] = []
    videos: list[str] = []
    for video, rows in rows_by_video.items():
        for a, b in combinations(rows, 2):
            if max(best_iou(span, b.sample.spans) for span in a.sample.spans) > MAX_EVENT_OVERLAP:
                continue
            nearer += [_nearer_own(a, b), _nearer_own(b, a)]
            same.append(float(a.span is not None and a.span == b.span))
            videos += [video, video]
    if not nearer:
        return None
    values_N1 = PERCENT * np.array(nearer)[:, None]
    low, high = np.percentile(draws_of_means(values_N1, videos, draws=draws, seed=seed), [2.5, 97.5])
    return QuerySwap(
        share=float(values_N1.mean()),
        ci95=(float(low), float(high)),
        same_answer=PERCENT * float(np.mean(same)),
        comparisons=len(nearer),
        videos=len(set(videos)),
    )


def _nearer_own(own: RowScore, other: RowScore) -> float:
    if own.span is None:
        return 0.0
    other_iou = best_iou(own.span, other.sample.spans)
    if own.iou != other_iou:
        return float(own.iou > other_iou)
    own_s, other_s = (
        min(abs(centre_s(own.span) - centre_s(span)) for span in row.sample.spans) for row in (own, other)
    )
    return 0.5 if own_s == other_s else float(own_s < other_s)


# --- the record --------------------------------------------------------------------------------------


def evaluation_record(
    metrics: Metrics, constant: ConstantPrediction | None = None, swap: QuerySwap | None = None
) -> dict[str, Any]:
    """The record of ``evaluate --json``: the metrics, and beside them what they are worth."""
    return {
        **metrics.to_json(),
        "best_constant": None if constant is None else constant.to_json(),
        "query_swap": None if swap is None else swap.to_json(),
    }
