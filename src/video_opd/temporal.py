"""Intervals in time: overlap, and the text of an answer in both directions.

An interval is ``(start_s, end_s)`` in seconds, ``start_s < end_s``. One that is empty, reversed or not
finite overlaps with nothing. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from video_opd.errors import UserError

Interval: TypeAlias = tuple[float, float]

NO_RULE = "none"


# --- overlap -----------------------------------------------------------------------------------------


def is_proper(span: Interval | None) -> bool:
    """Whether ``span`` is an interval: two finite numbers, the first below the second."""
    return span is not None and math.isfinite(span[0]) and math.isfinite(span[1]) and span[0] < span[1]


def length_s(span: Interval) -> float:
    """The duration of an interval in seconds; 0 where it is no interval."""
    return span[1] - span[0] if is_proper(span) else 0.0


def centre_s(span: Interval) -> float:
    """The middle of an interval in seconds."""
    return (span[0] + span[1]) / 2


def clamp(span: Interval, duration_s: float) -> Interval | None:
    """The part of ``span`` inside [0, duration_s]; None where nothing of it is inside."""
    inside = (max(span[0], 0.0), min(span[1], duration_s))
    return inside if is_proper(inside) else None


def iou(a: Interval | None, b: Interval | None) -> float:
    """Intersection over union of two intervals, in [0, 1]; 0 where either is none."""
    if a is None or b is None or not (is_proper(a) and is_proper(b)):
        return 0.0
    intersection_s = min(a[1], b[1]) - max(a[0], b[0])
    if intersection_s <= 0:
        return 0.0
    return intersection_s / (max(a[1], b[1]) - min(a[0], b[0]))  # they overlap, so the hull is the union


def best_iou(span: Interval | None, spans: Iterable[Interval]) -> float:
    """The largest IoU of ``span`` with any of ``spans``; 0 where there are none."""
    return max((iou(span, other) for other in spans), default=0.0)


def timestamp_aware_iou(pred: Interval | None, true: Interval, duration_s: float) -> float:
    """IoU · (1 − |s − ŝ|/D) · (1 − |e − ê|/D), each factor clamped to [0, 1] (Time-R1's reward).

    Raises :class:`UserError` where the duration is not a positive number.
    """
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise UserError(f"the duration of a video must be above 0 s, not {duration_s}: correct the data row")
    if pred is None:
        return 0.0
    reward = iou(pred, true)
    if reward == 0.0:
        return 0.0
    for predicted_s, true_s in zip(pred, true, strict=True):
        reward *= min(max(1.0 - abs(true_s - predicted_s) / duration_s, 0.0), 1.0)
    return reward


# --- text --------------------------------------------------------------------------------------------


def format_span(span: Interval) -> str:
    """The answer text of figure 7: ``(12.5, 17.83)`` → ``"12.50 to 17.83"``."""
    return f"{span[0]:.2f} to {span[1]:.2f}"


def clock(time_s: float) -> str:
    """For people: ``00:12.54``, from an hour on ``1:02:03.00``."""
    hundredths = round(time_s * 100)
    minutes, rest = divmod(hundredths, 6000)
    seconds = f"{rest // 100:02d}.{rest % 100:02d}"
    return f"{minutes:02d}:{seconds}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds}"


@dataclass(frozen=True, kw_only=True)
class ParsedAnswer:
    """What an answer says. ``rule`` is the rule that matched, ``"none"`` where none did; ``span`` is None
    then, and also where the rule found an empty or reversed span.

    Example: ``ParsedAnswer(span=(12.54, 17.83), rule="exact")``.
    """

    span: Interval | None
    rule: str


@dataclass(frozen=True, kw_only=True)
class _Number:
    """One number of a text, its unit included in ``end``; ``value_s`` is None where it cannot be a time."""

    start: int
    end: int
    value_s: float | None
    clock: bool
    counts: bool  # "3 people": a bare integer before a noun
    signed: bool  # a minus stands right before it, which may also be the dash of "A -B"


_NUMBER = re.compile(r"(?:[0-9]+|(?<![\w.])\.[0-9]+)(?:[.,:/][0-9]+)*")
_PLAIN = re.compile(r"[0-9]{1,7}(?:\.[0-9]+)?|\.[0-9]+")  # short enough to stay finite
_CLOCK = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,3}):([0-9]{2}(?:\.[0-9]+)?)")
_UNIT = re.compile(
    r"\s*(?:\(\s*s(?:ec(?:ond)?s?)?\s*\)|(?:seconds?|secs?|s)\b(?:\.(?=\s+(?:to|and|[-–—])))?)", re.I
)
_OTHER_UNIT = re.compile(
    r"\s*(?:%|°|(?:percent|hours?|hrs?|h|minutes?|mins?|m|ms|milliseconds?|frames?|fps|[ap]m)\b|[ap]\.m\.)",
    re.I,
)
_GLUED_BEFORE = re.compile(
    r"(?<![0-9]to)(?<=[^\W0-9])\Z|[/#%]\Z", re.I
)  # a part of a word, a rank; not "12to17"
_SIGN = re.compile(r"(?:^|[\s(\[{=:,\"'])[-−]\Z")
_GLUED_AFTER = re.compile(r"(?!(?:to|and)(?![^\W0-9]))[^\W0-9]|[/%]", re.I)
# "3 people" is a count, "12 and" or "12 the moment" is not.
_COUNTED = re.compile(
    r"\s+(?!(?:a|after|all|and|approximately|as|at|before|by|end\w*|finish\w*|for|in|is|its?|of|on|or|respectively"
    r"|right|so|stops?|that|the|then|through|till|to|until|up|when|where|which|while|with)\b)[a-z]",
    re.I,
)

# What may stand between or around the two numbers of an answer.
_WRAP = r"[\s*_`\"'“”‘’()\[\]{}<>$]*"  # markdown, quotes, brackets
_HEDGE = r"(?:about|around|approximately|approx\.?|roughly|nearly|~|≈)?\s*"
_NAMES_TIME = r"(?:(?:the|time|timestamp|mark|seconds?|at|t\s*=)\s*)*"
_TO = re.compile(rf"{_WRAP}to{_WRAP}{_HEDGE}{_WRAP}", re.I)
_DASH = re.compile(rf"{_WRAP}[-‐‑‒–—−]{{1,3}}{_WRAP}")
_TIGHT_DASH = re.compile(r"[-‐‑‒–—−]")  # 2026-11-22 is a date
_FROM = re.compile(r"\bfrom\b[^.!?\n]{0,80}$", re.I)
_UP_TO = re.compile(rf"[^.!?\n]{{0,120}}\bto\b{_WRAP}{_HEDGE}{_NAMES_TIME}{_HEDGE}{_WRAP}", re.I)
_BETWEEN = re.compile(rf"\bbetween\b{_WRAP}{_HEDGE}{_NAMES_TIME}{_HEDGE}{_WRAP}$", re.I)
_AND = re.compile(rf"{_WRAP},?\s*and\b{_WRAP}{_HEDGE}{_NAMES_TIME}{_HEDGE}{_WRAP}", re.I)
_STARTS = re.compile(r"(?<![a-z])(?:start|begin)(?!.*(?<![a-z])(?:end|finish|stop))", re.I | re.S)
_ENDS = re.compile(r"(?<![a-z])(?:end|finish|stop)", re.I)
_EXACT = re.compile(r"([0-9]{1,7}(?:\.[0-9]+)?)\s+to\s+([0-9]{1,7}(?:\.[0-9]+)?)", re.I)
_REACH = 160  # characters over which "start … A" and "… end … B" still belong together


def _value_s(text: str) -> tuple[float | None, bool]:
    if _PLAIN.fullmatch(text):
        return float(text), False
    if clock := _CLOCK.fullmatch(text):
        hours, minutes, seconds = clock.groups()
        if float(seconds) < 60 and (hours is None or int(minutes) < 60):
            return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds), True
    return None, False


def _numbers(text: str) -> list[_Number]:
    """Every number of the text in order, those that cannot be times included: they keep others apart."""
    found = []
    for match in _NUMBER.finditer(text):
        value_s, clock = _value_s(match.group())
        end = match.end()
        unit = _UNIT.match(text, end)
        if unit:
            end = unit.end()
        elif _OTHER_UNIT.match(text, end) or _GLUED_AFTER.match(text, end):
            value_s = None
        before = text[max(match.start() - 3, 0) : match.start()]
        if _GLUED_BEFORE.search(before):
            value_s = None
        found.append(
            _Number(
                start=match.start(),
                end=end,
                value_s=value_s,
                clock=clock,
                counts=not unit and match.group().isdigit() and _COUNTED.match(text, end) is not None,
                signed=_SIGN.search(before) is not None,
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two neighbouring numbers that can both be times, and the words around them."""

    span: Interval
    clock: bool
    before: str
    between: str
    counts: bool
    chained: bool  # a third number hangs on by a dash: a date
    negative: bool  # the second number has a sign

    def is_to(self) -> bool:
        return not (self.chained or self.negative) and _TO.fullmatch(self.between) is not None

    def is_dash(self) -> bool:
        return not self.chained and _DASH.fullmatch(self.between) is not None

    def is_from_and(self) -> bool:
        if self.counts or self.chained or self.negative:
            return False
        if _FROM.search(self.before) and _UP_TO.fullmatch(self.between):
            return True
        if _BETWEEN.search(self.before) and _AND.fullmatch(self.between):
            return True
        near = len(self.between) <= _REACH
        return near and _STARTS.search(self.before) is not None and _ENDS.search(self.between) is not None


def _pairs(text: str) -> list[_Pair]:
    numbers = _numbers(text)
    # The words before the first number, between two, and after the last.
    edges = [0, *(number.end for number in numbers)]
    gaps = [text[end : number.start] for end, number in zip(edges[:-1], numbers, strict=True)] + [""]
    pairs = []
    for i, (a, b) in enumerate(pairwise(numbers)):
        if a.value_s is None or b.value_s is None or a.clock != b.clock or a.signed:
            continue
        chained = any(_TIGHT_DASH.fullmatch(gap) for gap in (gaps[i], gaps[i + 2]))
        pairs.append(
            _Pair(
                span=(a.value_s, b.value_s),
                clock=a.clock,
                before=gaps[i][-_REACH:],
                between=gaps[i + 1],
                counts=a.counts or b.counts,
                chained=chained,
                negative=b.signed,
            )
        )
    return pairs


def _match(text: str) -> tuple[Interval, str] | None:
    if exact := _EXACT.fullmatch(text):
        return (float(exact.group(1)), float(exact.group(2))), "exact"
    pairs = _pairs(text)[::-1]  # the last one counts
    plain = [pair for pair in pairs if not pair.clock]
    clocks = [pair for pair in pairs if pair.clock]
    shapes = (("to", _Pair.is_to), ("dash", _Pair.is_dash))
    for rule, fits in shapes:
        for pair in filter(fits, plain):
            return pair.span, rule
    for fits in (_Pair.is_to, _Pair.is_dash, _Pair.is_from_and):
        for pair in filter(fits, clocks):
            return pair.span, "clock"
    for pair in filter(_Pair.is_from_and, plain):
        return pair.span, "from_and"
    return None


def parse_answer(text: str, *, thinking: bool = False) -> ParsedAnswer:
    """Read the span in a model's answer; never raises, and never makes up a number.

    The first rule that matches counts, and within a rule the last place where it does:

    1. ``exact``: the whole text is "A to B";
    2. ``to``: "A to B", with or without a unit of seconds;
    3. ``dash``: "A - B", "A – B";
    4. ``clock``: a pair of mm:ss or hh:mm:ss in any of these shapes;
    5. ``from_and``: "from A … to B", "between A and B", "start … A … end … B".

    Two numbers that are not tied together by one of them are no answer. With ``thinking`` only the text
    after ``</think>`` is read, and a text without it holds no answer.
    """
    if thinking:
        _, closed, text = text.rpartition("</think>")
        if not closed:
            return ParsedAnswer(span=None, rule=NO_RULE)
    match = _match(text.strip())
    if match is None:
        return ParsedAnswer(span=None, rule=NO_RULE)
    span, rule = match
    return ParsedAnswer(span=span if is_proper(span) else None, rule=rule)
