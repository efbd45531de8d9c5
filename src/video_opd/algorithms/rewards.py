"""Rewards of whole responses, for GRPO (section 2.2). They are plain floats; nothing here imports torch.

A reward is any callable ``(sample, text) -> float``: the row of the data file with its annotated spans, and
the text of the response without special tokens. Larger is better.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeAlias

from video_opd.errors import UserError
from video_opd.temporal import best_iou, parse_answer, timestamp_aware_iou
from video_opd.types import Sample

Reward: TypeAlias = Callable[[Sample, str], float]

KINDS = ("timestamp_aware", "plain")
_THOUGHT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?!.*</?think>)", re.S)


@dataclass(frozen=True, kw_only=True)
class IoUReward:
    """``iou_weight`` · IoU + ``format_weight`` · format. The defaults are the reward of Time-R1.

    The IoU term compares the predicted span [ŝ, ê] with each annotated span [s, e] and takes the best value.
    With ``timestamp_aware`` that value is IoU · (1 − |s − ŝ|/D) · (1 − |e − ê|/D), where D is the duration of
    the video; with ``plain`` it is the IoU alone. It is 0 if the response has no span that can be parsed. The
    format term is 1 if the response is "A to B" and nothing else, and 0 otherwise. With ``thinking`` the span
    is parsed from the text after ``</think>``, and the format asks for exactly one ``<think>…</think>``
    before it.

    Raises UserError, naming the sample, if it has no annotated span or, with ``timestamp_aware``, no
    duration.

    Example: ``IoUReward(kind="plain")(sample, "3.00 to 5.50")``.
    """

    kind: Literal["timestamp_aware", "plain"] = "timestamp_aware"
    iou_weight: float = 1.0
    format_weight: float = 0.0
    thinking: bool = False
    opened: bool = False  # the prompt ends with <think>, so the response begins inside of it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"there is no reward kind {self.kind!r}; choose one of {', '.join(KINDS)}")
        for name in ("iou_weight", "format_weight"):
            weight = getattr(self, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"{name} is {weight}; it must be a finite number, 0 or more")

    def __call__(self, sample: Sample, text: str) -> float:
        answer = parse_answer(text, thinking=self.thinking)
        text = f"<think>{text}" if self.opened else text
        well_formed = answer.rule == "exact" and (not self.thinking or _THOUGHT.match(text) is not None)
        return self.iou_weight * self._iou(sample, answer.span) + self.format_weight * well_formed

    def _iou(self, sample: Sample, span: tuple[float, float] | None) -> float:
        if not sample.spans:
            raise UserError(
                f"sample {sample.id!r} has no spans to reward a response by; annotate it or drop it"
            )
        if self.kind == "plain":
            return best_iou(span, sample.spans)
        duration_s = sample.duration_s
        if duration_s is None or not (math.isfinite(duration_s) and duration_s > 0):
            raise UserError(
                f"sample {sample.id!r}: its duration is {duration_s}, and the timestamp-aware reward divides "
                "by it; add 'duration' in seconds to the data row, or choose the plain reward"
            )
        return max(timestamp_aware_iou(span, true, duration_s) for true in sample.spans)


def load_reward(path: str) -> Reward:
    """The user's own reward function, named by ``path``.

    ``path`` is ``"package.module:function"``, or ``"file.py:function"`` relative to the working directory.
    Raises UserError if the function cannot be imported or is not callable.
    """
    source, _, name = path.rpartition(":")
    if not source or not name:
        raise UserError(f"reward {path!r}: write package.module:function or file.py:function")
    try:
        module = _run_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"reward {path!r}: {source} cannot be imported ({type(error).__name__}: {error}); mend it, or "
            "write package.module:function of an installed package or file.py:function of a file"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        what = f"{name} in it is a {type(found).__name__}" if hasattr(module, name) else f"it has no {name}"
        raise UserError(f"reward {path!r}: {what}; name a function (sample, text) -> float")
    return found


def _run_file(file: Path) -> ModuleType:
    name = f"video_opd_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None, "a name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass looks up its module while it is being defined
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def checked_reward(reward: Reward, sample: Sample, text: str) -> float:
    """The value of ``reward`` as a float. Raises UserError, naming the sample, if it is not finite."""
    value: object = reward(sample, text)
    if not isinstance(value, Real) or not math.isfinite(value):
        name = getattr(reward, "__qualname__", type(reward).__qualname__)
        raise UserError(
            f"sample {sample.id!r}: the reward {name} returned {value!r} for {text[:80]!r}; "
            "it must return a finite number"
        )
    return float(value)
