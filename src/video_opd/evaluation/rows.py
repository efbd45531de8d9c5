"""The annotated rows of a data file, and how their predictions did. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from video_opd.evaluation.protocols import Protocol, get_protocol
from video_opd.temporal import NO_RULE, Interval, best_iou
from video_opd.types import Prediction, Sample

THRESHOLDS = (0.3, 0.5, 0.7)
METRICS = (*(f"R@{m}" for m in THRESHOLDS), "mIoU")
PERCENT = 100.0
# An IoU of 3/10 computed in floats may fall a rounding step short of 0.3.
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class RowScore:
    """One annotated row and how its prediction did. ``span`` is as the protocol compares it."""

    sample: Sample
    span: Interval | None
    iou: float
    missing: bool
    unparsed: bool
    rule: str  # the rule by which the response was read; empty if the prediction is missing


def score_rows(
    samples: Iterable[Sample], predictions: Mapping[str, Prediction], protocol: str | Protocol = "paper"
) -> list[RowScore]:
    """Returns the annotated rows of ``samples``, scored, in their order."""
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


def videos_of(rows: Iterable[RowScore]) -> list[str]:
    """Returns the video of each row: what the bootstrap draws."""
    return [str(row.sample.video) for row in rows]


def metric_values(ious_N: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns what each row contributes to each of METRICS: float64 [N, M], in percent."""
    ious_N = np.asarray(ious_N, dtype=np.float64)
    columns = [(ious_N >= threshold - ROUNDING).astype(np.float64) for threshold in THRESHOLDS]
    return PERCENT * np.stack([*columns, ious_N], axis=-1)
