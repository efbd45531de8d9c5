"""Predictions files: the three forms a row may have, and what is known of how a model made them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.protocols import (
    Protocol,
    deviations,
    get_protocol,
    is_thinking,
    prompt_style_of,
    protocol_of,
)
from video_opd.evaluation.resume import note_changes, provenance_path, read_provenance
from video_opd.jsonl import read_jsonl
from video_opd.temporal import NO_RULE, Interval, is_proper
from video_opd.types import Prediction, Sample

GIVEN = "given"  # the rule of a span that came without text


# --- one file ----------------------------------------------------------------------------------------


def read_predictions(
    path: str | Path, *, thinking: bool = False, protocol: str | Protocol = "paper"
) -> dict[str, Prediction]:
    """Reads a predictions file; returns its predictions by sample id.

    A row is ``{"id", "responses", "spans"?, "rules"?}``, ``{"id", "response"}`` or ``{"id", "span"}``. Text
    without spans is parsed here; with ``thinking`` only what follows ``</think>`` is read. A reversed or
    empty span is None. Spans beside a text were read from it by the rules of ``paper``; a protocol with
    another parser reads the text instead. Raises :class:`UserError` with file and line for any other form,
    for a row of a data file, and for an id that comes twice.
    """
    protocol = get_protocol(protocol)
    predictions: dict[str, Prediction] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        prediction = parse_row(row, where, thinking=thinking, protocol=protocol)
        if prediction.id in predictions:
            raise UserError(
                f"{where}: a second prediction for id {prediction.id!r}; keep one row for each id"
            )
        predictions[prediction.id] = prediction
    return predictions


def parse_row(
    row: Mapping[str, Any], where: str, *, thinking: bool = False, protocol: str | Protocol = "paper"
) -> Prediction:
    """Reads one row of a predictions file; ``where`` begins the messages of :class:`UserError`."""
    protocol = get_protocol(protocol)
    identity = row.get("id")
    if not isinstance(identity, str):
        raise UserError(f'{where}: a prediction needs an "id" that is a string')
    if "responses" in row or "response" in row:
        responses = row["responses"] if "responses" in row else [row["response"]]
        if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
            raise UserError(f'{where}: "responses" must be a list of strings ("response": a string)')
        if "spans" in row and protocol.parser == "paper":
            spans = _spans(row["spans"], where)
            if responses and len(spans) != len(responses):
                raise UserError(
                    f"{where}: {len(spans)} spans for {len(responses)} responses: give a span or null for "
                    'each response, or leave "spans" out'
                )
            rules = _rules(row, spans, where)
        else:
            parsed = [protocol.parse(text, thinking=thinking) for text in responses]
            spans = [found.span for found in parsed]
            rules = [found.rule for found in parsed]
    elif "span" not in row and "spans" in row and "video" in row:
        # The spans of such a row are the annotation: as predictions, they would be right every time.
        raise UserError(
            f'{where}: a row of a data file, whose "spans" are the annotation: name the predictions of a '
            'model (a prediction has "responses", "response" or "span")'
        )
    elif "spans" in row or "span" in row:
        responses = []
        spans = _spans(row["spans"] if "spans" in row else [row["span"]], where)
        rules = [GIVEN if span else NO_RULE for span in spans]
    else:
        raise UserError(f'{where}: a prediction needs "responses", "response" or "span"')
    return Prediction(id=identity, responses=tuple(responses), spans=tuple(spans), rules=tuple(rules))


def _rules(row: Mapping[str, Any], spans: list[Interval | None], where: str) -> list[str]:
    rules = row.get("rules")
    if not rules:
        return [GIVEN if span else NO_RULE for span in spans]
    if (
        not isinstance(rules, list)
        or len(rules) != len(spans)
        or not all(isinstance(rule, str) for rule in rules)
    ):
        raise UserError(
            f'{where}: "rules" must name one rule for each of the {len(spans)} spans, or be left out'
        )
    return rules


def _spans(value: Any, where: str) -> list[Interval | None]:
    if not isinstance(value, list):
        raise UserError(f'{where}: "spans" must be a list of [start, end] or null')
    return [_span(item, where) for item in value]


def _span(value: Any, where: str) -> Interval | None:
    if value is None:
        return None
    pair = isinstance(value, list) and len(value) == 2
    if not pair or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise UserError(f"{where}: a span must be [start, end] in seconds or null, not {value!r}")
    try:
        span = (float(value[0]), float(value[1]))
    except OverflowError:  # an integer of hundreds of digits
        return None
    return span if is_proper(span) else None


# --- the files of one model --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PredictionsFile:
    """One predictions file. ``provenance`` says what made it; None if no such file stands beside it."""

    path: str
    predictions: Mapping[str, Prediction]
    provenance: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class ModelPredictions:
    """The predictions of one model, in one file or several: as a rule one a data set."""

    name: str
    files: tuple[PredictionsFile, ...]

    def of(self, samples: Iterable[Sample]) -> tuple[dict[str, Prediction], tuple[PredictionsFile, ...]]:
        """Returns the predictions for ``samples`` by id, and the files that they come from.

        Raises :class:`UserError` if two files have a prediction for one row.
        """
        found: dict[str, Prediction] = {}
        ids = [sample.id for sample in samples]
        used: list[PredictionsFile] = []
        for file in self.files:
            here = {name: file.predictions[name] for name in ids if name in file.predictions}
            if twice := sorted(found.keys() & here.keys()):
                raise UserError(
                    f"{file.path}: id {twice[0]!r} is also in {used[-1].path}: give each its NAME="
                )
            if here:
                used.append(file)
            found |= here
        return found, tuple(used)


def read_model_predictions(
    paths: Sequence[str | Path],
    protocol: Protocol,
    *,
    name: str,
    thinking: bool | None = None,
    any_protocol: bool = False,
) -> ModelPredictions:
    """Reads the predictions in ``paths`` as ``protocol`` says.

    The provenance beside a file says whether the model thought first; ``thinking`` is for files without one.
    Raises :class:`UserError` for responses to another prompt than the protocol's, unless ``any_protocol``.
    """
    files = []
    for path in paths:
        provenance = read_provenance(path) if provenance_path(path).exists() else None
        note_changes(path)
        if not any_protocol:
            _check_protocol(path, protocol, prompt_style_of(provenance))
        thought = is_thinking(provenance) if thinking is None else thinking
        predictions = read_predictions(path, thinking=thought, protocol=protocol)
        files.append(PredictionsFile(path=str(path), predictions=predictions, provenance=provenance))
    return ModelPredictions(name=name, files=tuple(files))


def _check_protocol(path: str | Path, protocol: Protocol, style: str | None) -> None:
    if style is None or style == protocol.prompt_style:
        return
    made_under = protocol_of(style)
    asked = f"prompt style {style}" if made_under is None else f"protocol {made_under.name}"
    remedy = "" if made_under is None else f"give --protocol {made_under.name}, or "
    raise UserError(
        f"{path}: these responses were made under {asked}, and this is protocol {protocol.name}: {remedy}"
        "--any-protocol to evaluate them all the same"
    )


def file_deviations(files: Iterable[PredictionsFile], protocol: Protocol) -> dict[str, Any] | None:
    """Returns the settings of ``files`` that deviate from ``protocol``; None if one has no provenance."""
    found: dict[str, Any] = {}
    for file in files:
        others = deviations(protocol, file.provenance)
        if others is None:
            return None
        found |= others
    return found
