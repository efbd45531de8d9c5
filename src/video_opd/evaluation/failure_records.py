"""Writes what a report shows of an evaluation besides its figures: the annotations, and some of the failures.

eval/annotations-DATA.jsonl    the annotated rows
eval/failures-DATA.jsonl       some rows that the student failed on: frames, and the signal of each token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.evaluation.batching import MakeLoader
from video_opd.evaluation.failures import choose_failures
from video_opd.evaluation.predict import GenerationSettings, generate_responses
from video_opd.evaluation.protocols import Protocol
from video_opd.jsonl import write_jsonl
from video_opd.progress import log
from video_opd.types import EncodedPrompt, Prediction, Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy, Teacher

FRAMES = 8
FRAME_TOKENS = 20  # cells of 32×32 px, at most: about 192×96 px
Explain = Callable[[EncodedPrompt, str], Mapping[str, Any]]


def write_annotations(samples: Sequence[Sample], out: Path) -> None:
    """Writes the annotated rows of a test set."""
    rows = [
        {
            "id": sample.id,
            "video": str(sample.row.get("video", sample.video)),
            "query": sample.query,
            "duration": sample.duration_s,
            "spans": sample.spans,
            "source": sample.source,
        }
        for sample in samples
        if sample.spans
    ]
    write_jsonl(out, rows)


def write_failures(
    samples: Sequence[Sample],
    predictions: Mapping[str, Prediction],
    out: Path,
    make_loader: MakeLoader,
    explain: Explain,
    protocol: str | Protocol = "paper",
) -> None:
    """Writes the failures that are shown (:func:`~video_opd.evaluation.failures.choose_failures`).

    ``predictions`` are the student's. ``explain`` gives what :func:`explainer` does. A row whose video can no
    longer be read is left out.
    """
    chosen = [row.sample for row in choose_failures(samples, predictions, protocol)]
    prompts = {sample.id: prompt for sample, prompt in make_loader(chosen)} if chosen else {}
    rows = []
    for sample in chosen:
        if sample.id in prompts:
            responses = predictions[sample.id].responses
            explained = explain(prompts[sample.id], responses[0]) if responses else {}
            rows.append({"id": sample.id, **_pictures(sample), **explained})
    write_jsonl(out, rows)


def _pictures(sample: Sample) -> dict[str, Any]:
    from video_opd.data.demux import VideoError
    from video_opd.data.stills import stills

    try:
        found = stills(sample.video, FRAMES, FRAME_TOKENS)
    except VideoError as error:
        log(f"no frames of {sample.id} for the report: {error}")
        return {"frames": [], "frame_times_s": []}
    return {"frames": [uri for _, uri in found], "frame_times_s": [time_s for time_s, _ in found]}


def explainer(
    student: Policy,
    teacher: Teacher | None,
    decode: Callable[[int], str],
    settings: GenerationSettings,
    *,
    distributions: bool = True,
) -> Explain:
    """Returns a function of a prompt and of the student's recorded response to it.

    It gives the response token by token: ``tokens``, ``student_logprobs``, ``teacher_logprobs``, ``r`` (eq 5)
    and ``student_top``, ``teacher_top``, the likeliest tokens of both. The response is made again, because
    predictions have no tokens; if it comes out otherwise (another batch may round otherwise), nothing is
    given. ``distributions`` says whether the teacher gives whole distributions.
    """
    from video_opd.models.alternatives import likeliest

    def tokens_of(top: list[list[tuple[int, float]]]) -> list[list[tuple[str, float]]]:
        return [[(decode(token), value) for token, value in position] for position in top]

    def explain(prompt: EncodedPrompt, recorded: str) -> Mapping[str, Any]:
        rollout = _answered_again(student, prompt, settings)
        if rollout.text != recorded:
            return {}
        ids = [[rollout.token_ids]]
        length = len(rollout.token_ids)
        own = student.logprobs([prompt], ids, full=True)
        row: dict[str, Any] = {
            "tokens": [decode(token) for token in rollout.token_ids],
            "student_logprobs": own.logprobs_BT[0, :length].tolist(),
            "teacher_logprobs": None,
            "r": [None] * length,
            "student_top": None if own.full_BTV is None else tokens_of(likeliest(own.full_BTV[0, :length])),
            "teacher_top": None,
        }
        if teacher is not None:
            scores = teacher.logprobs([prompt], ids, full=distributions)
            signal_T = scores.logprobs_BT[0, :length].cpu() - own.logprobs_BT[0, :length].cpu()
            row |= {"teacher_logprobs": scores.logprobs_BT[0, :length].tolist(), "r": signal_T.tolist()}
            if scores.full_BTV is not None:
                row["teacher_top"] = tokens_of(likeliest(scores.full_BTV[0, :length]))
        return row

    return explain


def _answered_again(student: Policy, prompt: EncodedPrompt, settings: GenerationSettings) -> Rollout:
    ((rollout, *_),) = generate_responses(student, [prompt], settings, "predict")
    return rollout
