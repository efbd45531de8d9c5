"""Scores every row of a pool: how well the teacher and the student find its span.

A row of the scores file holds the teacher's k responses and the student's, the spans read in them, their
mean IoU with the annotation (τ and σ of appendix B; a response without a span counts 0), and on request the
reverse KL of the student's responses under the teacher (section 3.2). The responses are kept as text, so
another threshold, ranking or parser needs no model. Rows are appended as soon as they are finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.config import Recipe
from video_opd.curriculum.score_files import judged
from video_opd.errors import UserError
from video_opd.evaluation.batching import Item, MakeLoader
from video_opd.evaluation.output import Output, append_batches
from video_opd.evaluation.predict import (
    GenerationSettings,
    generate_responses,
    samples_without_rows,
    use_together,
)
from video_opd.evaluation.resume import changed_since_written, read_provenance
from video_opd.jsonl import read_jsonl
from video_opd.locks import locked_file
from video_opd.processes import Processes
from video_opd.progress import log
from video_opd.temporal import best_iou, parse_answer
from video_opd.types import Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy

K = 4  # responses of a model to a row; the paper leaves it open
TEACHER_KEYS = ("teacher_iou", "teacher_spans", "teacher_rules", "teacher_responses")
# What they depend on.
TEACHER_PROVENANCE = (
    *("teacher", "teacher_dtype", "teacher_quantization", "teacher_engine", "input", "teacher_answers"),
)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """How the rows of a pool are scored. ``temperature`` 0 is greedy, with k = 1.

    ``reverse_kl`` lets the teacher score the student's responses, too. Rows without an annotation are
    then scored as well; their IoUs are null.
    """

    k: int = K  # responses of the teacher
    student_k: int | None = None  # responses of the student; None: k
    temperature: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    thinking: bool = False
    reverse_kl: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> ScoreSettings:
        """As a round of this recipe scores its pool."""
        tvdf = recipe.tvdf
        return cls(
            k=tvdf.teacher_k,
            student_k=tvdf.student_k,
            temperature=tvdf.temperature,
            max_new_tokens=recipe.sampling.max_new_tokens,
            seed=recipe.run.seed,  # one seed for all rounds: the teacher's responses stay the same
            thinking=recipe.prompt.thinking,
            reverse_kl=tvdf.rank_by == "reverse_kl",
        )

    @property
    def teacher(self) -> GenerationSettings:
        return self._generation(self.k)

    @property
    def student(self) -> GenerationSettings:
        return self._generation(self.k if self.student_k is None else self.student_k)

    def _generation(self, n: int) -> GenerationSettings:
        return GenerationSettings(
            n=n,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            thinking=self.thinking,
        )


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """Counts rows of the data file, of all processes together.

    ``kept`` rows were scored before, ``scored`` ones now; the videos of ``failed`` ones could not be used.
    ``unannotated`` rows were left out. The teacher's scores of ``reused`` ones came from another file.
    """

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
    teacher_from: Sequence[str | Path] = (),
    overwrite: bool = False,
    repeatable: bool = False,
    processes: Processes | None = None,
) -> ScoreResult:
    """Appends a row of the scores file for every sample that has none.

    Without a ``teacher`` only the student responds: all that GRPO's selection by difficulty needs (D.1).
    ``provenance`` has the fingerprints of ``"student"`` and ``"teacher"``, the precision of each
    (``"student_dtype"``), and ``"input"``: prompt and video budget. ``teacher_from`` are earlier scores
    files. The teacher's scores of their rows are reused if the same teacher made them from the same input and
    settings. A teacher that processes hold together answers if any row needs it; all of them then call this
    together. ``repeatable``: a killed output ends with the same bytes as another
    (:class:`~video_opd.evaluation.output.Output`). Several ``processes`` divide the videos among themselves.
    Raises :class:`UserError` where another teacher made the rows of ``teacher_from``, and where something
    else made the rows of ``out``, and where another command is writing ``out``.
    """
    settings = settings or ScoreSettings()
    if teacher is None and (settings.reverse_kl or teacher_from):
        raise UserError("without a teacher there is no reverse KL and no teacher's score: name the teacher")
    provenance = full_provenance(provenance, settings)
    with locked_file(out, processes):
        output = Output(out, provenance, overwrite=overwrite, repeatable=repeatable, processes=processes)
        wanted = [sample for sample in samples if sample.spans or settings.reverse_kl]
        todo = samples_without_rows(wanted, output.rows, out)
        reused = known_teacher_scores(teacher_from, provenance, todo)
        kept = len(wanted) - len(todo)
        reuse = f", the teacher's scores of {len(reused)} are reused" if reused else ""
        log(f"{out}: {kept} of {len(wanted)} rows are there, {len(todo)} to score{reuse}")

        def rows_of(batch: Sequence[Item]) -> list[dict[str, Any]]:
            return _score_batch(student, teacher, batch, settings, reused)

        title = "scoring" if teacher is not None else "student answering"
        asked = any(settings.reverse_kl or sample.id not in reused for sample in todo)
        use_together(
            teacher if asked else None,
            lambda: append_batches(output, wanted, make_loader, batch_size, rows_of, title),
        )
        output.finish(samples)
    scored = [sample for sample in todo if sample.id in output.ids]
    return ScoreResult(
        kept=kept,
        scored=len(scored),
        failed=len(todo) - len(scored),
        unannotated=len(samples) - len(wanted),
        reused=sum(sample.id in reused for sample in scored),
    )


def full_provenance(provenance: Mapping[str, Any], settings: ScoreSettings) -> dict[str, Any]:
    """The provenance of a scores file. Raises :class:`UserError` for settings that cannot work."""
    return {
        **provenance,
        "teacher_answers": asdict(settings.teacher),
        "student_answers": asdict(settings.student),
        "reverse_kl": settings.reverse_kl,
    }


def _score_batch(
    student: Policy,
    teacher: Policy | None,
    batch: Sequence[Item],
    settings: ScoreSettings,
    reused: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of a batch. Each model prefills the prompts once, and only one prefix is held at a time."""
    prompts = [prompt for _, prompt in batch]
    prefix = student.prefill(prompts)
    groups = generate_responses(student, prompts, settings.student, "score student", prefix)
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    student_BT: list[Sequence[float]] = [rollout.recorded for group in groups for rollout in group]
    # At other temperatures, the recorded log-probs are not those of the model's own distribution.
    if settings.reverse_kl and settings.temperature not in (0.0, 1.0):
        student_BT = student.logprobs(prefix, responses).logprobs_BT.tolist()
    del prefix

    teacher_scores = {sample.id: reused[sample.id] for sample, _ in batch if sample.id in reused}
    missing = [i for i, (sample, _) in enumerate(batch) if sample.id not in reused]
    prefilled = list(range(len(batch))) if settings.reverse_kl else missing
    reverse_kls: list[dict[str, Any]] = [{} for _ in batch]
    if teacher is not None and prefilled:
        prefix = teacher.prefill([prompts[i] for i in prefilled])
        if missing:
            missing_prefix = prefix if len(missing) == len(prefilled) else prefix.select(missing)
            teacher_groups = generate_responses(
                teacher, [prompts[i] for i in missing], settings.teacher, "score teacher", missing_prefix
            )
            for i, group in zip(missing, teacher_groups, strict=True):
                sample = batch[i][0]
                teacher_scores[sample.id] = scores_of("teacher", sample, group, settings)
        if settings.reverse_kl:
            teacher_BT = teacher.logprobs(prefix, responses).logprobs_BT.tolist()
            reverse_kls = _reverse_kls(student_BT, teacher_BT, groups)
    return [
        {"id": sample.id, "query": sample.query}
        | teacher_scores.get(sample.id, {})
        | scores_of("student", sample, group, settings)
        | reverse_kl
        for (sample, _), group, reverse_kl in zip(batch, groups, reverse_kls, strict=True)
    ]


def scores_of(
    role: str, sample: Sample, rollouts: Sequence[Rollout], settings: ScoreSettings
) -> dict[str, Any]:
    """The keys of a row that one model's responses give."""
    parsed = [parse_answer(rollout.text, thinking=settings.thinking) for rollout in rollouts]
    ious = [best_iou(found.span, sample.spans) for found in parsed]
    return {
        f"{role}_iou": fsum(ious) / len(ious) if sample.spans else None,
        f"{role}_spans": [found.span for found in parsed],
        f"{role}_rules": [found.rule for found in parsed],
        f"{role}_responses": [rollout.text for rollout in rollouts],
    }


def _reverse_kls(
    student_BT: Sequence[Sequence[float]],
    teacher_BT: Sequence[Sequence[float]],
    groups: Sequence[Sequence[Rollout]],
) -> list[dict[str, Any]]:
    """log π_θ − log π_tea on the student's tokens, in nats (the sampled reverse KL, −r_t of eq 5).

    ``reverse_kl`` is its mean over all tokens of a row, ``reverse_kl_sum`` the mean over the responses of its
    sum over a response's tokens.
    """
    rollouts = [rollout for group in groups for rollout in group]
    # Not strict: log-probs are padded to the longest response.
    terms = [
        [own - other for own, other, _ in zip(student_T, teacher_T, rollout.token_ids, strict=False)]
        for student_T, teacher_T, rollout in zip(student_BT, teacher_BT, rollouts, strict=True)
    ]
    results, done = [], 0
    for group in groups:
        group_terms = terms[done : done + len(group)]
        done += len(group)
        total = fsum(term for response_terms in group_terms for term in response_terms)
        results.append(
            {
                "reverse_kl": total / sum(map(len, group_terms)),
                "reverse_kl_sum": total / len(group_terms),
                "reverse_kl_tokens": group_terms,
            }
        )
    return results


def known_teacher_scores(
    paths: Sequence[str | Path], provenance: Mapping[str, Any], samples: Sequence[Sample]
) -> dict[str, dict[str, Any]]:
    """The teacher's keys of earlier scores files, by id, for the samples whose query they were made for.

    Their IoUs are with the annotations of ``samples``, which may be others by now.

    Raises :class:`UserError` if something else than ``provenance`` says made the teacher's part of a file.
    """
    asked = {sample.id: sample for sample in samples}
    known: dict[str, dict[str, Any]] = {}
    for path in paths:
        before = read_provenance(path)
        for key in TEACHER_PROVENANCE:
            if before.get(key) != json.loads(json.dumps(provenance.get(key))):
                raise UserError(
                    f"{path}: another {key!r} made these teacher scores: score anew, without that file"
                )
        if changed_since_written(path):
            raise UserError(
                f"{path}: rows were changed or lost since they were written: score anew, without it"
            )
        for _, row in read_jsonl(path):
            identity = row["id"]
            if identity not in asked or row.get("query") != asked[identity].query:
                continue
            if all(key in row for key in TEACHER_KEYS):
                new = judged(row, asked[identity].spans)
                known[identity] = {key: new[key] for key in TEACHER_KEYS}
    return known
