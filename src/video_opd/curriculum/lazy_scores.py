"""Scores for a top-k selection by δ: the teacher answers only rows that can still be selected.

    student: all rows → OUT.student        (then the student is freed)
    teacher: (next rows → OUT.teacher)*    (:mod:`video_opd.curriculum.lazy` says which, and when to stop)
    both → OUT

``OUT`` is a scores file as ``video-opd score`` writes it. A row that the teacher was not asked about has none
of the teacher's keys, and ``for_topk`` names the selection that it cannot enter. The scoring of student and
teacher continues after a kill.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.curriculum.lazy import LazyTopK
from video_opd.curriculum.score_files import judged
from video_opd.curriculum.scores import (
    TEACHER_KEYS,
    TEACHER_PROVENANCE,
    ScoreResult,
    ScoreSettings,
    full_provenance,
    known_teacher_scores,
    score,
    scores_of,
)
from video_opd.errors import UserError
from video_opd.evaluation.batching import BLOCK_BATCHES, Item, MakeLoader
from video_opd.evaluation.output import Output, append_blocks
from video_opd.evaluation.predict import generate_responses, samples_without_rows, use_together
from video_opd.evaluation.resume import (
    known_rows,
    merge_process_files,
    process_file_paths,
    read_provenance,
    read_rows,
    remove_output,
    write_provenance,
)
from video_opd.jsonl import write_jsonl
from video_opd.locks import locked_file
from video_opd.processes import Processes
from video_opd.progress import log, task
from video_opd.seals import Sealer
from video_opd.types import ForTopK, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy

FOR_TOPK = "for_topk"
STAGES = 32  # a stage has at least k / 32 rows, so that there are few stages

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class TopKScoreResult(ScoreResult):
    """Counts the rows of the teacher's part, too. ``answered`` rows have it, and ``needed`` of them had to be
    answered: the others were asked with them, or come from earlier files."""

    answered: int
    needed: int


def score_for_topk(
    student: AbstractContextManager[Policy],
    teacher: AbstractContextManager[Policy],
    samples: Sequence[Sample],
    make_loader: MakeLoader,
    out: str | Path,
    *,
    for_topk: ForTopK,
    provenance: Mapping[str, Any],
    settings: ScoreSettings | None = None,
    batch_size: int = 8,
    teacher_from: Sequence[str | Path] = (),
    overwrite: bool = False,
    repeatable: bool = False,
    processes: Processes | None = None,
) -> TopKScoreResult:
    """Writes a scores file from which ``for_topk`` selects exactly what it would select from full scores.

    The block of ``student`` ends before that of ``teacher`` begins, so one model is in memory at a time. The
    teacher answers at once all queries on a video that are expected to be needed. The rows that it is asked
    about do not depend on the number of ``processes``. If ``out`` is there for another k or gate, it is
    extended, and its rows keep what they have. The other arguments are those of
    :func:`~video_opd.curriculum.scores.score`. Raises :class:`UserError` as that does, and for the reverse
    KL, which asks the teacher about every row.
    """
    settings, processes = settings or ScoreSettings(), processes or Processes()
    if settings.reverse_kl:
        raise UserError(
            "the reverse KL asks the teacher about every row, which is not lazy: leave out either"
        )
    provenance = {**full_provenance(provenance, settings), FOR_TOPK: asdict(for_topk)}
    parts = {role: Path(f"{out}.{role}") for role in ("student", "teacher")}
    wanted = [sample for sample in samples if sample.spans]
    more: dict[str, Any] = {"repeatable": repeatable, "processes": processes}
    with locked_file(out, processes):
        before = _judged(_open(out, provenance, parts.values(), overwrite=overwrite, **more), wanted)
        todo = samples_without_rows(wanted, before, out)
        first = {key: provenance[key] for key in provenance if key not in _OF_TEACHER_ONLY}
        more |= {"settings": settings, "batch_size": batch_size}
        with student as policy:
            scored = score(policy, None, todo, make_loader, parts["student"], provenance=first, **more)
        rows = before | _judged(read_rows(parts["student"]), wanted)
        pool = [sample for sample in wanted if sample.id in rows]
        reused = known_teacher_scores(teacher_from, provenance, pool)
        own = {row: _teacher_part(keys) for row, keys in before.items() if "teacher_iou" in keys}
        lazy = _lazy(rows, pool, reused | own, for_topk)
        second = {key: provenance[key] for key in TEACHER_PROVENANCE if key in provenance}
        output = Output(parts["teacher"], second, repeatable=repeatable, processes=processes)
        samples_without_rows(pool, output.rows, output.path)
        with teacher as policy:
            _ask(policy, lazy, pool, make_loader, output, settings, batch_size)
        output.finish(pool)
        answered_now = _judged(read_rows(parts["teacher"]), wanted)
        merged = _merge(pool, rows, reused | own | answered_now, lazy, for_topk)

        def write() -> None:
            if scored.scored or output.ids or not Path(out).exists():
                others = {row: keys for row, keys in before.items() if row not in merged}
                write_provenance(out, provenance, None)  # after a kill, neither file is damaged
                write_jsonl(out, [*merged.values(), *others.values()])
                write_provenance(out, provenance, Sealer(out).seal())
            for path in parts.values():
                remove_output(path)

        processes.wait()  # until all have read the files of the two passes
        processes.on_first(write)
    answered = sum("teacher_iou" in row for row in merged.values())
    log(
        f"{out}: the teacher has answered {answered} of {len(pool)} rows ({lazy.needed()} had to be); no "
        f"other row can be among the first {for_topk.k}"
    )
    return TopKScoreResult(
        kept=len(wanted) - len(todo) + scored.kept,
        scored=scored.scored,
        failed=scored.failed,
        unannotated=len(samples) - len(wanted),
        reused=len(reused),
        answered=answered,
        needed=lazy.needed(),
    )


def _judged(rows: Mapping[str, Mapping[str, Any]], samples: Sequence[Sample]) -> Rows:
    """Rows of a scores file with the IoUs that the present annotations give them."""
    spans = {sample.id: sample.spans for sample in samples}
    return {row: judged(keys, spans.get(row, ())) for row, keys in rows.items()}


def _lazy(student: Rows, pool: Sequence[Sample], teacher: Rows, for_topk: ForTopK) -> LazyTopK:
    """The state of the selection, with the answers that are known before the teacher is loaded."""
    ious = {sample.id: _iou(student[sample.id], "student_iou") for sample in pool}
    lazy = LazyTopK(ious, for_topk.k, for_topk.min_teacher_iou)
    for row in teacher.keys() & ious.keys():
        lazy.answer(row, _iou(teacher[row], "teacher_iou"))
    return lazy


def _open(
    out: str | Path,
    provenance: Mapping[str, Any],
    parts: Iterable[Path],
    *,
    overwrite: bool,
    repeatable: bool,
    processes: Processes,
) -> Rows:
    """The rows of ``out``, which may be those of another k or gate, or full scores."""

    def open_again() -> Rows:
        if overwrite:
            for path in (Path(out), *parts):
                remove_output(path)
        rows = known_rows(out, provenance, repeatable=repeatable, ignored=(FOR_TOPK,))
        if process_file_paths(out):  # full scores of several processes that were killed
            merge_process_files(out, list(rows), read_provenance(out))
        return rows

    return processes.on_first(open_again)


def _ask(
    teacher: Policy,
    lazy: LazyTopK,
    pool: Sequence[Sample],
    make_loader: MakeLoader,
    output: Output,
    settings: ScoreSettings,
    batch_size: int,
) -> None:
    """Lets the teacher answer, stage by stage, until no row is open.

    A stage is a function of the answers before it, so a killed pass comes to the same stages again, and finds
    their answers in ``output``.
    """
    processes = output.processes
    samples = {sample.id: sample for sample in pool}
    video_of = {sample.id: str(sample.video) for sample in pool}
    at_least = max(BLOCK_BATCHES * batch_size, lazy.k // STAGES)
    found = {row: _iou(keys, "teacher_iou") for row, keys in _judged(output.rows, pool).items()}
    mine: dict[str, float] = {}  # this process's answers of a stage

    def rows_of(batch: Sequence[Item]) -> list[dict[str, Any]]:
        prompts = [prompt for _, prompt in batch]
        groups = generate_responses(
            teacher, prompts, settings.teacher, "score teacher", teacher.prefill(prompts)
        )
        rows = [
            {"id": sample.id, "query": sample.query} | scores_of("teacher", sample, group, settings)
            for (sample, _), group in zip(batch, groups, strict=True)
        ]
        mine.update((row["id"], row["teacher_iou"]) for row in rows)
        return rows

    with task("teacher answering", None) as bar:
        while stage := lazy.next_rows(at_least, video_of):
            open_rows = lazy.open_rows()
            known, closed = len(lazy.answers), len(pool) - len(lazy.answers) - len(open_rows)
            left = sum(row not in found for row in open_rows[: lazy.expected(open_rows)])
            bar.total = bar.done + math.ceil(max(left, len(stage)) / processes.count)
            note = f"{known:,} of {len(pool):,} rows answered, {closed:,} cannot matter any more"
            mine.clear()
            share = output.share([samples[row] for row in stage])
            answer = partial(append_blocks, output, share, make_loader, batch_size, rows_of)
            asked = any(row not in found for row in stage)
            use_together(teacher if asked else None, partial(answer, partial(bar.advance, note=note)))
            for answers in processes.gather(dict(mine)):
                found |= answers
            for row in stage:  # a row whose video failed has no answer
                lazy.answer(row, found.get(row, math.nan))
        bar.total = bar.done
        bar.advance(0)


def _merge(pool: Sequence[Sample], student: Rows, teacher: Rows, lazy: LazyTopK, for_topk: ForTopK) -> Rows:
    """The rows of the scores file, in the order of the data."""
    merged: Rows = {}
    for sample in pool:
        row = {key: student[sample.id][key] for key in student[sample.id] if key not in _OF_TEACHER}
        question = {key: row.pop(key) for key in ("id", "query")}
        answered = _teacher_part(teacher[sample.id]) if sample.id in teacher else {}
        asked = answered or sample.id in lazy.answers
        merged[sample.id] = question | answered | row | ({} if asked else {FOR_TOPK: asdict(for_topk)})
    return merged


_OF_TEACHER = (*TEACHER_KEYS, FOR_TOPK)  # keys of a row
_OF_TEACHER_ONLY = {FOR_TOPK, *TEACHER_PROVENANCE} - {"input"}  # of the provenance


def _teacher_part(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in TEACHER_KEYS}


def _iou(row: Mapping[str, Any], key: str) -> float:
    return math.nan if row[key] is None else float(row[key])
