"""Which rows the teacher must answer so that the first k by δ are known: exact lazy TVDF. No torch.

δ = τ − σ ≤ 1 − σ (eq 12), because an IoU is at most 1. The student has answered all rows, so the *best key*
of a row is known: its place in the order of eq 13 if the teacher were always right. The teacher answers rows
in ascending order of their best keys, which is ascending σ with ties by id, until k known candidates stand
before the best key of every row that is left. Such a row stands behind its best key at best, and other
answers only add candidates, so it is not among the first k. Keys end in the id, so no two are equal, and a
row that could only tie with the k-th is answered if its id would win.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence

from video_opd.curriculum.gate import passes
from video_opd.types import MIN_TEACHER_IOU, Score

_Key = tuple[float, str]  # (−δ, id): ascending keys are eq 13's order

ESTIMATE_FROM = 256  # of the teacher's IoUs, evenly spaced in their order
BISECTIONS = 24  # of [−1, 1]: finds a δ to 1e-7


class LazyTopK:
    """The rows that can still be among the first ``k``, while the teacher answers one after another.

    ``student_ious`` has σ of every row of the pool by id, NaN where it was not measured. A row is a candidate
    under the same conditions as in :func:`video_opd.curriculum.tvdf.select_file`: σ and τ are finite, and τ
    passes the gate. If no row is open, the first ``k`` of the answered candidates are the first ``k`` of all.

    Example::

        lazy = LazyTopK({"a": 0.1, "b": 0.0, "c": 0.9}, k=1)
        lazy.open_rows()        # ["b", "a", "c"]
        lazy.answer("b", 0.75)  # δ = 0.75, and "a" can reach 0.9
        lazy.open_rows()        # ["a"]
    """

    def __init__(
        self, student_ious: Mapping[str, float], k: int, min_teacher_iou: float = MIN_TEACHER_IOU
    ) -> None:
        assert k >= 1
        self.k, self.min_teacher_iou = k, min_teacher_iou
        self.student_ious = {row: iou for row, iou in student_ious.items() if math.isfinite(iou)}
        self.best_keys: dict[str, _Key] = {row: (iou - 1.0, row) for row, iou in self.student_ious.items()}
        self.order = sorted(self.best_keys, key=self.best_keys.__getitem__)
        self.answers: dict[str, float] = {}  # τ by id; NaN: asked, but not measured
        self._first: list[_Key] = []  # of the known candidates, k at most
        self._answered_ious: list[float] = []  # ascending

    def answer(self, row: str, teacher_iou: float) -> None:
        """Takes the teacher's mean IoU of a row, or NaN if it could not be measured."""
        assert row not in self.answers, f"{row} was answered before"
        self.answers[row] = teacher_iou
        if row not in self.best_keys or not math.isfinite(teacher_iou):
            return
        insort(self._answered_ious, teacher_iou)
        score = Score(id=row, teacher_iou=teacher_iou, student_iou=self.student_ious[row])
        if passes([score], self.min_teacher_iou):
            insort(self._first, (-score.delta, row))
            del self._first[self.k :]

    @property
    def limit(self) -> _Key | None:
        """The key of the k-th known candidate: a row enters with a smaller one. None: there are fewer."""
        return self._first[-1] if len(self._first) == self.k else None

    def open_rows(self) -> list[str]:
        """The rows without an answer that can still be among the first k, in ascending order of best keys.

        They come before all other rows without an answer.
        """
        limit = self.limit
        inside = self.order if limit is None else self.order[: self._position(limit)]
        return [row for row in inside if row not in self.answers]

    def needed(self) -> int:
        """How many rows have to be answered, asked one by one in order, before no row is open.

        It holds once no row is open. These are the rows whose best key is not behind the k-th key, and no
        other order would do with fewer: with the other answers as they are, such a row is among the first k
        if the teacher is right there, and it is not if the teacher fails the gate or has no answer.
        """
        limit = self.limit
        if limit is None:
            return len(self.order)
        return self._position(limit) + (self.best_keys[limit[1]] == limit)

    def certain(self, open_rows: Sequence[str]) -> int:
        """How many of the first open rows have to be answered, whatever the answers to the others are."""
        for position, row in enumerate(open_rows):
            if bisect_left(self._first, self.best_keys[row]) + position >= self.k:
                return position
        return len(open_rows)

    def expected(self, open_rows: Sequence[str]) -> int:
        """About how many of the first open rows will have to be answered: an estimate.

        It supposes that the teacher's IoU of an open row is drawn from those that are known, or from the
        student's as long as none is.
        """
        if not open_rows:
            return 0
        known_ious = self._answered_ious or sorted(self.student_ious.values())
        step = max(1, len(known_ious) // ESTIMATE_FROM)
        sample = known_ious[step // 2 :: step]
        passing = [iou for iou in sample if self.min_teacher_iou <= 0 or iou >= self.min_teacher_iou]
        ious = [self.student_ious[row] for row in open_rows]  # ascending

        def candidates(delta: float) -> float:
            known = bisect_right(self._first, -delta, key=lambda key: key[0])
            return known + sum(bisect_right(ious, iou - delta) for iou in passing) / len(sample)

        low, high = -1.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if candidates(middle) >= self.k else (low, middle)
        return bisect_right(ious, 1.0 - low)

    def next_rows(self, at_least: int, video_of: Mapping[str, str]) -> list[str]:
        """The rows that the teacher answers next, in ascending order of best keys. None is left: it may stop.

        First come open rows that certainly need an answer, at most as many as have been answered so far; at
        least ``at_least`` open rows are taken. Then come open rows on the same videos that are expected to be
        needed later, so that a video is prefilled once. The result depends on the answers alone.
        """
        open_rows = self.open_rows()
        size = max(at_least, min(self.certain(open_rows), len(self.answers)))
        videos = {video_of[row] for row in open_rows[:size]}
        likely = open_rows[size : self.expected(open_rows)]
        return open_rows[:size] + [row for row in likely if video_of[row] in videos]

    def _position(self, key: _Key) -> int:
        """How many rows have a best key before ``key``."""
        return bisect_left(self.order, key, key=self.best_keys.__getitem__)
