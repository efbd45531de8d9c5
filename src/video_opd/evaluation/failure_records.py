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
from video_opd.types import EncodedPrompt, Prediction, Sample, TokenLogprobs

if TYPE_CHECKING:
    import torch

    from video_opd.models.interfaces import Policy, Teacher

FRAMES = 8
FRAME_TOKENS = 20  # cells of 32×32 px, at most: about 192×96 px
Explain = Callable[[Sequence[EncodedPrompt], Sequence[str]], Sequence[Mapping[str, Any]]]

Top = list[list[tuple[str, float]]]  # for each token, the likeliest ones and their log-probabilities


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
    *,
    batch_size: int = 8,
) -> None:
    """Writes the failures that are shown (:func:`~video_opd.evaluation.failures.choose_failures`).

    ``predictions`` are the student's. ``explain`` gives what :func:`explainer` does, for ``batch_size`` rows
    at a time. A row whose video can no longer be read is left out.
    """
    chosen = [row.sample for row in choose_failures(samples, predictions, protocol)]
    loaded = list(make_loader(chosen)) if chosen else []
    answered = [
        (sample.id, prompt, responses[0])
        for sample, prompt in loaded
        if (responses := predictions[sample.id].responses)
    ]
    explained: dict[str, Mapping[str, Any]] = {}
    for start in range(0, len(answered), batch_size):
        ids, prompts, texts = zip(*answered[start : start + batch_size], strict=True)
        explained |= zip(ids, explain(prompts, texts), strict=True)
    write_jsonl(
        out, [{"id": sample.id, **_pictures(sample), **explained.get(sample.id, {})} for sample, _ in loaded]
    )


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
    """Returns a function of prompts and of the student's recorded responses to them.

    It gives each response token by token: ``tokens``, ``student_logprobs``, ``teacher_logprobs``, ``r``
    (eq 5) and ``student_top``, ``teacher_top``, the likeliest tokens of both. Responses are made again,
    because predictions have no tokens; for one that comes out otherwise (another batch may round otherwise),
    nothing is given. ``distributions`` says whether the teacher gives whole distributions.
    """
    from video_opd.models.alternatives import likeliest

    def signal_of(scores: TokenLogprobs, row: int, length: int) -> tuple[torch.Tensor, Top | None]:
        own_T, full_BTV = scores.logprobs_BT[row, :length].cpu(), scores.full_BTV
        if full_BTV is None:
            return own_T, None
        top = likeliest(full_BTV[row, :length])
        return own_T, [[(decode(token), value) for token, value in position] for position in top]

    def explain(prompts: Sequence[EncodedPrompt], recorded: Sequence[str]) -> list[Mapping[str, Any]]:
        rollouts = [rollout for rollout, *_ in generate_responses(student, prompts, settings, "predict")]
        found: list[Mapping[str, Any]] = [{} for _ in prompts]
        same = [i for i, rollout in enumerate(rollouts) if rollout.text == recorded[i]]
        if not same:
            return found
        asked, ids = [prompts[i] for i in same], [[rollouts[i].token_ids] for i in same]
        own = student.logprobs(asked, ids, full=True)
        scores = None if teacher is None else teacher.logprobs(asked, ids, full=distributions)
        for row, i in enumerate(same):
            length = len(rollouts[i].token_ids)
            own_T, own_top = signal_of(own, row, length)
            signal: dict[str, Any] = {
                "tokens": [decode(token) for token in rollouts[i].token_ids],
                "student_logprobs": own_T.tolist(),
                "teacher_logprobs": None,
                "r": [None] * length,
                "student_top": own_top,
                "teacher_top": None,
            }
            if scores is not None:
                theirs_T, their_top = signal_of(scores, row, length)
                signal |= {
                    "teacher_logprobs": theirs_T.tolist(),
                    "r": (theirs_T - own_T).tolist(),
                    "teacher_top": their_top,
                }
            found[i] = signal
        return found

    return explain
