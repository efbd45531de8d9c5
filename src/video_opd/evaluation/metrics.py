"""Grounding metrics of predictions, and the difference of two. No torch.

R@m is the share of rows with IoU ≥ m, mIoU the mean IoU, both in percent. IoU is the best over the annotated
spans. A row without a prediction, or whose first response holds no span, counts as 0. Intervals are a
bootstrap over videos (:mod:`video_opd.evaluation.bootstrap`). Rows without annotation are left out, and
counted.

Shapes: ``N`` rows, ``M`` metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.best_constant import ConstantPrediction
from video_opd.evaluation.bootstrap import DRAWS, Interval95, interval95
from video_opd.evaluation.protocols import Protocol, get_protocol
from video_opd.evaluation.query_swap import QuerySwap
from video_opd.evaluation.rows import METRICS, RowScore, metric_values, score_rows, videos_of
from video_opd.types import Prediction, Sample

BOOTSTRAP_SEED = 0
NOT_ANNOTATED = 'no row of the data is annotated: evaluation needs "spans"'


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Grounding metrics of one data file, or of one source in it.

    ``values`` and ``ci95`` hold R@0.3, R@0.5, R@0.7 and mIoU in percent; ``rules`` how many of the responses
    each rule of the parser read (``none``: nothing was found).
    """

    n: int
    values: Mapping[str, float]
    ci95: Mapping[str, Interval95]
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
        record["ci95"] = dict(self.ci95)
        record |= {"unparsed": self.unparsed, "missing": self.missing, "rules": dict(self.rules)}
        if self.protocol is not None:  # only the metrics of all sources together have it
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
    """Returns the metrics of ``predictions`` (by id) on the annotated rows of ``samples``.

    ``deviations`` says what the responses were made with otherwise than the protocol says
    (:func:`video_opd.evaluation.protocols.deviations`; None: nobody knows). It goes into the result's
    ``protocol``. Raises :class:`UserError` if no row is annotated, or if no prediction belongs to any row.
    """
    protocol = get_protocol(protocol)
    rows = score_rows(samples, predictions, protocol)
    if predictions and rows and all(row.missing for row in rows):
        raise UserError(
            f"none of the {len(predictions)} predictions has the id of an annotated row: "
            "check that they were made from this data file"
        )
    return metrics_of_rows(
        rows,
        protocol,
        unannotated=len(samples) - len(rows),
        deviations=deviations,
        draws=draws,
        seed=seed,
    )


def metrics_of_rows(
    rows: Sequence[RowScore],
    protocol: Protocol,
    *,
    unannotated: int,
    deviations: Mapping[str, Any] | None = None,
    draws: int = DRAWS,
    seed: int = BOOTSTRAP_SEED,
) -> Metrics:
    """Returns the metrics of rows that were scored under ``protocol``, as :func:`evaluate` does."""
    _need_rows(rows)
    sources: dict[str, list[RowScore]] = {}
    for row in rows:
        sources.setdefault(row.sample.source or "none", []).append(row)
    whole = _summarise(rows, draws=draws, seed=seed)
    by_source = {}
    if any(row.sample.source is not None for row in rows):
        for source, part in sorted(sources.items()):
            by_source[source] = whole if len(sources) == 1 else _summarise(part, draws=draws, seed=seed)
    return replace(
        whole,
        unannotated=unannotated,
        protocol={
            **protocol.to_json(),
            "deviations": None if deviations is None else dict(deviations),
            "ci95": f"bootstrap over videos, {draws} draws, percentiles, seed {seed}",
        },
        by_source=by_source,
    )


def _summarise(rows: Sequence[RowScore], *, draws: int, seed: int) -> Metrics:
    values_NM = metric_values([row.iou for row in rows])
    intervals_M = interval95(values_NM, videos_of(rows), draws=draws, seed=seed)
    return Metrics(
        n=len(rows),
        values=dict(zip(METRICS, values_NM.mean(axis=0).tolist(), strict=True)),
        ci95=dict(zip(METRICS, intervals_M, strict=True)),
        unparsed=sum(row.unparsed for row in rows),
        missing=sum(row.missing for row in rows),
        rules=dict(Counter(row.rule for row in rows if not row.missing).most_common()),
    )


def _need_rows(rows: Sequence[RowScore]) -> None:
    if not rows:
        raise UserError(NOT_ANNOTATED)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much a metric rose from one predictions file to another, in percentage points."""

    value: float
    ci95: Interval95

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": self.ci95}


def paired_difference(
    samples: Sequence[Sample],
    before: Mapping[str, Prediction],
    after: Mapping[str, Prediction],
    protocol: str | Protocol = "paper",
    *,
    draws: int = DRAWS,
    seed: int = BOOTSTRAP_SEED,
) -> dict[str, Difference]:
    """Returns ``after`` − ``before`` for each of METRICS; both are seen on the same drawn videos."""
    rows = score_rows(samples, before, protocol)
    return difference_of_rows(rows, score_rows(samples, after, protocol), draws=draws, seed=seed)


def difference_of_rows(
    before: Sequence[RowScore],
    after: Sequence[RowScore],
    *,
    draws: int = DRAWS,
    seed: int = BOOTSTRAP_SEED,
) -> dict[str, Difference]:
    """Returns the difference of two scorings of the same rows, as :func:`paired_difference` does."""
    _need_rows(before)
    rise_NM = metric_values([row.iou for row in after]) - metric_values([row.iou for row in before])
    intervals_M = interval95(rise_NM, videos_of(before), draws=draws, seed=seed)
    return {
        name: Difference(value=float(rise), ci95=interval)
        for name, rise, interval in zip(METRICS, rise_NM.mean(axis=0), intervals_M, strict=True)
    }


def evaluation_record(
    metrics: Metrics, constant: ConstantPrediction | None = None, swap: QuerySwap | None = None
) -> dict[str, Any]:
    """Returns the record of ``evaluate --json``: the metrics and their controls."""
    return {
        **metrics.to_json(),
        "best_constant": None if constant is None else constant.to_json(),
        "query_swap": None if swap is None else swap.to_json(),
    }
