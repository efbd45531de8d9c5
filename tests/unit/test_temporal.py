"""Intervals against brute force on a grid; the parser on the styles that models answer in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction

import pytest
from answer_styles import STYLES, THINKING
from growth_cases import is_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.errors import UserError
from video_opd.temporal import (
    best_iou,
    centre_s,
    clamp,
    clock,
    format_span,
    iou,
    is_proper,
    parse_answer,
    timestamp_aware_iou,
)

CENTI = st.integers(0, 400)  # hundredths of a second: a grid on which lengths can be counted
SPAN = st.tuples(CENTI, CENTI).filter(lambda s: s[0] < s[1])


def seconds(span: tuple[int, int]) -> tuple[float, float]:
    return span[0] / 100, span[1] / 100


@given(SPAN, SPAN)
def test_iou_counts_grid_cells(a: tuple[int, int], b: tuple[int, int]) -> None:
    cells_a, cells_b = set(range(*a)), set(range(*b))
    expected = Fraction(len(cells_a & cells_b), len(cells_a | cells_b))
    assert iou(seconds(a), seconds(b)) == pytest.approx(float(expected), abs=1e-9)


@given(SPAN, SPAN)
def test_iou_is_symmetric_and_one_only_for_itself(a: tuple[int, int], b: tuple[int, int]) -> None:
    assert iou(seconds(a), seconds(b)) == iou(seconds(b), seconds(a))
    assert (iou(seconds(a), seconds(b)) == 1.0) == (a == b)


@pytest.mark.parametrize(
    "bad", [None, (3.0, 3.0), (5.0, 2.0), (math.nan, 2.0), (0.0, math.inf), (-math.inf, math.inf)]
)
def test_what_is_no_interval_overlaps_with_nothing(bad: tuple[float, float] | None) -> None:
    assert not is_proper(bad)
    assert iou(bad, (0.0, 10.0)) == 0.0
    assert iou((0.0, 10.0), bad) == 0.0


def test_touching_intervals_do_not_overlap() -> None:
    assert iou((0.0, 5.0), (5.0, 10.0)) == 0.0


def test_best_iou_takes_the_best_of_several() -> None:
    assert best_iou((0.0, 4.0), [(8.0, 9.0), (0.0, 8.0), (3.0, 5.0)]) == pytest.approx(0.5)
    assert best_iou((0.0, 4.0), []) == 0.0
    assert best_iou(None, [(0.0, 1.0)]) == 0.0


@given(SPAN, SPAN, st.integers(1, 500))
def test_timestamp_aware_iou_is_time_r1s_product(a: tuple[int, int], b: tuple[int, int], d: int) -> None:
    cells_a, cells_b = set(range(*a)), set(range(*b))
    expected = Fraction(len(cells_a & cells_b), len(cells_a | cells_b))
    for x, y in zip(a, b, strict=True):
        expected *= min(max(1 - Fraction(abs(x - y), d), Fraction(0)), Fraction(1))
    assert timestamp_aware_iou(seconds(a), seconds(b), d / 100) == pytest.approx(float(expected), abs=1e-9)


def test_timestamp_aware_iou_by_hand() -> None:
    # IoU 4/8, start off by 0, end off by 4 of 20 s.
    assert timestamp_aware_iou((2.0, 6.0), (2.0, 10.0), 20.0) == pytest.approx(0.5 * 1.0 * 0.8)
    assert timestamp_aware_iou(None, (2.0, 10.0), 20.0) == 0.0


@pytest.mark.parametrize("duration_s", [0.0, -1.0, math.nan, math.inf])
def test_timestamp_aware_iou_refuses_an_impossible_duration(duration_s: float) -> None:
    with pytest.raises(UserError, match="duration"):
        timestamp_aware_iou((0.0, 1.0), (0.0, 1.0), duration_s)


def test_clamp_centre() -> None:
    assert clamp((3.0, 50.0), 35.0) == (3.0, 35.0)
    assert clamp((-2.0, 5.0), 35.0) == (0.0, 5.0)
    assert clamp((40.0, 50.0), 35.0) is None
    assert centre_s((2.0, 5.0)) == 3.5


def test_format_span_has_two_decimals() -> None:
    assert format_span((12.5, 17.826)) == "12.50 to 17.83"
    assert format_span((0.0, 3661.0)) == "0.00 to 3661.00"


@given(SPAN)
def test_a_formatted_span_is_read_back_exactly(span: tuple[int, int]) -> None:
    parsed = parse_answer(format_span(seconds(span)))
    assert parsed.rule == "exact"
    assert parsed.span == seconds(span)


def test_the_table_of_styles_is_large_and_has_no_row_twice() -> None:
    texts = [text for text, _, _ in STYLES]
    assert len(texts) == len(set(texts)) >= 150
    assert {rule for _, rule, _ in STYLES} == {"exact", "to", "dash", "clock", "from_and", "none"}


@pytest.mark.parametrize(("text", "rule", "span"), STYLES)
def test_styles(text: str, rule: str, span: tuple[float, float] | None) -> None:
    parsed = parse_answer(text)
    assert (parsed.rule, parsed.span) == (rule, span)


@pytest.mark.parametrize(("text", "rule", "span"), THINKING)
def test_thinking_reads_only_what_follows(text: str, rule: str, span: tuple[float, float] | None) -> None:
    parsed = parse_answer(text, thinking=True)
    assert (parsed.rule, parsed.span) == (rule, span)


def test_without_thinking_everything_is_read() -> None:
    assert parse_answer("1 to 2</think>").span == (1.0, 2.0)


def numbers_in(text: str) -> set[float]:
    """Every number and clock time that a reader may find in the text; whole ones, never a part of one.

    It goes by characters, knows no words or units, and is more generous than the rules.
    """
    wide = {
        ord(full): ascii_ for full, ascii_ in zip("０１２３４５６７８９．：，", "0123456789.:,", strict=True)
    }
    text = re.sub(r"\.{2,}", "…", text.translate(wide))
    found: set[float] = set()
    for run in re.finditer(r"[\d.,:/]*\d[\d.,:/]*", text):
        core = run.group().strip(".,:/")
        start = run.start() + run.group().index(core)
        before, after = text[:start], text[start + len(core) :]
        if touches_a_digit(before[::-1]) or touches_a_digit(after) or re.match(r"e[+-]\d", after, re.I):
            continue
        if re.search(r"\de[+-]$", before, re.I):
            continue
        points = len(before) - len(before.rstrip("."))
        for i, part in enumerate(core.split(",")):
            if i:
                part = part.strip(":/").rstrip(".")
            elif points == 1 and not before[-2:-1].isalnum() and part.isdecimal():
                part = f".{part}"
            elif points == 1 and not {".", ":"} & set(part):
                continue
            else:
                part = part.rstrip(".:/")
            if re.fullmatch(r"[0-9]*\.?[0-9]+", part):
                found.add(float(part))
            elif re.fullmatch(r"(?:[0-9]+:)?[0-9]+:[0-9]+(?:\.[0-9]+)?", part):
                found.add(sum(float(n) * 60**i for i, n in enumerate(part.split(":")[::-1])))
    return found


def touches_a_digit(text: str) -> bool:
    """Whether a digit follows, with nothing between that keeps two numbers apart."""
    for i, character in enumerate(text):
        if character.isalnum():
            return i > 0 and character.isdecimal()
        if character.isspace() or character < " " or character in APART:
            return False
    return False


# As in a list.
APART = '-‐‑‒–—―−﹣－~～〜≈,，、;；。…!！?？=|<>→⇒()[]{}（）【】《》〈〉「」『』〔〕"“”„«»#%\ufffd'


PIECES = (
    "from to and between start end begins ends about at the people - – ~ : , . s seconds % m ( ) </think> "
    "1 12.54 17.83 00:12 1:02:03 -5 1,2 .5 3-4 2026-11-22 00:12,00:17 12-second _5_ 秒 ~7 ** <b>"
)
NOTATIONS = "0159\x18\ufffd..,:/-–…_'^·*+eEA²½٣１．：，\u200b\u00a0 \n秒第(\"#"
WORDS = st.sampled_from([*PIECES.split(), "\n"])
JOINED = st.tuples(st.sampled_from(["", " "]), st.lists(WORDS, max_size=14)).map(lambda t: t[0].join(t[1]))


GLUED = st.lists(
    st.one_of(st.sampled_from(NOTATIONS), st.sampled_from(["to", " to ", "1-2", "s"])), max_size=12
)
TEXTS = st.one_of(st.text(max_size=200), JOINED, GLUED.map("".join))


@settings(max_examples=400)
@given(TEXTS, st.booleans())
def test_never_raises_and_never_makes_up_a_number(text: str, thinking: bool) -> None:
    parsed = parse_answer(text, thinking=thinking)
    assert parsed.rule in {"exact", "to", "dash", "clock", "from_and", "none"}
    if parsed.span is None:
        return
    assert parsed.rule != "none"
    assert is_proper(parsed.span)
    assert set(parsed.span) <= numbers_in(text)


@settings(max_examples=200)
@given(SPAN, JOINED, JOINED)
def test_words_around_an_answer_do_not_change_its_numbers(
    span: tuple[int, int], before: str, after: str
) -> None:
    """A sentence of its own, without a number in it, neither hides an answer nor lends it another rule."""
    words = [re.sub(r"[0-9].*|</think>|[-–~]", "", text) for text in (before, after)]
    parsed = parse_answer(f"{words[0]}\nThe answer: {format_span(seconds(span))} s.\n{words[1]}")
    assert (parsed.rule, parsed.span) == ("to", seconds(span))


LONG = 3000  # characters of the shorter text
LONG_TEXTS: dict[str, Callable[[int], str]] = {
    "white space after to": lambda n: "1 to" + " " * n + "x 2",
    "gaps of white space": lambda n: ("1 to" + " " * 150 + "x ") * (n // 157),
    "gaps of brackets": lambda n: ("1 to" + "(" * 150 + "x ") * (n // 157),
    "names of times": lambda n: ("from 1 to " + "the at " * 20 + "x ") * (n // 152),
    "hedges": lambda n: ("1 to " + "about " * 20 + "2 ") * (n // 127),
    "from and to": lambda n: "from " + ("1 " + "to " * 50 + "x ") * (n // 154),
    "starts": lambda n: "start " * (n // 6) + "1 end 2",
    "starts and ends": lambda n: "start 1 end 2 " * (n // 14),
    "betweens": lambda n: ("between " * 15 + "1 and ") * (n // 126),
    "digits": lambda n: "9" * n,
    "numbers": lambda n: "1 " * (n // 2),
    "dots": lambda n: "1." * (n // 2),
    "joints": lambda n: "1_" * (n // 2),
    "invisible characters": lambda n: ("1" + "\u200b" * 50) * (n // 51),
    "thousands": lambda n: "1 000 " * (n // 6),
    "full width": lambda n: "１．" * (n // 2),
    "colons": lambda n: "1:" * (n // 2),
    "lists": lambda n: "1.5," * (n // 4),
    "dashes": lambda n: "1" + "-" * n + "2",
    "signs": lambda n: "- " * (n // 2) + "1 to 2",
    "a unit far away": lambda n: "1 (" + " " * n + "s",
    "brackets": lambda n: "(" * n + "1 to 2",
    "units": lambda n: ("unit: " * 12 + "frame " * 9 + "1 to 2 ") * (n // 133),
    "minutes": lambda n: "1 minute " * (n // 9),
    "units behind": lambda n: "1 to 2 in (" * (n // 11),
    "shares": lambda n: ("0.1 to 0.2 of the " + " " * 200) * (n // 218),
    "chinese": lambda n: "帧第1到" * (n // 4),
    "thoughts": lambda n: "<think>" * (n // 7) + "</think>1 to 2",
}


@pytest.mark.parametrize("make", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_long_texts_take_linear_time(make: Callable[[int], str]) -> None:
    assert is_linear(make, parse_answer, LONG)


@pytest.mark.parametrize(
    ("time_s", "text"),
    [
        (12.54, "00:12.54"),
        (59.999, "01:00.00"),
        (0.0, "00:00.00"),
        (3723.0, "1:02:03.00"),
        (3599.99, "59:59.99"),
    ],
)
def test_clock(time_s: float, text: str) -> None:
    assert clock(time_s) == text
