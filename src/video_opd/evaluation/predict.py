"""Answers of a model for every row of a data file, appended as they are finished; resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from video_opd.errors import UserError
from video_opd.evaluation.batching import MakeLoader, length_batches
from video_opd.evaluation.output import Output
from video_opd.processes import Processes
from video_opd.progress import log, task
from video_opd.seeds import derive_seed
from video_opd.temporal import parse_answer
from video_opd.types import EncodedPrompt, Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How answers are written and read. ``temperature`` 0 is greedy, for one answer a row."""

    n: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 64
    seed: int = 0
    thinking: bool = False

    @classmethod
    def choose(cls, n: int, temperature: float | None = None, **others: Any) -> AnswerSettings:
        """Where no temperature is given: greedy for one answer, the model's own distribution for several."""
        if temperature is None:
            temperature = 1.0 if n > 1 else 0.0
        return cls(n=n, temperature=temperature, **others)

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"n is {self.n} and max_new_tokens {self.max_new_tokens}: both must be at least 1"
            )
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: choose 0 (greedy) or more")
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"{self.n} greedy answers would all be the same: set --temperature above 0, or n to 1"
            )


MakeRow: TypeAlias = Callable[[Sample, Sequence[Rollout], AnswerSettings], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Rows of the data file, of all processes together: ``kept`` from before, ``answered`` now, ``failed``
    because of their video."""

    kept: int
    answered: int
    failed: int


def answer(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    settings: AnswerSettings,
    purpose: str,
    prefix: Any = None,
) -> list[list[Rollout]]:
    """``settings.n`` answers to each prompt; a draw depends on seed, purpose, sample id and number only.

    ``prefix`` is what ``policy.prefill`` returned for these prompts, if they were read before.
    """
    seeds = [
        [derive_seed(settings.seed, purpose, prompt.sample_id, number) for number in range(settings.n)]
        for prompt in prompts
    ]
    return policy.sample(
        prompts if prefix is None else prefix,
        n=settings.n,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seeds=None if settings.temperature == 0 else seeds,
    )


def predict(
    policy: Policy,
    samples: Sequence[Sample],
    make_loader: MakeLoader,
    out: str | Path,
    *,
    made_by: Mapping[str, Any],
    settings: AnswerSettings | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    make_row: MakeRow | None = None,
    processes: Processes | None = None,
) -> PredictResult:
    """Appends a row ``{"id", "query", "responses", "spans", "rules", "truncated"}`` for every sample.

    ``make_row`` makes another row than that, with "id" and "query" in it.
    ``made_by`` says what else the answers depend on: the model's fingerprint, prompt, video budget. Rows
    that the same model and settings made before are kept. A sample whose video fails gets no row: it counts
    as missing, and is tried again next time. Of several ``processes`` each answers whole videos.
    Raises :class:`UserError` where ``out`` holds other rows.
    """
    settings = settings or AnswerSettings()
    make_row = make_row or grounding_row
    made_by = {**made_by, "answers": asdict(settings)}
    output = Output(out, made_by, overwrite=overwrite, processes=processes)
    todo = unanswered(samples, output.rows, out)
    kept = len(samples) - len(todo)
    if kept:
        log(f"{out}: {kept} of {len(samples)} rows are there, {len(todo)} to do")
    mine = output.processes.share(todo)
    with task("answering", len(mine)) as bar:
        for batch in length_batches(make_loader(mine) if mine else (), batch_size):
            rollouts = answer(policy, [prompt for _, prompt in batch], settings, "predict")
            rows = [
                make_row(sample, group, settings) for (sample, _), group in zip(batch, rollouts, strict=True)
            ]
            output.append(rows)
            bar.advance(len(batch))
    output.finish(samples)
    answered = sum(sample.id in output.ids for sample in todo)
    return PredictResult(kept=kept, answered=answered, failed=len(todo) - answered)


def unanswered(
    samples: Sequence[Sample], rows: Mapping[str, Mapping[str, Any]], out: str | Path
) -> list[Sample]:
    """The samples without a row. Raises :class:`UserError` where a row answers another query of that id."""
    todo = []
    for sample in samples:
        row = rows.get(sample.id)
        if row is None:
            todo.append(sample)
        elif row.get("query") != sample.query:
            raise UserError(
                f"{out}: id {sample.id!r} is there for another query: choose another --out, or --overwrite"
            )
    return todo


def grounding_row(sample: Sample, rollouts: Sequence[Rollout], settings: AnswerSettings) -> dict[str, Any]:
    """The answers to a query, and the spans that were read in them."""
    parsed = [parse_answer(rollout.text, thinking=settings.thinking) for rollout in rollouts]
    return {
        "id": sample.id,
        "query": sample.query,
        "responses": [rollout.text for rollout in rollouts],
        "spans": [answer.span for answer in parsed],
        "rules": [answer.rule for answer in parsed],
        "truncated": [rollout.truncated for rollout in rollouts],
    }
