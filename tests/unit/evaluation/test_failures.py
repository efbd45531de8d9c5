"""How a prediction failed, which other event it names, and which failures are shown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from video_opd.evaluation.failures import FAILURES, choose_failures, other_event, outcome
from video_opd.evaluation.metrics import evaluate
from video_opd.evaluation.rows import score_rows
from video_opd.temporal import best_iou
from video_opd.types import Prediction, Sample


def sample(name: str, *spans: tuple[float, float], video: str = "v.mp4") -> Sample:
    return Sample(id=name, video=Path(video), query=name, spans=spans)


def prediction(name: str, span: tuple[float, float] | None) -> Prediction:
    return Prediction(id=name, responses=("",), spans=(span,), rules=("exact",))


@pytest.mark.parametrize(
    ("span", "found"),
    [
        (None, "no span"),
        ((4.0, 8.0), "right"),
        ((4.0, 6.0), "right"),  # exactly one half
        ((4.0, 5.9), "loose boundaries"),  # holds no middle, but its own lies inside
        ((0.0, 20.0), "loose boundaries"),  # all of the video: it holds the event
        ((5.9, 12.0), "loose boundaries"),  # the event's middle lies inside
        ((7.0, 12.0), "another event"),  # touches it, and neither middle is shared
        ((8.0, 9.0), "another event"),
        ((6.0, 6.0), "loose boundaries"),
    ],
)
def test_a_prediction_is_sorted_by_overlap_and_middles(span: tuple[float, float] | None, found: str) -> None:
    assert outcome(span, [(4.0, 8.0)]) == found


@pytest.mark.parametrize("protocol", ["paper", "timelens"])
def test_what_is_right_is_what_the_recall_counts(protocol: str) -> None:
    """Also for an IoU of one half that floats miss by a rounding step, and for spans that are rounded."""
    draws = random.Random(0)
    rows, answers = [], {}
    for i in range(2000):
        start = draws.randrange(300) / 10
        length = draws.randrange(1, 80) / 10
        rows.append(sample(f"s{i}", (start, start + 2 * length)))
        off = draws.choice((0.0, 0.0, draws.uniform(-1, 1)))
        answers[f"s{i}"] = prediction(f"s{i}", (start + off, start + off + length))
    scored = score_rows(rows, answers, protocol)
    right = [row.sample.id for row in scored if outcome(row.span, row.sample.spans) == "right"]
    assert 100 * len(right) / len(rows) == evaluate(rows, answers, protocol, draws=1).values["R@0.5"]
    shown = choose_failures(rows, answers, protocol, count=len(rows))
    assert {row.sample.id for row in shown} == {*answers} - {*right}
    # The plain comparison of the predictions themselves would count otherwise.
    plain = [i for i, row in enumerate(rows) if best_iou(answers[f"s{i}"].spans[0], row.spans) >= 0.5]
    assert len(plain) != len(right)


def test_an_event_of_which_the_prediction_is_half_is_named() -> None:
    rows = [sample("mine", (10, 11)), sample("other", (0.7, 2.1))]
    assert other_event((0.7, 1.4), rows[0], rows) is rows[1]  # an IoU of 0.49999999999999994


def test_any_annotated_span_will_do() -> None:
    assert outcome((21.0, 24.5), [(4.0, 8.0), (20.0, 24.0)]) == "right"
    assert outcome((20.0, 30.0), [(4.0, 8.0), (20.0, 24.0)]) == "loose boundaries"


def test_the_other_event_is_named_where_the_annotations_know_it() -> None:
    rows = [
        sample("mine", (4, 8)),
        sample("near", (10, 14)),
        sample("nearer", (10, 13), (30, 31)),
        sample("elsewhere", (10, 12), video="w.mp4"),
        sample("unannotated"),
    ]
    assert other_event((10, 12.9), rows[0], rows) is rows[2]
    assert other_event((10, 12), rows[2], rows) is rows[1]  # not itself
    assert other_event((16, 20), rows[0], rows) is None
    assert other_event((4, 8), rows[0], rows) is None


def test_shown_are_a_few_of_each_kind_from_different_videos_all_over_the_data() -> None:
    rows = [sample(f"s{i}", (4, 8), video=f"v{i // 2}") for i in range(20)]
    spans = {"no span": None, "another event": (20, 21), "loose boundaries": (4, 20), "right": (4, 8)}
    kinds = [*FAILURES, "right"]
    answers = {f"s{i}": prediction(f"s{i}", spans[kinds[i // 2 % 4]]) for i in range(20)}
    del answers["s0"]  # a video that could not be read
    answers["s1"] = Prediction(id="s1", responses=(), spans=(), rules=())
    found = [row.sample.id for row in choose_failures(rows, answers, count=4)]
    # Videos 0, 4, 8 have no span (s1, s8, s9, s16, s17), 1, 5, 9 another event, 2 and 6 loose boundaries.
    assert found == ["s1", "s8", "s9", "s16", "s2", "s3", "s10", "s18", "s4", "s5", "s12", "s13"]
    assert [row.sample.id for row in choose_failures(rows, answers, count=2)] == [
        *("s1", "s8", "s2", "s10", "s4", "s12")
    ]
    assert choose_failures(rows, {}) == []
