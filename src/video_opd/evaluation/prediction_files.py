"""Predictions files of a model, read as a protocol says, and what is known of their making. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.protocols import Protocol, deviations, is_thinking, prompt_style_of, protocol_of
from video_opd.evaluation.resume import meta_path, read_note
from video_opd.types import Prediction, Sample


@dataclass(frozen=True, kw_only=True)
class AnswersFile:
    """One predictions file. ``made_by`` is its note; None where there is none beside it."""

    path: str
    predictions: Mapping[str, Prediction]
    made_by: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What one model answered, in one file or several: as a rule one a data set."""

    name: str
    files: tuple[AnswersFile, ...]

    def of(self, samples: Iterable[Sample]) -> tuple[dict[str, Prediction], tuple[AnswersFile, ...]]:
        """The predictions for ``samples`` by id, and the files that they come from.

        Raises :class:`UserError` where two files answer one row.
        """
        found: dict[str, Prediction] = {}
        ids = [sample.id for sample in samples]
        used: list[AnswersFile] = []
        for file in self.files:
            here = {name: file.predictions[name] for name in ids if name in file.predictions}
            if twice := sorted(found.keys() & here.keys()):
                raise UserError(
                    f"{file.path}: id {twice[0]!r} is answered in {used[-1].path}, too: give each its NAME="
                )
            if here:
                used.append(file)
            found |= here
        return found, tuple(used)


def read_answers(
    paths: Sequence[str | Path],
    protocol: Protocol,
    *,
    name: str,
    thinking: bool | None = None,
    any_protocol: bool = False,
) -> Answers:
    """The answers in ``paths``, read as ``protocol`` says.

    The note beside a file says whether the model thought first; ``thinking`` is for files without one. Raises
    :class:`UserError` for answers that were asked for otherwise than the protocol asks, unless
    ``any_protocol``.
    """
    files = []
    for path in paths:
        made_by = read_note(path) if meta_path(path).exists() else None
        if not any_protocol:
            _check_protocol(path, protocol, prompt_style_of(made_by))
        thought = is_thinking(made_by) if thinking is None else thinking
        predictions = read_predictions(path, thinking=thought, protocol=protocol)
        files.append(AnswersFile(path=str(path), predictions=predictions, made_by=made_by))
    return Answers(name=name, files=tuple(files))


def _check_protocol(path: str | Path, protocol: Protocol, style: str | None) -> None:
    if style is None or style == protocol.prompt_style:
        return
    made_under = protocol_of(style)
    asked = f"prompt style {style}" if made_under is None else f"protocol {made_under.name}"
    remedy = "" if made_under is None else f"give --protocol {made_under.name}, or "
    raise UserError(
        f"{path}: these answers were made under {asked}, and this is protocol {protocol.name}: {remedy}"
        "--any-protocol to evaluate them all the same"
    )


def made_otherwise(files: Iterable[AnswersFile], protocol: Protocol) -> dict[str, Any] | None:
    """What ``files`` were made with otherwise than ``protocol`` says; None where one has no note."""
    found: dict[str, Any] = {}
    for file in files:
        others = deviations(protocol, file.made_by)
        if others is None:
            return None
        found |= others
    return found
