"""The numbers in a response, with their units: which of them may be times, and in which form.

Only seconds and clock times are times. A unit may stand before its number ("frames 120 to 180") or after it,
in English and, because responses mix languages, in plain Chinese, Japanese and Korean. A number is read whole
or not at all: no part of "1_000", "10^2", "1e-2", "A.1", "1 minute 5 seconds" or "one minute 5 seconds" is a
time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number in a text, up to ``end`` with its unit; ``value_s`` is None if it cannot be a time."""

    start: int
    end: int
    value_s: float | None
    clock: bool
    unit: bool  # a unit of seconds follows
    bare: bool  # digits without a unit: if a noun follows, they count things


# Digits of every script, so that "1٣" is one number; only [0-9] is read. A point may lead: ".5".
_NUMBER = re.compile(r"(?:\d+|(?<![^\W_])(?<!\.)\.\d+)(?:[.,:/]\d+)*(?:e[+-]\d+)?", re.I)
_PLAIN = re.compile(r"[0-9]{1,7}(?:\.[0-9]+)?|\.[0-9]+")  # short enough to stay finite
_CLOCK = re.compile(r"(?:([0-9]{1,3}):)?([0-9]{1,3}):([0-9]{2}(?:\.[0-9]+)?)")
# Thousands: "1,234.5" and "1.234,5".
_GROUPED = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]+")

_UNIT = re.compile(
    r"\s*\(\s*s(?:ec(?:ond)?s?)?\s*\)|\s*second\(s\)|\s*秒[钟鐘間]?|\s*초"
    r"|(?:\s*(?:seconds?|secs?|s)|-(?:seconds?|secs?))(?![^\W_])(?:\.(?=\s+(?:to|and|[-–—])))?",
    re.I,
)
_FRACTION_AFTER = re.compile(  # "12½", "12 .5", "12 1/2", "12 and a half"
    r"\s?[\u00bc-\u00be\u2150-\u215e]|\s\.[0-9]|\s[1-9]/[2-9](?!\w)|\s+and\s+(?:a|one)[\s-]+(?:half|third|quarter)\b",
    re.I,
)
# Words of units that are not seconds. Those of time: hours and minutes, parts of a second, and days.
_LARGER_UNITS = (
    r"hours?|hrs?|h|minutes?|mins?|m|minuten?|minut[oi]s?|stunden?|heures?|horas?|минут\w*|мин|час(?:а|ов)?|phút"
    r"|menit|dakika|นาที|मिनट|دقيقة"
)
_PARTS_OF_A_SECOND = r"ms|msecs?|(?:milli|centi|deci|micro|nano)seconds?|[µμun]s"
_TIME_UNITS = rf"{_LARGER_UNITS}|{_PARTS_OF_A_SECOND}|uhr|days?|weeks?|years?"
_FRAMES = r"(?:key)?frames?|frms?|bild(?:er)?|fotogram[am]\w*|cuadros?|quadros?|кадр\w*"
_PERCENT = r"percent(?:age)?|per\s?cent|pct|prozent|pour\s?cent|por\s?c(?:ien|en)to|per\s?cento|процент\w*"
_OTHER = (
    rf"(?:[%％‰°]|(?:{_PERCENT}|{_TIME_UNITS}|{_FRAMES}|fps|images?|[ap]m)(?![^\W_])|[ap]\.m\."
    r"|毫秒|ミリ秒|밀리초|分|분|小[时時]|[时時]|시간|帧|幀|フレーム|コマ|프레임|パーセント|퍼센트)"
)
# Hours or minutes whose seconds may follow: "1 minute 5 seconds", "1 min. 05", "2分5秒", "minute 2 second 5".
_LARGER_AFTER = re.compile(
    rf"(?:[^\S\n]*|-)(?:(?:hrs?|h|mins?|m)\.|(?:{_LARGER_UNITS})(?![^\W_])"
    r"|(?:分|小[时時]|[时時])[钟鐘間间]?|분|시간)",
    re.I,
)
_LARGER_BEFORE = re.compile(r"(?<![^\W_])(?:hour|hr|minute|min)\.?[^\S\n]*\Z", re.I)
_NUMBER_WORD = (
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|twenty|thirty|forty|fifty|sixty|hundred|half|an?|few|several|couple\s+of"
)
# "one minute and 5 seconds", "a half-hour, 5 seconds": up to the 5.
_LARGER_IN_WORDS = re.compile(
    rf"(?<![^\W_])(?:{_NUMBER_WORD})(?:\s+|-)(?=\w\w)(?:{_LARGER_UNITS})(?![^\W_])(?:[^\S\n]|[,，]|and\b)*\Z",
    re.I,
)
_BEFORE_REST = re.compile(r"(?:[^\S\n]|[,，、零又的の第]|and\b|(?:second|sec)\b)*", re.I)
# Parts of a second that follow seconds: "17 s 830 ms".
_PART_AFTER = re.compile(rf"[^\S\n]*(?:(?:{_PARTS_OF_A_SECOND})(?![^\W_])|毫秒|ミリ秒|밀리초)", re.I)
_BEFORE_PART = re.compile(r"[^\S\n]*(?:and\b[^\S\n]*)?", re.I)
_WHOLE = "video|clip|duration|length|total|movie|film|footage|recording"
_NUMBERS_OF = r"(?:numbers?|nos?\.?|index(?:es)?|indices|ids?|units?)"
_OTHER_UNIT = re.compile(
    rf"(?:[^\S\n]*|-){_OTHER}"  # "2 minutes", "2-minute"
    # "2 (minutes)", "2 (frame numbers)", "2 (% of the video)"
    rf"|\s*[(\[]\s*(?:in\s+)?{_OTHER}(?:\(?s\)?)?(?:\s+{_NUMBERS_OF}|\s+of\s+(?:the\s+)?(?:{_WHOLE}))?\s*[)\]]"
    rf"|\s*(?:,\s*)?(?:(?:in|as)\s+)?frame\s+{_NUMBERS_OF}(?![^\W_])"
    r"|\s*(?:,\s*)?(?:in|as)\s+(?:frames|minutes|mins|hours|ms|milliseconds|percent|minuten|prozent)(?![^\W_])",
    re.I,
)

_GLUE_REACH = 10  # characters before a number that may belong to it
_WORDS_REACH = 32  # characters before a number that may hold its minutes in words
_REST_REACH = 16  # characters between two numbers that may be parts of one time
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # no spaces between words
_LETTER = r"[^\W\d_]"
_CJK_AFTER = r"[到至和与與及跟之间間左起開开結结]|から|まで|と|の間|で|부터|에서|까지|와|과|사이"
# Matches after a number that is part of a word, a rank, a share or a count; not in "12to17" and "_12_".
_GLUED_AFTER = re.compile(
    rf"(?!(?:to|and)(?!{_LETTER}|_))(?!{_CJK_AFTER})_*{_LETTER}|[/%]|['’′](?=[0-9])", re.I
)
_WORD_BEFORE = re.compile(rf"({_LETTER}+)(_*)\Z")
# Digits without a space between them are two numbers if one of these stands there. If not, they are parts of
# one notation: "1_000", "10^2", "1·5", and "1" and "2" around an invisible character. Points in a row
# are an ellipsis. U+FFFD stands for bytes that are no text, as little a sign as a control character.
_APART = (
    r"\s\x00-\x1f\x7f\ufffd\-‐‑‒–—―−﹣－~～〜≈,，、;；。…!！?？=|<>→⇒"
    r"()\[\]{}（）【】《》〈〉「」『』〔〕\"“”„«»#%"
)
_JOINT = rf"(?!\.\.)(?:_|[^\w{_APART}])"
_JOINED_BEFORE = re.compile(rf"\d(?:{_JOINT})+\Z")
_JOINED_AFTER = re.compile(rf"(?:{_JOINT}){{1,9}}\d")
# A point before digits may be a full stop ("waited.5") or a decimal point ("at.5").
_POINT_BEFORE = re.compile(r"(?<!\.)\.\Z")
_BEFORE_LEADING_POINT = re.compile(r"(?:\A|(?<![0-9])\s|[(\[{<=:,;\-‐‑‒–—―−﹣－~～〜≈])[\"'“‘*_`$]*\Z")
_THOUSANDS_GAP = (" ", "\u00a0", "\u2009", "\u202f")  # "1 000"
_TOLERANCE_BEFORE = ("±", "∓", "+/-", "+-", "+/−")  # "12.5 ± 0.5"
_MINUTES_BEFORE = re.compile(r"[0-9]['’′]\Z")  # 1'05"
_ENDS_IN_CJK = re.compile(rf"[{_CJK}]\Z")

# A unit before its numbers: "Frames 120 to", "start frame: 120", "frame numbers from 120", "time (ms) = 120".
_BEFORE_REACH = 60  # characters
_TOKEN = re.compile(r"[a-zà-öø-ÿа-яё]+|%|[^\sa-z]|\n")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_COLON_LINE = re.compile(r":\s*\n")
_AFTER_HEADING = re.compile(r"\A.*[:：\n]", re.S)
_NUMBER_SIGN = re.compile(r"\bnos?\.", re.I)
_SHARE_WORD = re.compile(rf"%|percentages?|{_PERCENT}|frac(?:tions?)?|proportions?|ratios?")
_UNIT_WORD = re.compile(
    rf"{_SHARE_WORD.pattern}|{_FRAMES}|frameno|nframes|minutes?|mins?|hours?|hrs?|milliseconds?|msecs?|ms"
    r"|norm(?:ali[sz]ed)?|minuten|minut[oi]s?|stunden|heures?|horas?|минут\w*|час(?:а|ов)?"
)
# The words that may stand between such a unit and its number: "frame numbers from 120", "start_frame: 120".
_LINK = re.compile(
    r"[:：=#()~≈]|numbers?|num|nos?|index|indices|idx|ids?|range|interval|window|span|from|between|start(?:s|ing)?"
    r"|begin(?:s|ning)?|end(?:s|ing)?|stops?|times?|timestamps?|is|are|to|and|about|around|approximately|approx"
    r"|roughly|nearly|numbered|ranging|running"
)
_CJK_UNIT_BEFORE = re.compile(
    r"(?:帧|幀|フレーム|프레임|毫秒|ミリ秒|밀리초|分[钟鐘間]|小[时時]|百分比|百分之|パーセント|퍼센트)"
    r"(?:[号號数數番是为為はの:：=\s第]|번호|范围|範圍|从|從|在){0,6}\Z"
)
# "0.2-0.8 of the video": numbers up to 1 are a share of it.
_SHARE_AFTER = re.compile(
    r"\s*\(?\s*(?:of\s+(?:the\s+|its\s+)?(?:whole\s+|entire\s+|full\s+|total\s+)?"
    rf"(?:{_WHOLE})|(?:in\s+)?(?:normali[sz]ed|relative)(?![^\W_])"
    r"|(?:as\s+)?(?:an?\s+)?(?:fractions?|ratios?|proportions?)(?![^\W_])|[（]?\s*(?:比例|割合|비율))",
    re.I,
)
_SHARE_BEFORE = re.compile(
    r"(?:\brelative(?:\s+(?:times?|timestamps?|positions?))?\s*[:=]|(?:视频|視頻|影片|全长|全長|動画|영상)[的の의])"
    r"[\s\"'*`\[({]*\Z",
    re.I,
)
# A field or a note that names the unit of both numbers: '{"start": 120, "end": 180, "unit": "frames"}'.
_NAMED_REACH = 80  # characters
_UNIT_NAMED = re.compile(rf"\bunits?[\s\"'*`]{{0,3}}(?:[:=]|\bis\b|\bare\b)[\s\"'*`]{{0,3}}{_OTHER}", re.I)


def clock_time_s(text: str) -> float | None:
    """The seconds of ``mm:ss`` or ``hh:mm:ss``, with or without decimals; None for any other text."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return None
    hours, minutes, seconds = match.groups()
    if float(seconds) >= 60 or (hours is not None and int(minutes) >= 60):
        return None
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


_FULL_WIDTH = str.maketrans("０１２３４５６７８９．：，", "0123456789.:,")


def with_plain_digits(text: str) -> str:
    """The text with ASCII digits, points, colons and commas for full-width ones; its length is the same."""
    return text.translate(_FULL_WIDTH)


def find_numbers(text: str) -> list[Number]:
    """Every number of the text, in order. Those that cannot be times are there, too: they separate others."""
    found = list(_numbers(text))
    parts: set[int] = set()  # the numbers that are parts of a longer number or time
    for i, (a, b) in enumerate(pairwise(found)):
        if _is_thousand(text, a, b):
            parts |= {i, i + 1}
        elif _is_rest(text, a, b):
            parts |= {i + 1}
        elif _has_rest(text, a, b):
            parts |= {i}
    return [replace(number, value_s=None) if i in parts else number for i, number in enumerate(found)]


def _numbers(text: str) -> Iterator[Number]:
    for match in _NUMBER.finditer(text):
        values = _values(match.group())
        start = match.start()
        for part, value_s, clock in values:
            end = start + len(part)
            unit = _UNIT.match(text, end)
            if unit:
                end = unit.end()
            elif any(rule.match(text, end) for rule in (_OTHER_UNIT, _GLUED_AFTER, _JOINED_AFTER)):
                value_s = None
            before = text[max(start - _GLUE_REACH, 0) : start]
            if _FRACTION_AFTER.match(text, end) or _is_glued(before, part, has_unit=bool(unit)):
                value_s = None
            in_words = text[max(start - _WORDS_REACH, 0) : start].translate(_MARKUP)
            if not clock and _LARGER_IN_WORDS.search(in_words):
                value_s = None
            bare = not unit and part.isdigit()
            yield Number(start=start, end=end, value_s=value_s, clock=clock, unit=bool(unit), bare=bare)
            start += len(part) + 1


def _is_thousand(text: str, a: Number, b: Number) -> bool:
    """Whether two numbers may be one that is written in groups of three digits: "1 000"."""
    groups = a.bare and a.end - a.start <= 3 and text[a.end : b.start] in _THOUSANDS_GAP
    return groups and re.match(r"[0-9]{3}(?![0-9])", text[b.start : b.start + 4]) is not None


def _is_rest(text: str, a: Number, b: Number) -> bool:
    """Whether ``b`` is the rest of a time that begins with hours or minutes: "1 minute 5 seconds".

    In "a 2-minute video: 5 to 10" it is not.
    """
    unit = _LARGER_AFTER.match(text, a.end)
    if not unit and not _LARGER_BEFORE.search(text[max(a.start - _GLUE_REACH, 0) : a.start]):
        return False
    return _stand_together(_BEFORE_REST, text[unit.end() if unit else a.end : b.start])


def _has_rest(text: str, a: Number, b: Number) -> bool:
    """Whether ``b`` is the rest of the seconds ``a``: "17 s 830 ms"."""
    is_part = _PART_AFTER.match(text, b.end) is not None
    return a.unit and is_part and _stand_together(_BEFORE_PART, text[a.end : b.start])


def _stand_together(pattern: re.Pattern[str], between: str) -> bool:
    return len(between) <= _REST_REACH and pattern.fullmatch(between.translate(_MARKUP)) is not None


def are_seconds(text: str, a: Number, b: Number) -> bool:
    """Whether two numbers that are tied together are seconds: they say so, or nothing says otherwise."""
    if a.clock:
        return True
    if any(_follows_other_unit(_before(text, n, heading=not b.unit)) for n in (a, b) if not n.unit):
        return False
    if a.unit or b.unit:
        return True
    if _UNIT_NAMED.search(text, max(a.start - _NAMED_REACH, 0), b.end + _NAMED_REACH):
        return False
    is_share = a.value_s is not None and b.value_s is not None and max(a.value_s, b.value_s) <= 1
    before = text[max(a.start - _BEFORE_REACH, 0) : a.start]
    return not (is_share and (_SHARE_AFTER.match(text, b.end) or _SHARE_BEFORE.search(before)))


def _before(text: str, number: Number, *, heading: bool) -> str:
    """The text before a number, without a ``heading`` ("Frame by frame:") if that says nothing of it."""
    before = text[max(number.start - _BEFORE_REACH, 0) : number.start]
    return before if heading else _AFTER_HEADING.sub("", before)


def _follows_other_unit(before: str) -> bool:
    """Whether ``before`` ends in a unit that is not seconds and belongs to the number behind it."""
    if _CJK_UNIT_BEFORE.search(before):
        return True
    plain = _CAMEL.sub(" ", _NUMBER_SIGN.sub(" no ", _COLON_LINE.sub(":", before)))
    plain = plain.translate(_MARKUP).lower()
    places = list(_TOKEN.finditer(plain))
    tokens = [place.group() for place in places]
    closed = False
    while tokens and _LINK.fullmatch(tokens[-1]):
        link = tokens.pop()
        closed |= link == ")"
        if link in ("index", "indices", "idx"):
            return True  # of a frame, or of anything else
    if re.fullmatch(rf".*(?:{_SHARE_WORD.pattern}|frames) of the (?:{_WHOLE})", " ".join(tokens[-4:])):
        return True  # "percentage of the video: 20 to 80"
    if not tokens or not _UNIT_WORD.fullmatch(tokens.pop()):
        return False
    head = plain[: places[len(tokens)].start()]  # "90%: 12 to 17", "2 minutes (12 to 17)"
    return not (_NUMBER_BEFORE.search(head) or (closed and _NUMBER_IN_FRONT.search(head)))


_MARKUP = str.maketrans({**dict.fromkeys("*_`\"'“”‘’{}<>$", " "), "[": "(", "]": ")"})
# A unit behind these belongs to the number before it: "2 minutes", "2-minute"; "2 (minutes)" if it is closed.
_NUMBER_BEFORE = re.compile(r"[0-9](?:[ \t]*|-)\Z")
_NUMBER_IN_FRONT = re.compile(r"[0-9]\s*\(\s*\Z")


def _values(text: str) -> list[tuple[str, float | None, bool]]:
    """``(text, seconds, is a clock time)`` of each number in digits without a space between them.

    "12.54,17.83" and "00:12,00:17" are lists of two. "12,54" may be a list or a decimal comma, and "1,234" a
    thousand: they are no times.
    """
    parts = text.split(",")
    if len(parts) > 1 and not _GROUPED.fullmatch(text) and not all(part.isdigit() for part in parts):
        values = [(part, *_value_s(part)) for part in parts]
        if all(value_s is not None for _, value_s, _ in values):
            return values
    return [(text, *_value_s(text))]


def _value_s(text: str) -> tuple[float | None, bool]:
    if _PLAIN.fullmatch(text):
        return float(text), False
    time_s = clock_time_s(text)
    return time_s, time_s is not None


def _is_glued(before: str, number: str, *, has_unit: bool) -> bool:
    """Whether the number after ``before`` belongs to a word or a notation, or is a rank.

    It does not in "12to17", nor in "_12_". After a full stop, a number stands alone only if it has a point or
    a colon: "waited.12.54".
    """
    if word := _WORD_BEFORE.search(before):
        if _ENDS_IN_CJK.search(word[1]) and not word[2]:
            return word[1][-1] in "第제" and not has_unit  # "第12秒" is a time, "第12" a rank
        return bool(word[2]) or word[1].lower() not in ("to", "and")
    if number.startswith("."):
        return not _BEFORE_LEADING_POINT.search(before) or bool(_JOINED_BEFORE.search(before))
    if _POINT_BEFORE.search(before) and not {".", ":"} & {*number}:
        return True
    return (
        before.rstrip().endswith(_TOLERANCE_BEFORE)
        or before.endswith(("/", "#", "%"))
        or bool(_MINUTES_BEFORE.search(before) or _JOINED_BEFORE.search(before))
    )
