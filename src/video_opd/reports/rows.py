"""The rows of the test sets in a run folder: annotations, predictions, and failures with their frames.

    eval/annotations-DATA.jsonl  eval/NAME-DATA.jsonl  eval/failures-DATA.jsonl

A demo of an earlier version has its annotations in ``world/test/DATA.jsonl`` alone. A demo calls its
predictions ``eval/predictions-NAME-DATA.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.protocols import Protocol, get_protocol, is_thinking
from video_opd.evaluation.rows import PERCENT, score_rows
from video_opd.reports import row_records
from video_opd.reports.run_files import RunFiles
from video_opd.types import Prediction, Sample

SAME_MIOU = 0.05  # points by which the rows' mIoU may differ from the record's, which may be rounded


@dataclass(frozen=True, kw_only=True)
class EvaluatedRows:
    """The annotated rows of one test set, and each model's predictions of them.

    ``failures`` are rows of ``failures-DATA.jsonl`` by their ids.
    """

    protocol: Protocol
    samples: Mapping[str, Sample] = field(default_factory=dict)
    predictions: Mapping[str, Mapping[str, Prediction]] = field(default_factory=dict)  # by model
    failures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_student(self, other: EvaluatedRows, name: str) -> EvaluatedRows:
        """Adds the student of ``other`` under ``name``; the failures that are shown are then its own."""
        if "student" not in other.predictions or (self.predictions and self.protocol != other.protocol):
            return self
        return EvaluatedRows(
            protocol=other.protocol,
            samples={**other.samples, **self.samples},
            predictions={**self.predictions, name: other.predictions["student"]},
            failures=other.failures,
        )


def known_protocol(name: str) -> Protocol | None:
    """Returns the protocol of a record, ``paper`` if it names none, and None for an unknown name."""
    try:
        return get_protocol(name or "paper")
    except UserError:
        return None


def read_rows(files: RunFiles, data: str, protocol: Protocol) -> EvaluatedRows:
    """Reads annotations and failures of the test set ``data``."""
    samples: dict[str, Sample] = {}
    for name in (f"eval/annotations-{data}.jsonl", f"world/test/{data}.jsonl"):
        samples = samples or {sample.id: sample for sample in files.rows(name, row_records.annotation_row)}
    shown = files.rows(f"eval/failures-{data}.jsonl", row_records.failure_row)
    return EvaluatedRows(protocol=protocol, samples=samples, failures={row["id"]: row for row in shown})


def with_predictions(
    rows: EvaluatedRows, files: RunFiles, stem: str, model: str, miou: float
) -> EvaluatedRows:
    """Adds the predictions of a model, whose record ``eval/STEM.json`` says ``miou``.

    They are left out, with a note, if they give another mIoU: some are lost, or the annotations are others.
    """
    if not rows.samples:
        return rows
    for name in (f"eval/predictions-{stem}.jsonl", f"eval/{stem}.jsonl"):
        read = partial(
            row_records.prediction_row,
            protocol=rows.protocol,
            thinking=is_thinking(files.record(f"{name}.meta.json")),
        )
        found = {each.id: each for each in files.rows(name, read)}
        if not found:
            continue
        scored = score_rows(rows.samples.values(), found, rows.protocol)
        own = PERCENT * sum(row.iou for row in scored) / len(scored)
        if abs(own - miou) > SAME_MIOU:
            files.note(name, f"gives mIoU {own:.1f}, and the record says {miou:.1f}: its rows are not used")
            return rows
        return replace(rows, predictions={**rows.predictions, model: found})
    return rows
