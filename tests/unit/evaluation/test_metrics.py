"""Metrics by hand and against exact arithmetic; the controls on models whose behaviour is known."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from video_opd.errors import UserError
from video_opd.evaluation import best_constant as best_constant_module
from video_opd.evaluation.best_constant import best_constant
from video_opd.evaluation.metrics import evaluate, evaluation_record, paired_difference
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.protocols import get_protocol
from video_opd.evaluation.query_swap import query_swap
from video_opd.evaluation.rows import METRICS, metric_values, score_rows
from video_opd.evaluation.terminal import print_metrics
from video_opd.types import Prediction, Sample


def sample(
    identity: str,
    *spans: tuple[float, float],
    video: str = "",
    source: str | None = None,
    duration_s: float = 20.0,
) -> Sample:
    return Sample(
        id=identity,
        video=Path(video or f"{identity}.mp4"),
        query=f"query {identity}",
        duration_s=duration_s,
        spans=spans,
        source=source,
    )


def said(**spans: tuple[float, float] | None) -> dict[str, Prediction]:
    return {
        identity: Prediction(id=identity, responses=("",), spans=(span,), rules=("given",))
        for identity, span in spans.items()
    }


def known(interval: tuple[float, float] | None) -> tuple[float, float]:
    assert interval is not None
    return interval


def test_metrics_by_hand() -> None:
    samples = [
        sample("a", (0.0, 10.0)),  # IoU 1
        sample("b", (0.0, 10.0)),  # 0.5
        sample("c", (0.0, 10.0), (12.0, 16.0)),  # best of two: 0.75
        sample("d", (0.0, 10.0)),  # unparsed
        sample("e", (0.0, 10.0)),  # missing
        sample("f"),  # not annotated
    ]
    metrics = evaluate(samples, said(a=(0.0, 10.0), b=(0.0, 5.0), c=(12.0, 15.0), d=None, f=(0.0, 1.0)))
    assert metrics.values == pytest.approx({"R@0.3": 60.0, "R@0.5": 60.0, "R@0.7": 40.0, "mIoU": 45.0})
    assert (metrics.n, metrics.unparsed, metrics.missing, metrics.unannotated) == (5, 1, 1, 1)


def test_json_is_the_contracts() -> None:
    samples = [
        sample("a", (0.0, 10.0), source="x"),
        sample("b", (0.0, 10.0), source="y"),
        sample("c", (1.0, 2.0)),
    ]
    record = json.loads(json.dumps(evaluate(samples, said(a=(0.0, 10.0), b=None)).to_json()))
    assert {
        "n",
        "R@0.3",
        "R@0.5",
        "R@0.7",
        "mIoU",
        "ci95",
        "unparsed",
        "missing",
        "protocol",
        "by_source",
    } <= set(record)
    assert set(record["ci95"]) == set(METRICS)
    assert all(low <= record[name] <= high for name, (low, high) in record["ci95"].items())
    assert record["protocol"]["name"] == "paper"
    assert {k: v["n"] for k, v in record["by_source"].items()} == {"x": 1, "y": 1, "none": 1}
    assert record["by_source"]["x"]["mIoU"] == 100.0
    assert record["by_source"]["y"]["unparsed"] == 1


def test_no_sources_no_parts() -> None:
    assert evaluate([sample("a", (0.0, 1.0))], {}).by_source == {}


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 30)] * 4), min_size=1, max_size=8))
def test_recall_is_exact_at_its_thresholds(rows: list[tuple[int, int, int, int]]) -> None:
    """Tenths of a second, where float IoUs fall a rounding step beside 0.3, 0.5 and 0.7."""
    samples, exact = [], []
    predictions: dict[str, Prediction] = {}
    for i, (s, e, ps, pe) in enumerate(rows):
        true, pred = (min(s, e), max(s, e) + 1), (min(ps, pe), max(ps, pe) + 1)
        shared = max(0, min(true[1], pred[1]) - max(true[0], pred[0]))
        exact.append(Fraction(shared, (true[1] - true[0]) + (pred[1] - pred[0]) - shared))
        samples.append(sample(str(i), (true[0] / 10, true[1] / 10)))
        predictions |= said(**{str(i): (pred[0] / 10, pred[1] / 10)})
    metrics = evaluate(samples, predictions, draws=2)
    for tenths in (3, 5, 7):
        expected = 100 * sum(iou >= Fraction(tenths, 10) for iou in exact) / len(exact)
        assert metrics.values[f"R@0.{tenths}"] == pytest.approx(expected)
    assert metrics.miou == pytest.approx(100 * float(sum(exact) / len(exact)))


@pytest.mark.parametrize(
    ("spans", "prediction", "iou"),
    [
        ([(10, 20)], (10, 20), 1),
        ([(10, 20)], (15, 25), Fraction(5, 15)),
        ([(10, 20)], (12, 18), Fraction(6, 10)),
        ([(10, 20)], (0, 40), Fraction(10, 40)),
        ([(10, 20)], (20, 30), 0),  # they touch
        ([(10, 20)], (30, 40), 0),
        ([(10, 20)], (20, 10), 0),  # reversed
        ([(10, 20)], (15, 15), 0),  # empty
        ([(10, 20)], None, 0),
        # several spans: the best of them, not their union and not their mean
        ([(0, 4), (10, 20)], (10, 20), 1),
        ([(0, 4), (10, 20)], (0, 20), Fraction(10, 20)),
        ([(0, 4), (10, 20)], (2, 12), Fraction(2, 12)),  # of (10, 20) it is 2/18
        ([(0, 10), (10, 20)], (0, 20), Fraction(10, 20)),
        ([(0, 10), (5, 15)], (5, 10), Fraction(5, 10)),
        ([(0, 10), (2, 8), (4, 6)], (4, 6), 1),
    ],
)
def test_iou_with_several_spans_by_hand(
    spans: list[tuple[float, float]], prediction: tuple[float, float] | None, iou: Fraction
) -> None:
    metrics = evaluate([sample("a", *spans, duration_s=50.0)], said(a=prediction), draws=2)
    assert metrics.miou == pytest.approx(100 * float(iou))
    assert metrics.unparsed == (prediction is None)


def swept_iou(prediction: tuple[int, int] | None, span: tuple[int, int]) -> Fraction:
    """IoU by a sweep over the pieces between all ends, in whole hundredths: no formula of ours is in it."""
    if prediction is None or prediction[0] >= prediction[1]:
        return Fraction(0)
    ends = sorted({*prediction, *span})
    both = either = 0
    for start, end in itertools.pairwise(ends):
        inside = [a <= start and end <= b for a, b in (prediction, span)]
        both += (end - start) * all(inside)
        either += (end - start) * any(inside)
    return Fraction(both, either)


def test_ten_thousand_random_rows_equal_an_independent_implementation() -> None:
    """Hundredths of a second, as models write them; one to four spans, predictions near one or anywhere."""
    rng = np.random.default_rng(11)
    samples, exact = [], []
    predictions: dict[str, Prediction] = {}
    for number in range(10_000):
        spans = []
        for _ in range(int(rng.integers(1, 5))):
            start, end = sorted(int(x) for x in rng.choice(6000, 2, replace=False))
            spans.append((start, end))
        kind = number % 5
        prediction: tuple[int, int] | None = (int(rng.integers(0, 6000)), int(rng.integers(0, 6000)))
        if kind < 2:  # near one of the spans; else anywhere, in half of the cases reversed
            start, end = spans[int(rng.integers(len(spans)))]
            prediction = (start + int(rng.integers(-300, 300)), end + int(rng.integers(-300, 300)))
        elif kind == 2 and number % 3 == 0:
            prediction = None
        samples.append(
            sample(
                str(number), *((a / 100, b / 100) for a, b in spans), video=f"{number // 3}", duration_s=60
            )
        )
        if number % 50:  # else it is missing
            predictions |= said(
                **{str(number): None if prediction is None else (prediction[0] / 100, prediction[1] / 100)}
            )
        else:
            prediction = None
        exact.append(max(swept_iou(prediction, span) for span in spans))
    metrics = evaluate(samples, predictions, draws=2)
    assert (metrics.n, metrics.missing) == (10_000, 200)
    assert metrics.miou == pytest.approx(100 * math.fsum(map(float, exact)) / 10_000, abs=1e-9)
    for tenths in (3, 5, 7):
        reached = sum(10 * iou.numerator >= tenths * iou.denominator for iou in exact)
        assert 1000 < reached < 9000
        assert metrics.values[f"R@0.{tenths}"] == pytest.approx(100 * reached / 10_000, abs=1e-9)
    rows = score_rows(samples, predictions)
    assert max(abs(row.iou - float(iou)) for row, iou in zip(rows, exact, strict=True)) < 1e-12


def test_interval_resamples_videos_not_rows() -> None:
    spans = {f"{v}-{q}": (0.0, 10.0) if v % 2 else (15.0, 16.0) for v in range(20) for q in range(8)}
    one_video_each = [sample(i, (0.0, 10.0)) for i in spans]
    shared = [sample(i, (0.0, 10.0), video=i.split("-")[0]) for i in spans]
    width = {}
    for name, samples in (("rows", one_video_each), ("videos", shared)):
        low, high = known(evaluate(samples, said(**spans)).ci95["mIoU"])
        width[name] = high - low
    assert width["videos"] > 2 * width["rows"]


def test_evaluation_refuses_what_cannot_be_meant() -> None:
    with pytest.raises(UserError, match="annotated"):
        evaluate([sample("a")], said(a=(0.0, 1.0)))
    with pytest.raises(UserError, match="id"):
        evaluate([sample("a", (0.0, 1.0))], said(other=(0.0, 1.0)))
    with pytest.raises(UserError, match="timelens"):
        get_protocol("charades")
    assert evaluate([sample("a", (0.0, 1.0))], {}).missing == 1


def test_timelens_rounds_predictions_to_whole_seconds() -> None:
    samples = [sample("a", (2.0, 10.0)), sample("b", (2.0, 10.0))]
    predictions = said(a=(2.4, 9.6), b=(2.2, 2.4))
    assert evaluate(samples, predictions, "paper").miou == pytest.approx(100 * (0.9 + 0.2 / 8) / 2)
    rounded = evaluate(samples, predictions, "timelens")
    assert rounded.miou == pytest.approx(50.0)  # b becomes 2 to 2: nothing
    assert rounded.unparsed == 0  # but it was parsed
    assert rounded.to_json()["protocol"]["rounding"] == "whole seconds"


# --- predictions files


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_three_forms_of_a_prediction(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {
            "id": "a",
            "responses": ["1 to 2", "x"],
            "spans": [[1, 2], None],
            "rules": ["exact", "none"],
            "extra": 1,
        },
        {"id": "b", "response": "1.5s to 2s"},
        {"id": "c", "span": [3, 4.5]},
        {"id": "d", "span": [4, 3]},
        {"id": "e", "span": None},
        {"id": "f", "responses": ["3 - 4"]},
        {"id": "g", "responses": []},
        {"id": "h", "span": [1, 10**400]},
    )
    predictions = read_predictions(path)
    assert {i: (p.spans, p.rules) for i, p in predictions.items()} == {
        "a": (((1.0, 2.0), None), ("exact", "none")),
        "b": (((1.5, 2.0),), ("to",)),
        "c": (((3.0, 4.5),), ("given",)),
        "d": ((None,), ("none",)),
        "e": ((None,), ("none",)),
        "f": (((3.0, 4.0),), ("dash",)),
        "g": ((), ()),
        "h": ((None,), ("none",)),
    }
    rows = score_rows([sample("g", (0.0, 1.0)), sample("d", (0.0, 1.0))], predictions)
    assert all(row.unparsed and not row.missing and row.iou == 0 for row in rows)


def test_thinking_reads_behind_the_thought(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "a", "response": "5 to 6 or so</think>1 to 2"})
    assert read_predictions(path, thinking=True)["a"].spans == ((1.0, 2.0),)


@pytest.mark.parametrize(
    "row",
    [
        {"response": "1 to 2"},
        {"id": "b"},
        {"id": "b", "responses": "1 to 2"},
        {"id": "b", "response": None},
        {"id": "b", "span": [1]},
        {"id": "b", "span": ["1", "2"]},
        {"id": "b", "spans": {"start": 1}},
        {"id": "b", "responses": ["1 to 2"], "spans": [[1, 2]], "rules": 5},
        {"id": "b", "responses": ["1 to 2"], "spans": [[1, 2]], "rules": ["to", "to"]},
        {"id": "b", "responses": ["1 to 2"], "spans": []},
        {"id": "b", "responses": ["1 to 2"], "spans": [[1, 2], [1, 2]]},
        {"id": "a", "span": [1, 2]},
    ],
)
def test_other_forms_are_refused_with_their_line(tmp_path: Path, row: dict[str, object]) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "a", "span": [1, 2]}, row)
    with pytest.raises(UserError, match=r"p\.jsonl:2"):
        read_predictions(path)


def test_one_video_has_figures_and_no_intervals() -> None:
    film = [sample("a", (0.0, 4.0), video="v"), sample("b", (8.0, 10.0), video="v")]
    predictions = said(a=(0.0, 4.0), b=(8.0, 9.0))
    found, swap = evaluate(film, predictions), query_swap(film, predictions)
    assert found.miou == pytest.approx(75.0) and set(found.ci95.values()) == {None}
    assert swap is not None and (swap.share, swap.ci95) == (100.0, None)
    assert json.loads(json.dumps(found.to_json()))["ci95"]["mIoU"] is None
    console = Console(file=io.StringIO(), force_terminal=False)
    print_metrics({"m": found}, swaps={"m": swap}, console=console)
    first, second, *_ = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first.endswith("mIoU 75.0, rows 2, notes one video: no intervals")
    assert second.startswith("m: query swap 100.0% (chance 50%)")


# --- best constant


def test_best_constant_equals_trying_every_answer() -> None:
    rng = np.random.default_rng(0)
    samples = []
    for i in range(12):
        duration_s = float(rng.uniform(5, 50))
        spans = []
        for _ in range(int(rng.integers(1, 4))):
            start, end = np.sort(rng.uniform(0, duration_s, 2))
            spans.append((float(start), float(end)))
        samples.append(sample(str(i), *spans, duration_s=duration_s))
    best = best_constant(samples, steps=20)
    assert best is not None
    found = {}
    for a, b in itertools.combinations(range(21), 2):
        predictions = {}
        for s in samples:
            assert s.duration_s
            predictions[s.id] = (a / 20 * s.duration_s, b / 20 * s.duration_s)
        found[a / 20, b / 20] = evaluate(samples, said(**predictions), draws=2).values
    highest = max(found, key=lambda ab: found[ab]["mIoU"])
    assert (best.start_fraction, best.end_fraction) == highest
    assert best.values == pytest.approx(found[highest])


@pytest.mark.parametrize("seed", range(6))
def test_the_mean_iou_of_every_constant_is_that_of_its_rows(seed: int) -> None:
    """Spans that begin and end on the grid, between its points, and outside of the video."""
    rng = np.random.default_rng(seed)
    spans = np.sort(rng.uniform(-0.1, 1.1, (300, 2)), axis=1)
    on_grid = rng.random((300, 2)) < 0.3
    spans = np.where(on_grid, np.round(spans * 20) / 20, spans)
    spans = spans[spans[:, 0] < spans[:, 1]]
    totals = best_constant_module._single_totals(spans, steps=20)
    for i, j in itertools.combinations(range(21), 2):
        shared = [max(0.0, min(j / 20, v) - max(i / 20, u)) for u, v in spans.tolist()]
        lengths = [(j - i) / 20 + v - u for u, v in spans.tolist()]
        ious = [s / (length - s) for s, length in zip(shared, lengths, strict=True)]
        assert totals[i, j] == pytest.approx(sum(ious), abs=1e-9)


def test_best_constant_finds_a_planted_prior() -> None:
    samples = [sample(str(d), (0.2 * d, 0.8 * d), duration_s=float(d)) for d in range(5, 60)]
    best = best_constant(
        [*samples, sample("unannotated"), Sample(id="x", video=Path("x"), query="", spans=((0, 1),))]
    )
    assert best is not None
    assert (best.start_fraction, best.end_fraction, best.n) == (0.2, 0.8, 55)
    assert best.miou == pytest.approx(100.0)


def test_best_constant_needs_durations() -> None:
    assert best_constant([Sample(id="a", video=Path("a"), query="", spans=((0.0, 1.0),))]) is None


# --- query swap

PAIRS = [
    sample(f"{v}{q}", (float(2 + v % 3), 5.0) if q == "a" else (float(12 + v % 4), 18.0), video=f"v{v}")
    for v in range(30)
    for q in "ab"
]


def test_query_swap_knows_who_listens() -> None:
    listens = {s.id: s.spans[0] for s in PAIRS}
    crossed = {
        s.id: t.spans[0]
        for s, t in zip(
            PAIRS, [t for pair in zip(PAIRS[1::2], PAIRS[::2], strict=True) for t in pair], strict=True
        )
    }
    first_seen = {s.id: PAIRS[i - i % 2].spans[0] for i, s in enumerate(PAIRS)}
    for predictions, share, same in ((listens, 100.0, 0.0), (crossed, 0.0, 0.0), (first_seen, 50.0, 100.0)):
        swap = query_swap(PAIRS, said(**predictions))
        assert swap is not None
        assert (swap.share, swap.same_answer) == (share, same)
        assert (swap.comparisons, swap.videos) == (60, 30)


def test_query_swap_of_noise_is_chance() -> None:
    rng = np.random.default_rng(0)
    noise = {s.id: (x := float(rng.uniform(0, 19)), x + 1.0) for s in PAIRS}
    swap = query_swap(PAIRS, said(**noise))
    assert swap is not None
    low, high = known(swap.ci95)
    assert low < 50 < high


def test_query_swap_ties_and_silence() -> None:
    two = [sample("a", (0.0, 2.0), video="v"), sample("b", (8.0, 10.0), video="v")]

    def share(**spans: tuple[float, float] | None) -> float:
        swap = query_swap(two, said(**spans))
        assert swap is not None
        return swap.share

    assert share(a=(3.0, 4.0), b=(6.0, 7.0)) == 100.0  # no overlap with either: the centre decides
    assert share(a=(4.5, 5.5), b=(4.5, 5.5)) == 50.0  # exactly between: half
    assert share(a=(0.0, 2.0), b=None) == 50.0  # an unparsed response is nearer nothing
    assert share(a=(0.0, 2.0)) == 50.0  # nor is a missing one


def test_query_swap_leaves_out_events_that_overlap() -> None:
    overlapping = [sample("a", (0.0, 10.0), video="v"), sample("b", (5.0, 12.0), video="v")]
    assert query_swap(overlapping, said(a=(0.0, 10.0), b=(5.0, 12.0))) is None
    third = sample("c", (18.0, 20.0), video="v")
    swap = query_swap([*overlapping, third], said(a=(0.0, 10.0), b=(5.0, 12.0), c=(18.0, 20.0)))
    assert swap is not None and swap.comparisons == 4 and swap.share == 100.0


# --- differences


def test_paired_difference_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    samples = [sample(str(i), (0.0, 10.0)) for i in range(80)]
    ends = {s.id: float(rng.uniform(1, 9)) for s in samples}
    before = said(**{i: (0.0, end) for i, end in ends.items()})
    after = said(**{i: (0.0, end + 0.5) for i, end in ends.items()})
    rise = paired_difference(samples, before, after)["mIoU"]
    assert rise.value == pytest.approx(5.0)
    assert rise.ci95 == pytest.approx((5.0, 5.0))
    low, high = known(evaluate(samples, before).ci95["mIoU"])
    assert high - low > 5


def test_metric_values_in_percent() -> None:
    assert metric_values([0.3, 0.69]).tolist() == [[100, 0, 0, 30], [100, 100, 0, 69]]


# --- printing


def printed(terminal: bool, width: int = 160) -> str:
    """A video of two queries, half right at first, and a video that is right from the start."""
    samples = [sample("a", (0.0, 10.0), source="x"), sample("b", (12.0, 18.0), video="a.mp4", source="x")]
    samples.append(sample("c", (0.0, 10.0), source="y"))
    before, after = said(a=(0.0, 5.0), c=(0.0, 10.0)), said(a=(0.0, 10.0), b=(12.0, 18.0), c=(0.0, 10.0))
    file = io.StringIO()
    print_metrics(
        {"base": evaluate(samples, before), "student": evaluate(samples, after)},
        constant=best_constant(samples),
        swaps={"student": query_swap(samples, after)},
        differences=paired_difference(samples, before, after),
        console=Console(file=file, force_terminal=terminal, width=width),
    )
    return file.getvalue()


def test_plain_lines_off_a_terminal() -> None:
    text = printed(terminal=False)
    assert "\x1b" not in text and "│" not in text
    assert "base: R@0.3 66.7 [50.0, 100.0]" in text
    assert "student: R@0.3 100.0 [100.0, 100.0]" in text
    assert "notes 1 missing" in text
    assert "\ny: R@0.3 100.0, R@0.5 100.0, R@0.7 100.0, mIoU 100.0, rows 1, notes one video" in text
    assert "rise: " in text and "mIoU +50.0 [+0.0, +75.0]" in text
    assert "best constant (" in text
    assert "query swap 100.0%" in text
    assert "protocol paper" in text


def test_a_table_on_a_terminal() -> None:
    assert "│" in printed(terminal=True)
    for width in range(20, 160, 7):
        text = printed(terminal=True, width=width)
        for figure in ("66.7", "[50.0,", "100.0]", "+50.0", "[+0.0,", "+75.0]"):
            assert "…" not in text and re.search(rf"(?<![\d.+]){re.escape(figure)}(?![\d.])", text), figure
    assert "│" in printed(terminal=True, width=90) and "│" not in printed(terminal=True, width=40)


def test_record_carries_its_controls() -> None:
    samples = [sample("a", (0.0, 10.0)), sample("b", (12.0, 18.0), video="a.mp4")]
    predictions = said(a=(0.0, 10.0), b=(12.0, 18.0))
    record = evaluation_record(
        evaluate(samples, predictions), best_constant(samples), query_swap(samples, predictions)
    )
    record = json.loads(json.dumps(record))
    assert record["query_swap"]["share"] == 100.0
    assert not math.isnan(record["best_constant"]["mIoU"])
    assert record["mIoU"] == 100.0
