"""The parser of TimeLens' evaluation, for results that are to stand beside its own. No torch.

It follows the behaviour of ``extract_time`` in TencentARC/TimeLens (``timelens/utils.py``, 2025), which
lmms-eval's task shares. It is more generous than the rules of the ``paper`` protocol: the *first* pair
counts, and two numbers are enough.
"""

from __future__ import annotations

import re

from video_opd.temporal import NO_RULE, Interval, ParsedAnswer, after_thinking, is_proper

_CLOCK = re.compile(r"\b(?:(\d{1,2}):(?=\d{2}:))?(\d{1,2}):(\d{2}(?:\.\d+)?)\b")
# As `\d+\.?\d*`. The bounds on lengths keep the search linear; no time has more digits.
_TIME = r"(\d{1,20}\.\d{0,30}|\d{1,50})"
_PAIRS = (
    ("dash", re.compile(rf"{_TIME}\s{{0,9}}-\s{{0,9}}{_TIME}")),
    ("to", re.compile(rf"{_TIME}\s{{1,9}}to\s{{1,9}}{_TIME}", re.I)),
)
_NUMBER = re.compile(r"\b(\d+\.\d+|\d+)\b")


def parse_timelens(text: str, *, thinking: bool = False) -> ParsedAnswer:
    """Reads the span in a response as TimeLens' script does; never raises.

    The first of these that is found counts: two clock times (``clock``), "A - B" (``dash``), "A to B"
    (``to``), any two numbers (``numbers``). A reversed or empty span keeps its rule and is None.
    """
    answer = after_thinking(text) if thinking else text
    if answer is None:
        return ParsedAnswer(span=None, rule=NO_RULE)
    rule, span = _match(answer)
    return ParsedAnswer(span=span if is_proper(span) else None, rule=rule)


def _match(text: str) -> tuple[str, Interval | None]:
    clocks = [_clock_s(*found) for found in _CLOCK.findall(text)[:2]]
    if len(clocks) == 2:
        return "clock", (clocks[0], clocks[1])
    for rule, pattern in _PAIRS:
        if pair := pattern.search(text):
            return rule, (float(pair[1]), float(pair[2]))
    numbers = _NUMBER.findall(text)[:2]
    if len(numbers) == 2:
        return "numbers", (float(numbers[0]), float(numbers[1]))
    return NO_RULE, None


def _clock_s(hours: str, minutes: str, seconds: str) -> float:
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
