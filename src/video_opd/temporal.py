"""Intervals in time: their overlap, and their form as text, which is written and parsed.

An interval is ``(start_s, end_s)`` in seconds, ``start_s < end_s``. A pair that is empty, reversed or not
finite overlaps with nothing. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from video_opd.answer_numbers import Number, are_seconds, find_numbers, with_plain_digits
from video_opd.errors import UserError

MOST_SECONDS = 1e9  # of a time: sums and counts of frames stay numbers
Interval: TypeAlias = tuple[float, float]

NO_RULE = "none"


# --- overlap -----------------------------------------------------------------------------------------


def is_proper(span: Interval | None) -> bool:
    """Whether ``span`` is an interval: two finite numbers, the first below the second."""
    return span is not None and math.isfinite(span[0]) and math.isfinite(span[1]) and span[0] < span[1]


def centre_s(span: Interval) -> float:
    """The middle of an interval in seconds."""
    return (span[0] + span[1]) / 2


def clamp(span: Interval, duration_s: float) -> Interval | None:
    """``span`` cut to [0, duration_s]; None if it lies outside."""
    inside = (max(span[0], 0.0), min(span[1], duration_s))
    return inside if is_proper(inside) else None


def iou(a: Interval | None, b: Interval | None) -> float:
    """Intersection over union of two intervals, in [0, 1]; 0 if either is no interval."""
    if a is None or b is None or not (is_proper(a) and is_proper(b)):
        return 0.0
    intersection_s = min(a[1], b[1]) - max(a[0], b[0])
    if intersection_s <= 0:
        return 0.0
    return intersection_s / (max(a[1], b[1]) - min(a[0], b[0]))  # they overlap, so the hull is the union


def best_iou(span: Interval | None, spans: Iterable[Interval]) -> float:
    """The largest IoU of ``span`` with any of ``spans``; 0 if there are none."""
    return max((iou(span, other) for other in spans), default=0.0)


def annotated_spans(row: Mapping[str, Any]) -> list[Interval]:
    """The spans of a data row, cut to its duration as a reader of data files cuts them.

    It is empty for a row without spans, and for one whose spans are no intervals within the video.
    """
    spans, duration_s = row.get("spans"), row.get("duration")
    if not (isinstance(spans, list | tuple) and all(map(is_pair, spans))):
        return []
    if isinstance(duration_s, int | float) and 0 < duration_s <= MOST_SECONDS:
        cut = [clamp(tuple(span), duration_s) for span in spans]
    else:
        cut = [tuple(span) for span in spans]
    return [span for span in cut if span is not None] if all(map(is_proper, cut)) else []


def annotation_iou(row: Mapping[str, Any]) -> float | None:
    """The IoU of a data row's first annotated span with ``true_spans``, the best of several.

    Rows of the generated world have that key. The result is None if the row has not both, or if they hold
    anything else than pairs of numbers.
    """
    annotated, true = row.get("spans"), row.get("true_spans")
    if not (isinstance(annotated, list | tuple) and annotated and isinstance(true, list | tuple)):
        return None
    if not true or not all(is_pair(span) for span in (annotated[0], *true)):
        return None
    return best_iou(tuple(annotated[0]), [tuple(span) for span in true])


def is_pair(span: Any) -> bool:
    """Whether a JSON value is two numbers that floats can hold."""
    return (
        isinstance(span, list | tuple)
        and len(span) == 2
        and all(isinstance(t, int | float) and abs(t) <= MOST_SECONDS for t in span)
    )


def timestamp_aware_iou(pred: Interval | None, true: Interval, duration_s: float) -> float:
    """IoU · (1 − |s − ŝ|/D) · (1 − |e − ê|/D), each factor clamped to [0, 1] (Time-R1's reward).

    Raises :class:`UserError` if the duration is not a positive number.
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
    """The text of a span in figure 7's form: ``(12.5, 17.83)`` → ``"12.50 to 17.83"``."""
    return f"{span[0]:.2f} to {span[1]:.2f}"


def clock(time_s: float) -> str:
    """A time for people: ``00:12.54``, and ``1:02:03.00`` from an hour on."""
    hundredths = round(time_s * 100)
    minutes, rest = divmod(hundredths, 6000)
    seconds = f"{rest // 100:02d}.{rest % 100:02d}"
    return f"{minutes:02d}:{seconds}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds}"


@dataclass(frozen=True, kw_only=True)
class ParsedAnswer:
    """The span that a response states, and the ``rule`` that matched (``"none"`` if none did).

    ``span`` is None if no rule matched, and also if the rule found an empty or reversed span.

    Example: ``ParsedAnswer(span=(12.54, 17.83), rule="exact")``.
    """

    span: Interval | None
    rule: str


_SIGN = re.compile(r"(?:^|[\s(\[{=:,\"'])[-−]\Z")
# "3 people" is a count; "12 and", "12 the moment" and "12 he enters" are not, nor is "12" before a capital or
# at the end of a line.
_COUNTED = re.compile(
    r"[^\S\n]+(?!(?:about|an?|after|all|also|and|approx\w*|are|around|as|at|because|before|but|by|captures?"
    r"|contains?|corresponds?|depicts?|due|during|end\w*|finish\w*|for|from|has|have|her?|here|his|i\.e|if|in"
    r"|inclusive|interval|into|is|its?|marks?|match\w*|of|on|onwards?|or|part|period|portion|range|respectively"
    r"|right|roughly|section|segment|she|shows?|since|so|span|stops?|that|their|then?|there|these|they|this"
    r"|through\w*|till|time|timestamps?|to|total|until|up|was|were|when|where|which|while|window|with\w*|you"
    r"|secondes?|second[io]|seconden|segundos?|sekund\w*|detik|giây|saniye)\b)[a-z]"
)

# The text between two numbers is compared without markdown, quotes, brackets and repeated white space. It is
# short then, and every pattern below takes linear time on it.
_REACH = 160  # characters; two numbers that are farther apart do not belong together
_MARKUP = str.maketrans({**dict.fromkeys("*_`\"'“”‘’()[]{}<>$", " "), "~": " ~ ", "≈": " ≈ "})
_DASHES = "-‐‑‒–—―−﹣－~～〜"
_HEDGES = ("about", "around", "approximately", "approx", "approx.", "roughly", "nearly", "~", "≈")
_HEDGE = f"(?: (?:{'|'.join(map(re.escape, _HEDGES))}))?"
_TIME_WORDS = {*_HEDGES, "the", "time", "timestamp", "mark", "second", "seconds", "at", "t=", "t", "="}
_CJK_HEDGE = r"(?: ?(?:第|大?[约約]|약|ほぼ))*"
# "to", and its plain forms in Chinese, Japanese and Korean: "12.54秒到17.83秒", "12.54秒から17.83秒".
_TO = re.compile(
    rf"to{_HEDGE}|(?:(?:开始|開始|起|持续|持續|一直)?[,，、]? ?(?:到|至)|から|부터|에서){_CJK_HEDGE}", re.I
)
_DASH = re.compile(rf"[{_DASHES}]{{1,3}}{_HEDGE}", re.I)
_TIGHT_DASH = re.compile(r"[-‐‑‒–—−]")  # 2026-11-22 is a date
_FROM = re.compile(r"\bfrom\b[^.!?\n]{0,80}$", re.I)
_UP_TO = re.compile(r"\bto\b", re.I)
# A number in brackets behind another one is an aside.
_ASIDE_OPENS = re.compile(r"\s*[(\[（【][^()\[\]（）【】]*")
_ASIDE_CLOSES = re.compile(r"[^()\[\]（）【】]*[)\]）】]")
_OPENS = re.compile(r"[(\[（【]\s*\Z")
_OF = re.compile(r"\s*(?:out\s+)?of\s*(?:the\s*)?", re.I)
_SENTENCE_END = re.compile(r"[.!?\n]")
_BOUND = re.compile(
    r"(?<![a-z])(?:(start|begin)|(end|finish|stop))|(开始|開始|起始|시작)|(结束|結束|終了|종료)", re.I
)
# "between A and B": "在A和B之间", "AとBの間", "A와 B 사이".
_CJK_AND = re.compile(rf"(?:和|与|與|及|と|와|과){_CJK_HEDGE}")
_CJK_BETWEEN = re.compile(r"\s*(?:之?[间間]|の間|사이)")
_EXACT = re.compile(r"([0-9]{1,7}(?:\.[0-9]+)?)\s+to\s+([0-9]{1,7}(?:\.[0-9]+)?)", re.I)


def _plain_words(text: str) -> str:
    """The text without markup, with one space between words."""
    return " ".join(text.translate(_MARKUP).split())


def _is_from_and(before: str, between: str, after: str) -> bool:
    """Whether "from A … to B", "between A and B" or "start … A … end … B" stands around two numbers."""
    if _CJK_AND.fullmatch(_plain_words(between)) and _CJK_BETWEEN.match(after):
        return True
    if _FROM.search(before) and (tos := list(_UP_TO.finditer(between))):
        head, tail = between[: tos[-1].start()], between[tos[-1].end() :]
        if not _SENTENCE_END.search(head) and set(_plain_words(tail).lower().split()) <= _TIME_WORDS:
            return True
    words = _plain_words(between).lower().removeprefix(",").split()
    if words[:1] == ["and"] and set(words[1:]) <= _TIME_WORDS:
        named = _plain_words(before).lower().split()
        while named and named[-1] in _TIME_WORDS:
            named.pop()
        if named[-1:] == ["between"]:
            return True
    starts, ends = list(_BOUND.finditer(before)), list(_BOUND.finditer(between))
    return bool(starts and (starts[-1][1] or starts[-1][3]) and ends and (ends[-1][2] or ends[-1][4]))


def _shape(text: str, numbers: list[Number], i: int) -> str | None:
    """The tie between the i-th number and the next: ``to``, ``dash``, ``list``, ``from_and``, or None."""
    a, b = numbers[i], numbers[i + 1]
    between = text[a.end : b.start]
    words = _plain_words(between)
    if not words:
        return None
    before_a = text[numbers[i - 1].end if i else 0 : a.start]
    after_b = text[b.end : numbers[i + 2].start] if i + 2 < len(numbers) else ""
    if _SIGN.search(before_a[-4:]) or any(_TIGHT_DASH.fullmatch(gap) for gap in (before_a, after_b)):
        return None  # a negative number; a third number hangs on by a dash: a date
    if i and _OF.fullmatch(before_a):
        return None  # "12.5 s of 60 s to 17.8 s of 60 s"
    if i and _ASIDE_OPENS.fullmatch(before_a) and _ASIDE_CLOSES.match(between) and not _OPENS.search(between):
        return None  # "12.5 s (frame 30) to 17.8 s"
    counts = [number.bare and _COUNTED.match(text, number.end) is not None for number in (a, b)]
    if a.bare and counts[1]:
        return None  # "2 to 3 people", "5-6 cups"
    if _DASH.fullmatch(words):
        return "dash"
    if _SIGN.search(between[-4:]):
        return None
    if _TO.fullmatch(words):
        return "to"
    if words == ",":
        return "list"
    if any(counts):
        return None
    return "from_and" if _is_from_and(before_a[-_REACH:], between, text[b.end : b.end + _REACH]) else None


def _match(text: str) -> tuple[Interval, str] | None:
    text = with_plain_digits(text)
    if exact := _EXACT.fullmatch(text):
        return (float(exact.group(1)), float(exact.group(2))), "exact"
    numbers = find_numbers(text)
    found: dict[str, Interval] = {}
    for i, (a, b) in enumerate(pairwise(numbers)):
        if a.value_s is None or b.value_s is None or a.clock != b.clock or b.start - a.end > _REACH:
            continue
        shape = _shape(text, numbers, i)
        if shape is None or (shape == "list" and not a.clock) or not are_seconds(text, a, b):
            continue
        found["clock" if a.clock else shape] = (a.value_s, b.value_s)  # the last one counts
    for rule in ("to", "dash", "clock", "from_and"):
        if rule in found:
            return found[rule], rule
    return None


def after_thinking(text: str) -> str | None:
    """Returns the text after the last ``</think>``, or None without one: the length limit came first."""
    _, closed, answer = text.rpartition("</think>")
    return answer if closed else None


def parse_answer(text: str, *, thinking: bool = False) -> ParsedAnswer:
    """Reads the span in a response; never raises, and never makes up a number.

    The first rule that matches counts, and within a rule the last place where it does:

    1. ``exact``: the whole text is "A to B";
    2. ``to``: "A to B", with or without a unit of seconds ("12.54秒到17.83秒" as well);
    3. ``dash``: "A - B", "A – B";
    4. ``clock``: a pair of mm:ss or hh:mm:ss in any of these shapes, or with a comma between;
    5. ``from_and``: "from A … to B", "between A and B", "start … A … end … B".

    Two numbers that are not tied together by one of them are no span, and neither are two numbers with a
    unit that is not seconds, before or after them ("frames 120 to 180"), parts of longer times ("1 minute
    5 seconds") and counts ("2 to 3 people"). With ``thinking`` only the text after ``</think>`` is read, and
    a text without it holds no span.
    """
    answer = after_thinking(text) if thinking else text
    match = None if answer is None else _match(answer.strip())
    if match is None:
        return ParsedAnswer(span=None, rule=NO_RULE)
    span, rule = match
    return ParsedAnswer(span=span if is_proper(span) else None, rule=rule)
