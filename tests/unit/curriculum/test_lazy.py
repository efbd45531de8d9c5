"""Lazy TVDF against full scores: the same selection, and never a row more than any order needs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest

from video_opd.config import SelectionConfig
from video_opd.curriculum.gate import passes
from video_opd.curriculum.lazy import LazyTopK
from video_opd.curriculum.samplers import Selection, select
from video_opd.types import Score

NAN = math.nan
SETS = 300


def random_scores(draws: random.Random) -> list[Score]:
    """Many ties, rows that were not measured, students that are better than the teacher."""
    count = draws.choice([0, 1, 2, 5, 12, 40])
    grid = draws.choice([[0.0, 0.5, 1.0], [n / 4 for n in range(5)], [n / 7 for n in range(8)], None])

    def value(missing: float) -> float:
        if draws.random() < missing:
            return NAN
        return draws.random() if grid is None else draws.choice(grid)

    share = draws.choice([0.0, 0.3])
    ids = [f"r{n}" for n in range(count)]  # "r10" comes before "r2"
    draws.shuffle(ids)
    return [Score(id=row, teacher_iou=value(share), student_iou=value(share / 2)) for row in ids]


def full(scores: list[Score], k: int, gate: float) -> Selection:
    return select(passes(scores, gate), SelectionConfig(k=k, min_teacher_iou=gate))


def open_topk(scores: list[Score], k: int, gate: float) -> LazyTopK:
    return LazyTopK({score.id: score.student_iou for score in scores}, k, gate)


def ask(lazy: LazyTopK, scores: list[Score], choose: Callable[[], list[str]]) -> list[str]:
    """The rows that the teacher was asked about until none was chosen."""
    teacher = {score.id: score.teacher_iou for score in scores}
    asked: list[str] = []
    while rows := choose():
        assert set(rows) <= set(lazy.open_rows())
        for row in rows:
            lazy.answer(row, teacher[row])
        asked += rows
    assert not lazy.open_rows()
    return asked


def known(scores: list[Score], asked: list[str]) -> list[Score]:
    """The scores with the teacher's part of the rows that were asked only."""
    return [
        s if s.id in asked else Score(id=s.id, teacher_iou=NAN, student_iou=s.student_iou) for s in scores
    ]


def videos(scores: list[Score]) -> Mapping[str, str]:
    return {score.id: str(int(score.id[1:]) % 5) for score in scores}


@pytest.mark.parametrize("seed", range(SETS))
def test_the_selection_is_that_of_full_scores(seed: int) -> None:
    draws = random.Random(seed)
    scores = random_scores(draws)
    k = draws.choice([1, 2, 3, 8, 50])
    gate = draws.choice([0.0, 0.25, 0.5, 1.0])
    expected = full(scores, k, gate)

    # One by one: no order needs fewer.
    lazy = open_topk(scores, k, gate)
    one_by_one = ask(lazy, scores, lambda: lazy.open_rows()[:1])
    found = full(known(scores, one_by_one), k, gate)
    assert (found.ids, found.ranks) == (expected.ids, expected.ranks)
    assert len(one_by_one) == lazy.needed() <= len(lazy.student_ious)
    for row in one_by_one:
        chosen = [
            row in full([s if s.id != row else other for s in scores], k, gate).ids
            for other in (
                Score(id=row, teacher_iou=1.0, student_iou=lazy.student_ious[row]),
                Score(id=row, teacher_iou=NAN, student_iou=lazy.student_ious[row]),
            )
        ]
        assert chosen == [True, False]  # so without the answer nobody knows

    # In batches that keep videos together: at least these rows, and still the same selection.
    lazy, at_least = open_topk(scores, k, gate), draws.choice([1, 3, 16])
    asked = ask(lazy, scores, lambda: lazy.next_rows(at_least, videos(scores)))
    found = full(known(scores, asked), k, gate)
    assert (found.ids, found.ranks) == (expected.ids, expected.ranks)
    assert set(one_by_one) <= set(asked) and lazy.needed() == len(one_by_one)

    # Rows that an earlier round knows need not be asked, and none of them is asked again.
    lazy = open_topk(scores, k, gate)
    before = draws.sample(scores, len(scores) // 3)
    for score in before:
        lazy.answer(score.id, score.teacher_iou)
    asked = ask(lazy, scores, lambda: lazy.open_rows()[:1])
    found = full(known(scores, asked + [score.id for score in before]), k, gate)
    assert (found.ids, found.ranks) == (expected.ids, expected.ranks)
    assert set(asked) == set(one_by_one) - {score.id for score in before}


@pytest.mark.parametrize("seed", range(40))
def test_certain_rows_are_needed_whatever_the_others_answer(seed: int) -> None:
    draws = random.Random(seed)
    scores = random_scores(draws)
    k = draws.choice([1, 3, 8])
    lazy = open_topk(scores, k, 0.25)
    for score in scores[: len(scores) // 2]:
        lazy.answer(score.id, score.teacher_iou)
    open_rows = lazy.open_rows()
    certain = lazy.certain(open_rows)
    assert certain or not open_rows
    for _ in range(20):
        others = {row: draws.choice([NAN, 0.0, 0.3, 0.7, 1.0]) for row in open_rows}
        answers = [
            Score(id=s.id, teacher_iou=others.get(s.id, s.teacher_iou), student_iou=s.student_iou)
            for s in scores
        ]
        again = open_topk(answers, k, 0.25)
        for score in answers[: len(answers) // 2]:
            again.answer(score.id, score.teacher_iou)
        asked = ask(again, answers, lambda lazy=again: lazy.open_rows()[:1])  # type: ignore[misc]
        assert asked[:certain] == open_rows[:certain]
    if certain < len(open_rows):  # and one more is not certain: the teacher may be right on all before it
        lazy = open_topk(scores, k, 0.25)
        for score in scores[: len(scores) // 2]:
            lazy.answer(score.id, score.teacher_iou)
        for row in open_rows[:certain]:
            lazy.answer(row, 1.0)
        assert open_rows[certain] not in lazy.open_rows()


def test_a_row_that_could_only_tie_is_asked_if_its_id_would_win() -> None:
    lazy = LazyTopK({"b": 0.0, "a": 0.25, "c": 0.25}, k=1)
    assert lazy.open_rows() == ["b", "a", "c"]
    lazy.answer("b", 0.75)
    assert lazy.open_rows() == ["a"]  # "c" would stand behind "b" at the same δ
    lazy.answer("a", 1.0)
    assert lazy.limit == (-0.75, "a") and not lazy.open_rows() and lazy.needed() == 2


def test_students_that_differ_by_less_than_rounding_are_ordered_as_their_deltas_are() -> None:
    """1 − σ is the same number for both, so the ids decide, though σ differ."""
    lazy = LazyTopK({"b": 0.0, "a": 1e-20}, k=1, min_teacher_iou=0.0)
    assert lazy.open_rows() == ["a", "b"]
    lazy.answer("a", 1.0)
    assert not lazy.open_rows()


def test_the_gate_and_missing_answers_leave_rows_open() -> None:
    lazy = LazyTopK({f"{n}": n / 10 for n in range(6)} | {"x": NAN}, k=2)
    for row, iou in (("0", 0.4), ("1", NAN), ("2", 0.9)):
        lazy.answer(row, iou)
    assert lazy.limit is None and lazy.open_rows() == ["3", "4", "5"]  # one candidate; "x" cannot be one
    lazy.answer("3", 0.8)
    assert lazy.open_rows() == ["4"]  # "5" could only tie with "3"
    lazy.answer("4", 0.5)
    assert not lazy.open_rows() and lazy.needed() == 5
    # Without a gate the first row counts, at δ = 0.4.
    lazy = LazyTopK({f"{n}": n / 10 for n in range(6)}, k=1, min_teacher_iou=0.0)
    lazy.answer("0", 0.4)
    assert lazy.open_rows() == ["1", "2", "3", "4", "5"]


def test_a_video_is_opened_once_for_the_rows_that_will_be_needed() -> None:
    """4,000 rows on 1,000 videos, k/n of 2.6%: few rows more than needed, few videos twice."""
    draws = random.Random(0)
    scores = [
        Score(id=f"r{n}", teacher_iou=draws.betavariate(4, 2), student_iou=draws.betavariate(1.5, 1.5))
        for n in range(4000)
    ]
    video_of = {score.id: str(int(score.id[1:]) // 4) for score in scores}
    lazy = open_topk(scores, 104, 0.5)
    batches: list[list[str]] = []

    def choose() -> list[str]:
        batches.append(lazy.next_rows(32, video_of))
        return batches[-1]

    asked = ask(lazy, scores, choose)
    needed = lazy.needed()
    opened = sum(len({video_of[row] for row in batch}) for batch in batches)
    necessary = len({video_of[row] for row in lazy.order[:needed]})
    assert needed < 0.25 * len(scores)
    assert needed <= len(asked) < 1.3 * needed
    assert opened < 1.1 * necessary
    # Opened row by row, it would be more videos than there are.
    assert necessary < 0.9 * needed


def test_the_estimate_of_what_is_left() -> None:
    draws = random.Random(1)
    scores = [Score(id=f"r{n}", teacher_iou=draws.random(), student_iou=draws.random()) for n in range(5000)]
    lazy = open_topk(scores, 100, 0.5)
    teacher = {score.id: score.teacher_iou for score in scores}
    estimates = [lazy.expected(lazy.open_rows())]  # nothing is known: the teacher may be like the student
    for row in lazy.open_rows()[:200]:
        lazy.answer(row, teacher[row])
    estimates.append(200 + lazy.expected(lazy.open_rows()))
    ask(lazy, scores, lambda: lazy.open_rows()[:1])
    assert estimates == pytest.approx([lazy.needed()] * 2, rel=0.2)
    assert lazy.expected([]) == 0
