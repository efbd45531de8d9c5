"""What TVDF needs to know of every candidate: how well the teacher and the student do on it.

For each row the teacher's k predictions and the student's, their mean IoU with the annotation (τ and σ of
appendix B; unparsable counts 0), and on request the reverse KL of the student's rollouts under the teacher
(section 3.2). Answers are kept as text: another threshold, ranking or parser needs no model. Rows are
appended as they are finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.errors import UserError
from video_opd.evaluation.batching import Item, MakeLoader, windows_of_batches
from video_opd.evaluation.output import Output
from video_opd.evaluation.predict import GenerationSettings, generate_responses, samples_without_rows
from video_opd.evaluation.resume import read_provenance
from video_opd.jsonl import read_jsonl
from video_opd.processes import Processes
from video_opd.progress import log, task
from video_opd.temporal import best_iou, parse_answer
from video_opd.types import Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy

K = 4  # predictions a model and sample; the paper leaves it open
TEACHER_KEYS = ("teacher_iou", "teacher_spans", "teacher_rules", "teacher_responses")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How candidates are scored. ``temperature`` 0 is greedy, with k = 1.

    ``reverse_kl`` also scores the student's answers with the teacher; rows without annotation are then
    scored, too, with IoUs that are null.
    """

    k: int = K  # answers of the teacher
    student_k: int | None = None  # answers of the student; none: k
    temperature: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    thinking: bool = False
    reverse_kl: bool = False

    @property
    def teacher(self) -> GenerationSettings:
        return self._answers(self.k)

    @property
    def student(self) -> GenerationSettings:
        return self._answers(self.k if self.student_k is None else self.student_k)

    def _answers(self, n: int) -> GenerationSettings:
        return GenerationSettings(
            n=n,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            thinking=self.thinking,
        )


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Rows of the data file, of all processes together: ``kept`` from before, ``scored`` now, ``failed``
    because of their video, ``unannotated`` and left out; ``reused`` of the scored ones had the teacher's part
    from another file."""

    kept: int
    scored: int
    failed: int
    unannotated: int
    reused: int


def score(
    student: Policy,
    teacher: Policy | None,
    samples: Sequence[Sample],
    make_loader: MakeLoader,
    out: str | Path,
    *,
    provenance: Mapping[str, Any],
    settings: ScoreSettings | None = None,
    batch_size: int = 8,
    teacher_from: str | Path | None = None,
    overwrite: bool = False,
    repeatable: bool = False,
    processes: Processes | None = None,
) -> ScoreResult:
    """Appends a row of the scores file for every sample that has none.

    Without a ``teacher`` only the student responds: all that GRPO's choice by difficulty needs (D.1).
    ``provenance`` has the fingerprints of ``"student"`` and ``"teacher"``, the precision of each
    (``"student_dtype"``), and ``"input"``: prompt and video budget. ``teacher_from`` is an earlier scores
    file: the teacher's part of its rows is taken over if the same teacher made them from the same input and
    settings. ``repeatable``: a killed output ends with the same bytes as another
    (:class:`~video_opd.evaluation.output.Output`). Several ``processes`` divide the videos among themselves.
    Raises :class:`UserError` where another teacher made the rows of ``teacher_from``, and where something
    else made the rows of ``out``.
    """
    settings = settings or ScoreSettings()
    if teacher is None and (settings.reverse_kl or teacher_from is not None):
        raise UserError("scores without a teacher have no reverse KL and no teacher's part: name the teacher")
    # Checked now, not after the first video; and what the two parts of a row depend on.
    provenance = {
        **provenance,
        "teacher_answers": asdict(settings.teacher),
        "student_answers": asdict(settings.student),
        "reverse_kl": settings.reverse_kl,
    }
    output = Output(out, provenance, overwrite=overwrite, repeatable=repeatable, processes=processes)
    wanted = [sample for sample in samples if sample.spans or settings.reverse_kl]
    todo = samples_without_rows(wanted, output.rows, out)
    known = {} if teacher_from is None else _teacher_rows(teacher_from, provenance, todo)
    kept = len(wanted) - len(todo)
    reuse = f", the teacher's part of {len(known)} is reused" if known else ""
    log(f"{out}: {kept} of {len(wanted)} rows are there, {len(todo)} to score{reuse}")
    mine = output.processes.share(todo)
    with task("scoring", len(mine)) as bar:
        for window in windows_of_batches(make_loader(mine) if mine else (), batch_size):
            for batch in window:
                output.append(_score_batch(student, teacher, batch, settings, known))
                bar.advance(len(batch))
            output.end_window()
    output.finish(samples)
    scored = [sample for sample in todo if sample.id in output.ids]
    return ScoreResult(
        kept=kept,
        scored=len(scored),
        failed=len(todo) - len(scored),
        unannotated=len(samples) - len(wanted),
        reused=sum(sample.id in known for sample in scored),
    )


def _score_batch(
    student: Policy,
    teacher: Policy | None,
    batch: Sequence[Item],
    settings: ScoreSettings,
    known: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of a batch. Each model reads the prompts once, and one model's keys and values are held at a
    time."""
    prompts = [prompt for _, prompt in batch]
    prefix = student.prefill(prompts)
    written = generate_responses(student, prompts, settings.student, "score student", prefix)
    responses = [[rollout.token_ids for rollout in rollouts] for rollouts in written]
    flat = [rollout for rollouts in written for rollout in rollouts]
    own_BT: list[Sequence[float]] = [rollout.recorded for rollout in flat]
    # At other temperatures what was recorded is not the model's own distribution.
    if settings.reverse_kl and settings.temperature not in (0.0, 1.0):
        own_BT = student.logprobs(prefix, responses).logprobs_BT.tolist()
    del prefix

    parts = {sample.id: known[sample.id] for sample, _ in batch if sample.id in known}
    unknown = [i for i, (sample, _) in enumerate(batch) if sample.id not in known]
    asked = list(range(len(batch))) if settings.reverse_kl else unknown
    gaps: list[dict[str, Any]] = [{} for _ in batch]
    if teacher is not None and asked:
        prefix = teacher.prefill([prompts[i] for i in asked])
        if unknown:
            part = prefix if len(unknown) == len(asked) else prefix.select(unknown)
            asked_now = [prompts[i] for i in unknown]
            taught = generate_responses(teacher, asked_now, settings.teacher, "score teacher", part)
            for i, rollouts in zip(unknown, taught, strict=True):
                parts[batch[i][0].id] = _part("teacher", batch[i][0], rollouts, settings)
        if settings.reverse_kl:
            taught_BT = teacher.logprobs(prefix, responses).logprobs_BT.tolist()
            gaps = _reverse_kl(own_BT, taught_BT, written)
    return [
        {"id": sample.id, "query": sample.query}
        | parts.get(sample.id, {})
        | _part("student", sample, rollouts, settings)
        | gap
        for (sample, _), rollouts, gap in zip(batch, written, gaps, strict=True)
    ]


def _part(who: str, sample: Sample, rollouts: Sequence[Rollout], settings: ScoreSettings) -> dict[str, Any]:
    parsed = [parse_answer(rollout.text, thinking=settings.thinking) for rollout in rollouts]
    ious = [best_iou(answer.span, sample.spans) for answer in parsed]
    return {
        f"{who}_iou": fsum(ious) / len(ious) if sample.spans else None,
        f"{who}_spans": [answer.span for answer in parsed],
        f"{who}_rules": [answer.rule for answer in parsed],
        f"{who}_responses": [rollout.text for rollout in rollouts],
    }


def _reverse_kl(
    own_BT: Sequence[Sequence[float]],
    taught_BT: Sequence[Sequence[float]],
    written: Sequence[Sequence[Rollout]],
) -> list[dict[str, Any]]:
    """log π_θ − log π_tea on the student's tokens, in nats (the sampled reverse KL, −r_t of eq 5).

    ``reverse_kl`` is its mean over all tokens of a row, ``reverse_kl_sum`` the mean over the answers of its
    sum over an answer's tokens.
    """
    flat = [rollout for rollouts in written for rollout in rollouts]
    # Rows of the answers, right-padded: zip would be strict but for that.
    gaps = [
        [own - taught for own, taught, _ in zip(own_T, taught_T, rollout.token_ids, strict=False)]
        for own_T, taught_T, rollout in zip(own_BT, taught_BT, flat, strict=True)
    ]
    results, done = [], 0
    for rollouts in written:
        mine = gaps[done : done + len(rollouts)]
        done += len(rollouts)
        total = fsum(gap for answer_gaps in mine for gap in answer_gaps)
        results.append(
            {
                "reverse_kl": total / sum(map(len, mine)),
                "reverse_kl_sum": total / len(mine),
                "reverse_kl_tokens": mine,
            }
        )
    return results


def _teacher_rows(
    path: str | Path, provenance: Mapping[str, Any], todo: Sequence[Sample]
) -> dict[str, dict[str, Any]]:
    """The teacher's part of an earlier scores file, for the samples to do."""
    before = read_provenance(path)
    for key in ("teacher", "teacher_dtype", "input", "teacher_answers"):
        if before.get(key) != json.loads(json.dumps(provenance.get(key))):
            raise UserError(
                f"{path}: another {key!r} made these teacher scores: score anew, without that file"
            )
    queries = {sample.id: sample.query for sample in todo}
    return {
        row["id"]: {key: row[key] for key in TEACHER_KEYS}
        for _, row in read_jsonl(path)
        if row["id"] in queries
        and row.get("query") == queries[row["id"]]
        and all(k in row for k in TEACHER_KEYS)
    }
