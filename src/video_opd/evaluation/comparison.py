"""Several models on several data sets: the figures of a table like the paper's table 1. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.best_constant import ConstantPrediction, best_constant
from video_opd.evaluation.metrics import (
    NOT_ANNOTATED,
    Difference,
    Metrics,
    difference_of_rows,
    evaluation_record,
    metrics_of_rows,
)
from video_opd.evaluation.predictions import ModelPredictions, file_deviations, read_model_predictions
from video_opd.evaluation.protocols import Protocol, get_protocol
from video_opd.evaluation.query_swap import QuerySwap, swap_of_rows
from video_opd.evaluation.rows import RowScore, score_rows
from video_opd.progress import log
from video_opd.types import Sample


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one data set. ``difference`` is this model − the baseline; None without a baseline."""

    metrics: Metrics
    swap: QuerySwap | None
    difference: Mapping[str, Difference] | None
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        record = {
            **self.metrics.to_json(),
            "query_swap": None if self.swap is None else self.swap.to_json(),
            "files": list(self.files),
        }
        if self.difference is not None:
            record["difference"] = {name: d.to_json() for name, d in self.difference.items()}
        return record


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results by model and data set. A model without predictions for a data set has no result for it.

    ``baseline`` is the name of the model that the differences are from.
    """

    protocol: Protocol
    constants: Mapping[str, ConstantPrediction | None]  # data set -> its best constant
    results: Mapping[str, Mapping[str, Result]]
    baseline: str | None = None

    @property
    def data_sets(self) -> tuple[str, ...]:
        return tuple(self.constants)

    def to_json(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol.to_json(),
            "data_sets": {
                name: {"best_constant": None if constant is None else constant.to_json()}
                for name, constant in self.constants.items()
            },
            "baseline": self.baseline,
            "models": {
                model: {name: result.to_json() for name, result in results.items()}
                for model, results in self.results.items()
            },
        }


def compare(
    data_sets: Mapping[str, Sequence[Sample]],
    models: Sequence[ModelPredictions],
    protocol: Protocol,
    baseline: ModelPredictions | None = None,
) -> Comparison:
    """Evaluates every model on every data set, and its paired difference from ``baseline``.

    Raises :class:`UserError` as :func:`check` does.
    """
    everyone = [*([] if baseline is None else [baseline]), *models]
    check(data_sets, everyone)
    results: dict[str, dict[str, Result]] = {}
    before: dict[str, Sequence[RowScore]] = {}  # the baseline's rows of each data set
    for model in everyone:
        found = results[model.name] = {}
        for name, samples in data_sets.items():
            result, rows = _result(samples, model, protocol, before.get(name))
            if result is not None:
                found[name] = result
                if model is baseline and not all(row.missing for row in rows):
                    before[name] = rows
    return Comparison(
        protocol=protocol,
        constants={name: best_constant(samples) for name, samples in data_sets.items()},
        results=results,
        baseline=None if baseline is None else baseline.name,
    )


def _result(
    samples: Sequence[Sample],
    model: ModelPredictions,
    protocol: Protocol,
    before: Sequence[RowScore] | None,
) -> tuple[Result | None, Sequence[RowScore]]:
    """Scores a model on a data set. No result if it has predictions, but none for these annotated rows."""
    predictions, files = model.of(samples)
    rows = score_rows(samples, predictions, protocol)
    nothing = not any(file.predictions for file in model.files)  # every video failed, say
    if not nothing and all(row.missing for row in rows):
        return None, rows
    result = Result(
        metrics=metrics_of_rows(
            rows,
            protocol,
            unannotated=len(samples) - len(rows),
            deviations=file_deviations(files or model.files, protocol),
        ),
        swap=swap_of_rows(rows),
        difference=None if before is None else difference_of_rows(before, rows),
        files=tuple(file.path for file in files or model.files),
    )
    return result, rows


def evaluate_file(
    samples: Sequence[Sample], path: str | Path, protocol: str | Protocol = "paper"
) -> dict[str, Any]:
    """Returns the record of ``video-opd evaluate --json`` for one predictions file."""
    protocol = get_protocol(protocol)
    predictions = read_model_predictions([path], protocol, name="model")
    compared = compare({"data": samples}, [predictions], protocol)
    result = compared.results["model"]["data"]
    return evaluation_record(result.metrics, compared.constants["data"], result.swap)


def by_source(data_sets: Mapping[str, Sequence[Sample]]) -> dict[str, list[Sample]]:
    """Makes a data set of each ``source`` in all files; rows without a source belong to "none".

    A source without an annotated row is left out and named in the log, unless none has one. Raises
    :class:`UserError` if two files have a row in common.
    """
    _check_ids(data_sets)
    found: dict[str, list[Sample]] = {}
    for samples in data_sets.values():
        for sample in samples:
            found.setdefault(sample.source or "none", []).append(sample)
    annotated = {source: samples for source, samples in found.items() if _is_annotated(samples)}
    for source in found if annotated else ():
        if source not in annotated:
            log(f"source {source}: none of its {len(found[source])} rows is annotated, so it is left out")
    return annotated or found


def check(
    data_sets: Mapping[str, Sequence[Sample]], models: Sequence[ModelPredictions], others: Sequence[str] = ()
) -> None:
    """Checks what :func:`compare` needs. ``others`` are the names of models that have yet to predict.

    Raises :class:`UserError` if two data sets have a row in common, if a data set has no annotated row, if
    two models have the same name, and if no prediction of a model belongs to an annotated row.
    """
    _check_ids(data_sets)
    for name, samples in data_sets.items():
        if not _is_annotated(samples):
            raise UserError(f"{name}: {NOT_ANNOTATED}")
    names = [*(model.name for model in models), *others]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two models are called {name!r}: write NAME=FILE for each")
    for model in models:
        if not _answers_any(model, data_sets):
            raise UserError(
                f"{model.files[0].path}: none of its ids is that of an annotated row: check that the "
                "predictions were made from this data file"
            )


def _answers_any(model: ModelPredictions, data_sets: Mapping[str, Sequence[Sample]]) -> bool:
    """Whether a model answered an annotated row. True for one without any prediction: every video failed."""
    answered = [bool(model.of(s for s in samples if s.spans)[0]) for samples in data_sets.values()]
    return any(answered) or not any(file.predictions for file in model.files)


def _is_annotated(samples: Sequence[Sample]) -> bool:
    return any(sample.spans for sample in samples)


def _check_ids(data_sets: Mapping[str, Sequence[Sample]]) -> None:
    owner: dict[str, str] = {}
    for name, samples in data_sets.items():
        for sample in samples:
            if sample.id in owner:
                raise UserError(
                    f"id {sample.id!r} is in {owner[sample.id]} and in {name}: nobody can tell to which a "
                    "prediction belongs, so evaluate them one at a time"
                )
            owner[sample.id] = name
