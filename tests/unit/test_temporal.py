"""Intervals against brute force on a grid; the parser on the styles that models answer in."""

from __future__ import annotations

import math
import re
import time
from fractions import Fraction

import pytest
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
    length_s,
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


def test_clamp_length_centre() -> None:
    assert clamp((3.0, 50.0), 35.0) == (3.0, 35.0)
    assert clamp((-2.0, 5.0), 35.0) == (0.0, 5.0)
    assert clamp((40.0, 50.0), 35.0) is None
    assert length_s((2.0, 5.5)) == 3.5
    assert length_s((5.0, 2.0)) == 0.0
    assert centre_s((2.0, 5.0)) == 3.5


def test_format_span_has_two_decimals() -> None:
    assert format_span((12.5, 17.826)) == "12.50 to 17.83"
    assert format_span((0.0, 3661.0)) == "0.00 to 3661.00"


@given(SPAN)
def test_a_formatted_span_is_read_back_exactly(span: tuple[int, int]) -> None:
    parsed = parse_answer(format_span(seconds(span)))
    assert parsed.rule == "exact"
    assert parsed.span == seconds(span)


A = (12.54, 17.83)
STYLES = [
    # exact: nothing but "A to B"
    ("12.54 to 17.83", "exact", A),
    ("  12.54 to 17.83\n", "exact", A),
    ("0 to 5", "exact", (0.0, 5.0)),
    ("12.54 TO 17.83", "exact", A),
    # to: the last "A to B", units and wrapping allowed
    ("12.54s to 17.83 seconds", "to", A),
    ("12.54 to 17.83.", "to", A),
    ("12.54 seconds to 17.83 seconds.", "to", A),
    ("12.54 sec. to 17.83 sec.", "to", A),
    ("12.54 (s) to 17.83 (s)", "to", A),
    ("The event happens from 12.54 to 17.83 seconds.", "to", A),
    ("The event takes place from second 12.54 to 17.83.", "to", A),
    ("**12.54** to **17.83**", "to", A),
    ("`12.54` to `17.83`", "to", A),
    ("“12.54 to 17.83”", "to", A),
    ("<answer>12.54 to 17.83</answer>", "to", A),
    ("Answer:12.54 to 17.83", "to", A),
    ("\\boxed{12.54 to 17.83}", "to", A),
    ("$12.54$ to $17.83$", "to", A),
    ("12.54to17.83", "to", A),
    ("12.54s\nto\n17.83", "to", A),
    ("It lasts 12.54 s to about 17.83 s.", "to", A),
    ("1 to 2, no: 12.54 to 17.83", "to", A),
    ("1.0 to 12.54 to 17.83", "to", A),
    ("Scene 1 - 12.54 to 17.83", "to", A),
    ("In 3 scenes, the event is at 12.54 to 17.83", "to", A),
    ("0.5 to .9 s", "to", (0.5, 0.9)),
    ("12.54 to 17.83 s, that is 0.2 to 0.3 minutes", "to", A),
    # dash
    ("12.54 - 17.83", "dash", A),
    ("12.54–17.83 s", "dash", A),
    ("12.54 — 17.83", "dash", A),
    ("12.54 -17.83", "dash", A),
    ("The event happens in 12.54 - 17.83 seconds.", "dash", A),
    ("12.54s - 17.83s", "dash", A),
    ("1-2, then 12.54-17.83", "dash", A),
    ("[12.54 - 17.83]", "dash", A),
    # clock: any of the shapes
    ("00:12 to 00:17", "clock", (12.0, 17.0)),
    ("00:12 - 00:17", "clock", (12.0, 17.0)),
    ("from 1:02:03 to 1:02:10", "clock", (3723.0, 3730.0)),
    ("between 00:12 and 00:17", "clock", (12.0, 17.0)),
    ("Start: 00:12, End: 00:17", "clock", (12.0, 17.0)),
    ("[00:12.54 – 00:17.83]", "clock", A),
    ("75:10 to 76:00", "clock", (4510.0, 4560.0)),
    ("from about 02:05 when she sits down to around 02:15", "clock", (125.0, 135.0)),
    # from_and
    ("between 12.54 and 17.83 seconds", "from_and", A),
    ("Between about 12.54s and 17.83s, the cup falls.", "from_and", A),
    ("from 12.54 s, when the door opens, to the 17.83 second mark", "from_and", A),
    ("from 12 up to around 17", "from_and", (12.0, 17.0)),
    ("It starts at 12.54 and ends at 17.83.", "from_and", A),
    ("It begins at 12.54 seconds. It ends at 17.83 seconds.", "from_and", A),
    ('{"start": 12.54, "end": 17.83}', "from_and", A),
    ("start_time=12.54, end_time=17.83", "from_and", A),
    ("<start>12.54</start> <end>17.83</end>", "from_and", A),
    ("Start: 12\nEnd: 17", "from_and", (12.0, 17.0)),
    # a rule matches, but there is no span in it
    ("17.83 to 12.54", "exact", None),
    ("12.54 to 12.54", "exact", None),
    ("17.83s to 12.54s", "to", None),
    ("17 - 12", "dash", None),
    ("00:17 - 00:12", "clock", None),
    ("between 17 and 12 seconds", "from_and", None),
    # no answer
    ("", "none", None),
    ("The event does not happen.", "none", None),
    ("12.54", "none", None),
    ("12.54 and 17.83", "none", None),
    ("[12.54, 17.83]", "none", None),
    ("At 12.54 s the man enters. At 17.83 s he leaves.", "none", None),
    ("The video starts with 2 men and ends with 5 women.", "none", None),
    ("between 2 and 3 people", "none", None),
    ("from 2 men sitting to 5 women standing", "none", None),
    ("filmed on 2026-11-22", "none", None),
    ("-5 to 10", "none", None),
    ("1 to 2 minutes", "none", None),
    ("10% to 20% of the video", "none", None),
    ("frames 12 to 17 frames", "none", None),
    ("1,234 to 1,240", "none", None),
    ("1.2.3 to 4.5.6", "none", None),
    ("1e3 to 2e3", "none", None),
    ("the ratio went 16:9 to 4:3", "none", None),
    ("00:75 to 00:80", "none", None),
    ("0:12 to 17", "none", None),
    ("10:30 am to 11:00 am", "none", None),
    ("9" * 400 + " to " + "9" * 401, "none", None),
    ("waited.12.54 then to 17.83", "none", None),
]


@pytest.mark.parametrize(("text", "rule", "span"), STYLES)
def test_styles(text: str, rule: str, span: tuple[float, float] | None) -> None:
    parsed = parse_answer(text)
    assert (parsed.rule, parsed.span) == (rule, span)


@pytest.mark.parametrize(
    ("text", "rule", "span"),
    [
        ("<think>1.00 to 2.00</think>12.54 to 17.83", "exact", A),
        ("it runs 1.00 to 2.00</think>\n\n12.54 to 17.83", "exact", A),
        ("a</think>1 to 2</think> 12.54 s to 17.83 s", "to", A),
        ("<think>12.54 to 17.83", "none", None),  # the length limit came before the answer
        ("12.54 to 17.83</think>", "none", None),
        ("12.54 to 17.83", "none", None),
    ],
)
def test_thinking_reads_only_what_follows(text: str, rule: str, span: tuple[float, float] | None) -> None:
    parsed = parse_answer(text, thinking=True)
    assert (parsed.rule, parsed.span) == (rule, span)


def test_without_thinking_everything_is_read() -> None:
    assert parse_answer("1 to 2</think>").span == (1.0, 2.0)


PIECES = (
    "from to and between start end begins ends about at the people - – : , . s seconds % m ( ) </think> "
    "1 12.54 17.83 00:12 1:02:03 -5 1,2 .5 3-4 2026-11-22"
)
WORDS = st.sampled_from([*PIECES.split(), "\n"])


@settings(max_examples=200)
@given(st.one_of(st.text(max_size=200), st.lists(WORDS, max_size=14).map(" ".join)), st.booleans())
def test_never_raises_and_never_makes_up_a_number(text: str, thinking: bool) -> None:
    parsed = parse_answer(text, thinking=thinking)
    assert parsed.rule in {"exact", "to", "dash", "clock", "from_and", "none"}
    if parsed.span is None:
        return
    assert parsed.rule != "none"
    assert is_proper(parsed.span)
    in_text = {float(n) for n in re.findall(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+", text)}
    for hours, minutes, secs in re.findall(r"(?:([0-9]+):)?([0-9]+):([0-9]+(?:\.[0-9]+)?)", text):
        in_text.add(int(hours or 0) * 3600 + int(minutes) * 60 + float(secs))
    assert set(parsed.span) <= in_text


@pytest.mark.parametrize(
    "text",
    [
        "start " * 3000 + "1 end " * 3000,
        "1 " * 10000,
        "(" * 20000 + "1 to 2",
        "from the at " * 3000 + "1 and 2",
    ],
)
def test_long_texts_take_linear_time(text: str) -> None:
    start = time.process_time()
    parse_answer(text)
    assert time.process_time() - start < 2.0


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
