"""Selects training rows by their scores: gate → rank → sample (section 3.2, appendix B). No torch.

The scores file holds all that the models were asked for (:mod:`video_opd.curriculum.scores`), so another
threshold, ranking or sampler costs seconds.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from video_opd.config import SelectionConfig
from video_opd.curriculum.gate import passes
from video_opd.curriculum.lazy import LazyTopK
from video_opd.curriculum.samplers import Selection, rank_value, select
from video_opd.curriculum.score_files import judged, read_scores
from video_opd.errors import UserError
from video_opd.files import need_another_file, relative_path
from video_opd.jsonl import read_jsonl, write_jsonl
from video_opd.temporal import annotated_spans, annotation_iou
from video_opd.types import Score, Strategy

HISTOGRAM_BINS = 20  # bins of δ over [−1, 1]


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """Rows of one source."""

    rows: int
    candidates: int
    selected: int


@dataclass(frozen=True, kw_only=True)
class AnnotationIou:
    """How right the annotations are: the mean IoU of annotated spans with the true ones, over the rows, the
    candidates and the selected rows that have both."""

    rows: float
    candidates: float | None  # None where there are no such rows
    selected: float | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts the rows of a data file. ``rows`` is the sum of the six exclusions and of ``candidates``."""

    strategy: Strategy
    rank_by: str
    k: int
    min_teacher_iou: float  # 0: no gate
    rows: int
    used_before: int  # rows that the caller excludes
    unannotated: int  # rows without spans, which the gate excludes: it cannot compare the teacher with them
    unscored: int  # rows that the scores file does not have
    not_asked: int  # rows that the teacher was not asked about, because they cannot be selected: lazy scores
    unmeasured: int  # rows whose score lacks a finite value that the gate or the ranking needs
    failed_gate: int
    candidates: int
    selected: int
    filled: int  # BBDS: rows selected in place of members that small buckets lack
    unknown_scores: int  # rows of the scores file that belong to no data row
    judged_again: int  # scored rows whose annotation is another one now: their IoUs are computed from it
    delta_before: tuple[int, ...]  # histogram of δ over all scored rows
    delta_after: tuple[int, ...]  # histogram of δ over the selected rows
    by_source: Mapping[str, SourceCount]
    annotation_iou: AnnotationIou | None  # None if no row has true spans, which only generated data have

    @property
    def shortfall(self) -> int:
        return self.k - self.selected

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shortfall": self.shortfall, "delta_edges": histogram_edges()}


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """The candidates of a data file, and how many of its other rows are excluded for which reason."""

    candidates: list[Score]
    used_before: int
    unannotated: int
    unscored: int
    not_asked: int
    unmeasured: int
    failed_gate: int


def select_file(
    data: str | Path,
    scores: str | Path,
    settings: SelectionConfig,
    *,
    seed: int = 0,
    fill: bool = True,
    exclude: Collection[str] = (),
    video_root: str | Path | None = None,
    out: str | Path | None = None,
) -> tuple[list[dict[str, Any]], Summary]:
    """Selects k rows of a data file by a scores file.

    Returns the selected data rows with a ``"tvdf"`` block, in rank order, and a summary; writes the rows to
    ``out`` if it is given. ``exclude`` are ids that may not be selected again; ``seed`` and ``fill`` are
    those of :func:`~video_opd.curriculum.samplers.select`. Raises :class:`UserError` for a mistake in the
    files, for scores without a reverse KL if that is to rank them, and for lazy scores
    (:mod:`~video_opd.curriculum.lazy_scores`) if the selection from full scores could be another one, and if
    ``out`` is one of the files.
    """
    if out is not None:
        need_another_file("out", out, [("data", data), ("scores", scores)])
    data_rows = _read_rows(data)
    scores_by_id, judged_again = _read_scores(scores, data_rows)
    ranks_by_kl = settings.strategy != "gaussian" and settings.rank_by == "reverse_kl"
    if ranks_by_kl and scores_by_id and all(score.reverse_kl is None for score in scores_by_id.values()):
        raise UserError(
            f"{scores}: no row has reverse_kl, which the rows are to be ranked by; "
            "score the pool with --reverse-kl, or rank by iou_gap"
        )
    pool = _pool(data_rows, scores_by_id, settings, frozenset(exclude), str(scores))
    selection = select(pool.candidates, settings, seed=seed, fill=fill)
    summary = _summarise(data_rows, scores_by_id, judged_again, pool, selection, settings)
    move = _Mover(Path(data), out, video_root)
    rows = [
        {**move(data_rows[identity]), "tvdf": _block(scores_by_id[identity], settings.strategy, rank)}
        for identity, rank in zip(selection.ids, selection.ranks, strict=True)
    ]
    if out is not None:
        write_jsonl(out, rows)
    return rows, summary


def _read_rows(path: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of a data file by id. Keys that a selection does not need are checked by training."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_jsonl(path):
        identity = row.get("id")
        if not isinstance(identity, str) or not isinstance(row.get("video"), str):
            raise UserError(f'{path}:{number}: a data row needs "id" and "video", both strings')
        if identity in rows:
            raise UserError(f"{path}:{number}: id {identity!r} is used before; ids must be unique")
        rows[identity] = row
    return rows


def _read_scores(
    path: str | Path, data_rows: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Score], int]:
    """The scores, judged by the annotations of the data as they are now, and how many of them changed."""
    changed = 0

    def judge(row: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal changed
        new = judged(row, annotated_spans(data_rows.get(row["id"], {})))
        changed += new != row
        return new

    return read_scores(path, judge), changed


def _pool(
    rows: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Score],
    settings: SelectionConfig,
    exclude: frozenset[str],
    path: str,
) -> _Pool:
    fresh = [identity for identity in rows if identity not in exclude]
    annotated = [identity for identity in fresh if rows[identity].get("spans") or not settings.gated]
    scored = [scores[identity] for identity in annotated if identity in scores]
    asked = scored
    if settings.gated or settings.strategy != "gaussian":  # which needs the student's part only
        asked = [score for score in scored if score.for_topk is None]
        _check_lazy(scored, settings, path)
    measured = [
        score
        for score in asked
        if math.isfinite(rank_value(score, settings))
        and not (settings.gated and math.isnan(score.teacher_iou))
    ]
    candidates = passes(measured, settings.min_teacher_iou)
    return _Pool(
        candidates=candidates,
        used_before=len(rows) - len(fresh),
        unannotated=len(fresh) - len(annotated),
        unscored=len(annotated) - len(scored),
        not_asked=len(scored) - len(asked),
        unmeasured=len(asked) - len(measured),
        failed_gate=len(measured) - len(candidates),
    )


def _check_lazy(scored: Sequence[Score], settings: SelectionConfig, path: str) -> None:
    """Raises :class:`UserError` if answers that the teacher was not asked for could change the selection."""
    not_asked = {score.id: score.for_topk for score in scored if score.for_topk is not None}
    if not not_asked:
        return
    made_for = next(iter(not_asked.values()))
    what = (
        f"{path}: the teacher was not asked about {len(not_asked)} rows, which cannot be among the first "
        f"{made_for.k} by iou_gap with min_teacher_iou {made_for.min_teacher_iou:g}"
    )
    for key, value, needed in (
        ("strategy", settings.strategy, "topk"),
        ("rank_by", settings.rank_by, "iou_gap"),
    ):
        if value != needed:
            raise UserError(f"{what}; {key} {value} needs the scores of all rows: score without --for-topk")
    lazy = LazyTopK({score.id: score.student_iou for score in scored}, settings.k, settings.min_teacher_iou)
    for score in scored:
        if score.for_topk is None:
            lazy.answer(score.id, score.teacher_iou)
    if left := len(not_asked.keys() & set(lazy.open_rows())):
        raise UserError(
            f"{what}; {left} of them could be among the first {settings.k} with min_teacher_iou "
            f"{settings.min_teacher_iou:g}: extend the file, video-opd score … --for-topk {settings.k} "
            f"--min-teacher-iou {settings.min_teacher_iou:g}"
        )


def _block(score: Score, strategy: Strategy, rank: int) -> dict[str, Any]:
    """The ``"tvdf"`` block of a selected row; a value that was not measured is null."""
    measured = {
        "delta": score.delta,
        "teacher_iou": score.teacher_iou,
        "student_iou": score.student_iou,
        "reverse_kl": score.reverse_kl,
    }
    return {
        **{key: None if value is None or math.isnan(value) else value for key, value in measured.items()},
        "strategy": strategy,
        "rank": rank,
    }


class _Mover:
    """Gives data rows as they were read, except that a video path which is relative to the data file is made
    relative to ``out``."""

    def __init__(self, data: Path, out: str | Path | None, video_root: str | Path | None) -> None:
        self.base = data.parent
        self.target = None if out is None else Path(out).parent
        same = self.target is None or self.target.resolve() == self.base.resolve()
        self.moves = not same and video_root is None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        row = dict(row)
        video = Path(row["video"])
        # A file that is not there was meant for a --video-root, so its path stays.
        if self.moves and not video.is_absolute() and os.path.exists(self.base / video):
            assert self.target is not None
            row["video"] = relative_path(self.base / video, self.target)
        return row


def _summarise(
    data_rows: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Score],
    judged_again: int,
    pool: _Pool,
    selection: Selection,
    settings: SelectionConfig,
) -> Summary:
    sources = {identity: str(row.get("source") or "none") for identity, row in data_rows.items()}
    rows = Counter(sources.values())
    candidates = Counter(sources[score.id] for score in pool.candidates)
    selected = Counter(sources[identity] for identity in selection.ids)
    return Summary(
        strategy=selection.strategy,
        rank_by="student_iou" if selection.strategy == "gaussian" else settings.rank_by,
        k=settings.k,
        min_teacher_iou=max(settings.min_teacher_iou, 0.0),
        rows=len(data_rows),
        used_before=pool.used_before,
        unannotated=pool.unannotated,
        unscored=pool.unscored,
        not_asked=pool.not_asked,
        unmeasured=pool.unmeasured,
        failed_gate=pool.failed_gate,
        candidates=len(pool.candidates),
        selected=len(selection.ids),
        filled=selection.filled,
        judged_again=judged_again,
        unknown_scores=sum(identity not in sources for identity in scores),
        delta_before=histogram(score.delta for identity, score in scores.items() if identity in sources),
        delta_after=histogram(scores[identity].delta for identity in selection.ids),
        by_source={
            source: SourceCount(rows=rows[source], candidates=candidates[source], selected=selected[source])
            for source in sorted(rows)
        },
        annotation_iou=_annotation_iou(data_rows, pool, selection),
    )


def _annotation_iou(
    data_rows: Mapping[str, Mapping[str, Any]], pool: _Pool, selection: Selection
) -> AnnotationIou | None:
    known = {id: value for id, row in data_rows.items() if (value := annotation_iou(row)) is not None}

    def mean(ids: Iterable[str]) -> float | None:
        values = [known[id] for id in ids if id in known]
        return statistics.fmean(values) if values else None

    rows = mean(known)
    if rows is None:
        return None
    candidates = mean(score.id for score in pool.candidates)
    return AnnotationIou(rows=rows, candidates=candidates, selected=mean(selection.ids))


def histogram_edges() -> list[float]:
    """The HISTOGRAM_BINS + 1 edges of δ's histogram. A bin holds its lower edge, and the last bin both."""
    return [round(-1 + 2 * i / HISTOGRAM_BINS, 10) for i in range(HISTOGRAM_BINS + 1)]


def histogram(deltas: Iterable[float]) -> tuple[int, ...]:
    """The number of δ in each bin. A δ that is NaN is left out."""
    counts = [0] * HISTOGRAM_BINS
    for delta in deltas:
        if not math.isnan(delta):
            # 0.3 = 0.8 − 0.5 may fall a rounding step short of its bin.
            counts[min(int((delta + 1) / 2 * HISTOGRAM_BINS + 1e-9), HISTOGRAM_BINS - 1)] += 1
    return tuple(counts)


@dataclass(frozen=True, kw_only=True)
class ThresholdRow:
    """The scores that a gate at ``min_teacher_iou`` would leave. It helps to choose a threshold and k."""

    min_teacher_iou: float
    passed: int
    mean_delta: float  # mean δ of the scores that pass; NaN if none does
    positive: int  # scores that pass with δ > 0: the student can learn something
    kth_delta: float  # the k-th largest δ of those that pass; NaN if there are fewer

    def to_json(self) -> dict[str, float | None]:
        return {key: None if math.isnan(value) else value for key, value in asdict(self).items()}


def explain_file(data: str | Path, scores: str | Path, k: int) -> list[ThresholdRow]:
    """:func:`explain` for the annotated rows of a data file.

    Raises :class:`UserError` for wrong files, and for lazy scores, which do not say what a gate would leave.
    """
    rows = _read_rows(data)
    known, _ = _read_scores(scores, rows)
    if not_asked := sum(score.for_topk is not None for score in known.values()):
        raise UserError(
            f"{scores}: the teacher was not asked about {not_asked} rows, and what a gate leaves depends on "
            "all of them: score without --for-topk"
        )
    return explain((known[i] for i, row in rows.items() if i in known and row.get("spans")), k)


def explain(scores: Iterable[Score], k: int) -> list[ThresholdRow]:
    """A row for each of the thresholds 0.0, 0.1 … 0.9, over the scores with a finite δ."""
    measured = [score for score in scores if math.isfinite(score.delta)]
    table = []
    for tenth in range(10):
        passed = sorted((score.delta for score in passes(measured, tenth / 10)), reverse=True)
        table.append(
            ThresholdRow(
                min_teacher_iou=tenth / 10,
                passed=len(passed),
                mean_delta=sum(passed) / len(passed) if passed else math.nan,
                positive=sum(delta > 0 for delta in passed),
                kth_delta=passed[k - 1] if len(passed) >= k else math.nan,
            )
        )
    return table
