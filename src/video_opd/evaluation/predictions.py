"""Predictions files: the three forms a row may have, read into one record. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.protocols import Protocol, get_protocol
from video_opd.jsonl import read_jsonl
from video_opd.temporal import NO_RULE, Interval, is_proper
from video_opd.types import Prediction

GIVEN = "given"  # the rule of a span that came without text


def read_predictions(
    path: str | Path, *, thinking: bool = False, protocol: str | Protocol = "paper"
) -> dict[str, Prediction]:
    """The predictions of a file by sample id.

    A row is ``{"id", "responses", "spans"?, "rules"?}``, ``{"id", "response"}`` or ``{"id", "span"}``. Text
    without spans is parsed here, with ``thinking`` after ``</think>`` only. A reversed or empty span is None.
    Spans that stand beside a text were read from it by the rules of ``paper``; under a protocol that reads
    otherwise the text counts. Raises :class:`UserError` with file and line for any other form, among them a
    row of a data file, and for an id that comes twice.
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
    """One row of a predictions file; ``where`` begins the messages of :class:`UserError`."""
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
            rules = _rules(row, spans, where)
        else:
            parsed = [protocol.parse(text, thinking=thinking) for text in responses]
            spans = [answer.span for answer in parsed]
            rules = [answer.rule for answer in parsed]
    elif "span" not in row and "spans" in row and "video" in row:
        # Its spans are the annotation: read as answers, they would be right every time.
        raise UserError(
            f'{where}: a row of a data file, whose "spans" are the annotation: name the answers of a model '
            '(a prediction has "responses", "response" or "span")'
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
