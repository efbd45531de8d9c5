"""Checks the rows of a run's JSON Lines files; :mod:`video_opd.reports.records` says what that means."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.predictions import parse_row
from video_opd.evaluation.protocols import Protocol
from video_opd.reports.records import (
    MOST_DURATION_S,
    MOST_NAME,
    MOST_TEXT,
    count,
    film,
    number,
    span,
    text,
)
from video_opd.reports.run_files import Note
from video_opd.terminal import visible
from video_opd.types import Prediction, Sample

MOST_TOKENS = 4096  # tokens of a response
MOST_DETAILED = 400  # tokens of a response that are shown, with their details
MOST_ALTERNATIVES = 5


def rollout_row(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """The keys of a rollout that the report shows; ``r`` and ``advantage`` have an entry for each token.

    ``details`` is a function that gives the others that belong to tokens: a file has thousands of rollouts,
    and a report shows a few.
    """
    step = count(row.get("step"), 1)
    if step is None:
        note("a row without a step")
        return None
    tokens = token_signals(row, note)
    if tokens is None:
        return None
    iou = number(row.get("iou"), 0, 1)
    if iou is None and row.get("iou") is not None:
        note("iou is no number from 0 to 1")
    return {
        "step": step,
        "id": text(row.get("id"), MOST_NAME) or "",
        "query": text(row.get("query")) or text(row.get("id"), MOST_NAME) or "",
        **tokens,
        "iou": iou,
        "truncated": row.get("truncated") is True,
        "details": partial(token_details, row, note),
    }


def token_signals(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """The tokens of a response, and the signal of each."""
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        note("a row without tokens")
        return None
    r = _signal(row.get("r"), len(tokens))
    if r is None:
        note("r is not a number for each token")
        return None
    if len(tokens) > MOST_TOKENS:
        note(f"the tokens after the first {MOST_TOKENS}")
    return {
        "tokens": [visible(token[:MOST_TEXT], keep="\n\t") for token in tokens[:MOST_TOKENS]],
        "r": r[:MOST_TOKENS],
        "advantage": _optional_signal(row, "advantage", note),
    }


def token_details(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """The log-probs and the likeliest tokens of both models, for the first tokens of a row with tokens."""
    kept: dict[str, Any] = {
        name: _optional_signal(row, name, note) for name in ("student_logprobs", "teacher_logprobs")
    }
    for name in ("student_top", "teacher_top"):
        tops = _alternatives(row.get(name), len(row["tokens"]))
        if tops is None and row.get(name) is not None:
            note(f"{name} is not a list of tokens and log-probs for each token")
        kept[name] = tops
    return kept


def _optional_signal(row: Mapping[str, Any], name: str, note: Note) -> list[float | None] | None:
    values = _signal(row.get(name), len(row["tokens"]))
    if values is None and row.get(name) is not None:
        note(f"{name} is not a number for each token")
    return None if values is None else values[:MOST_TOKENS]


def _signal(values: Any, length: int) -> list[float | None] | None:
    if not isinstance(values, list) or len(values) != length:
        return None
    if not all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values
    ):
        return None
    return [number(value) for value in values]


def _alternatives(values: Any, length: int) -> list[list[tuple[str, float]]] | None:
    if not isinstance(values, list) or len(values) != length:
        return None
    found = []
    for position in values[:MOST_DETAILED]:
        if not isinstance(position, list):
            return None
        here = []
        for pair in position[:MOST_ALTERNATIVES]:
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
                return None
            if (logprob := number(pair[1])) is not None:
                here.append((visible(pair[0][:MOST_NAME]), float(logprob)))
        found.append(here)
    return found


def annotation_row(row: Mapping[str, Any], note: Note) -> Sample | None:
    """A row of annotations-DATA.jsonl, or of a data file; None without spans, too."""
    identity, query = text(row.get("id"), MOST_NAME), text(row.get("query"))
    if identity is None or query is None:
        note("a row without id or query")
        return None
    given = row.get("spans")
    spans = [found for value in given if (found := span(value))] if isinstance(given, list) else []
    spans = [found for found in spans if found[0] < found[1]]
    if not isinstance(given, list) or len(spans) < len(given):
        note("spans is no list of spans")
        return None
    duration_s = number(row.get("duration"), 1e-6, MOST_DURATION_S)
    if duration_s is None and row.get("duration") is not None:
        note("duration is no number of seconds above 0")
    return (
        Sample(
            id=identity,
            video=Path(text(row.get("video"), MOST_TEXT) or identity),
            query=query,
            duration_s=None if duration_s is None else float(duration_s),
            spans=tuple(spans),
            source=text(row.get("source"), MOST_NAME),
        )
        if spans
        else None
    )


def prediction_row(
    row: Mapping[str, Any], note: Note, protocol: Protocol, *, thinking: bool = False
) -> Prediction | None:
    """A row of a predictions file, read as ``evaluate`` reads it; its texts can be shown."""
    try:
        found = parse_row(row, "", thinking=thinking, protocol=protocol)
    except UserError as error:
        note(str(error).lstrip(": "))
        return None
    wrong = [each for each in found.spans if each is not None and span(list(each)) is None]
    if wrong:
        note("a span that no video has")
        return None
    return Prediction(
        id=visible(found.id[:MOST_NAME]),
        responses=tuple(visible(response[:MOST_TEXT], keep="\n\t") for response in found.responses),
        spans=found.spans,
        rules=found.rules,
    )


def failure_row(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """A row of failures-DATA.jsonl: frames with their times, and the response token by token, if there."""
    identity = text(row.get("id"), MOST_NAME)
    if identity is None:
        note("a row without id")
        return None
    frames, times_s = film(row, MOST_DURATION_S)
    if row.get("frames") and not frames:
        note("frames that do not fit their times")
    tokens = token_signals(row, note) if row.get("tokens") is not None else None
    details = {} if tokens is None else tokens | token_details(row, note)
    return {"id": identity, "frames": frames, "frame_times_s": times_s, **details}


def score_row(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """A row of scores.jsonl: the IoU of teacher and student, None where one was not asked."""
    identity = text(row.get("id"), MOST_NAME)
    if identity is None:
        note("a row without id")
        return None
    kept: dict[str, Any] = {"id": identity}
    for name in ("teacher_iou", "student_iou"):
        kept[name] = number(row.get(name), 0, 1)
        if kept[name] is None and row.get(name) is not None:
            note(f"{name} is no number from 0 to 1")
    return kept


def selected_row(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """A row of selected.jsonl: its id, query and source, and what it was chosen by."""
    identity = text(row.get("id"), MOST_NAME)
    if identity is None:
        note("a row without id")
        return None
    block = row.get("tvdf")
    if block is not None and not isinstance(block, Mapping):
        note("tvdf is no record")
    block = block if isinstance(block, Mapping) else {}
    return {
        "id": identity,
        "query": text(row.get("query")) or identity,
        "source": text(row.get("source"), MOST_NAME) or "",
        "delta": number(block.get("delta"), -1, 1),
        "teacher_iou": number(block.get("teacher_iou"), 0, 1),
        "student_iou": number(block.get("student_iou"), 0, 1),
    }
