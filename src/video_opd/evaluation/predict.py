"""A model's predictions for every row of a data file, appended as they are finished; resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from video_opd.errors import UserError
from video_opd.evaluation.batching import Item, MakeLoader
from video_opd.evaluation.output import Output, append_batches
from video_opd.locks import locked_file
from video_opd.processes import Processes
from video_opd.progress import log
from video_opd.seeds import derive_seed
from video_opd.temporal import parse_answer
from video_opd.types import EncodedPrompt, Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How responses are generated and parsed. ``temperature`` 0 is greedy, for one response a row."""

    n: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 64
    seed: int = 0
    thinking: bool = False

    @classmethod
    def choose(cls, n: int, temperature: float | None = None, **others: Any) -> GenerationSettings:
        """Chooses the temperature if none is given: 0 (greedy) for one response, 1 for several."""
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
                f"{self.n} greedy responses would all be the same: set --temperature above 0, or n to 1"
            )


def response_length(given: int | None, usual: int, *, thinking: bool) -> int:
    """Returns the length of responses at most: what is ``given``, or else the ``usual`` one.

    Raises :class:`UserError` for a model that thinks without a given length: at the usual one, its reasoning
    would be cut off before the answer.
    """
    if given is not None:
        return given
    if thinking:
        raise UserError(
            "the model thinks before it answers, and reasoning has no natural end: give --max-new-tokens "
            "(in Python max_new_tokens)"
        )
    return usual


VIDEO_BYTES = "video_bytes"  # the key of a row that holds the size of its video
MakeRow: TypeAlias = Callable[[Sample, Sequence[Rollout], GenerationSettings], dict[str, Any]]


def use_together(policy: Policy | None, work: Callable[[], None]) -> None:
    """Does ``work``, in which this process uses ``policy`` if it has rows. All processes call this, because
    they may hold the policy together."""
    from video_opd.models.interfaces import CollectivePolicy

    if isinstance(policy, CollectivePolicy):
        policy.together(work)
    else:
        work()


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """Counts rows of the data file, of all processes together.

    ``kept`` rows were there before, ``answered`` ones were made now, and the videos of ``failed`` ones could
    not be used.
    """

    kept: int
    answered: int
    failed: int


def generate_responses(
    policy: Policy,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
    purpose: str,
    prefix: Any = None,
) -> list[list[Rollout]]:
    """Generates ``settings.n`` responses to each prompt.

    A draw depends on the seed, ``purpose``, the sample's id and the response's number, and on nothing else.
    ``prefix`` is what ``policy.prefill`` returned for these prompts, if they were prefilled before.
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
    provenance: Mapping[str, Any],
    settings: GenerationSettings | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    repeatable: bool = False,
    make_row: MakeRow | None = None,
    processes: Processes | None = None,
) -> PredictResult:
    """Appends a row for every sample, as :func:`grounding_row` makes it.

    ``make_row`` makes another row than that, with "id" and "query" in it. ``provenance`` says what else the
    responses depend on: the model's fingerprint, the prompt, the video budget. Rows that the same model and
    settings made before are kept. A sample whose video fails gets no row: it counts as missing, and the next
    run tries it again. ``repeatable``: a killed output ends with the same bytes as another
    (:class:`~video_opd.evaluation.output.Output`). Several ``processes`` divide the videos among themselves.
    Raises :class:`UserError` where ``out`` holds other rows, and where another command is writing it.
    """
    settings = settings or GenerationSettings()
    make_row = make_row or grounding_row
    provenance = {**provenance, "answers": asdict(settings)}
    with locked_file(out, processes):
        output = Output(out, provenance, overwrite=overwrite, repeatable=repeatable, processes=processes)
        return _predict(policy, samples, make_loader, output, settings, batch_size, make_row)


def _predict(
    policy: Policy,
    samples: Sequence[Sample],
    make_loader: MakeLoader,
    output: Output,
    settings: GenerationSettings,
    batch_size: int,
    make_row: MakeRow,
) -> PredictResult:
    out = output.path
    todo = samples_without_rows(samples, output.rows, out)
    kept = len(samples) - len(todo)
    if kept:
        log(f"{out}: {kept} of {len(samples)} rows are there, {len(todo)} to do")

    def make_rows(batch: Sequence[Item]) -> list[dict[str, Any]]:
        groups = generate_responses(policy, [prompt for _, prompt in batch], settings, "predict")
        return [make_row(sample, group, settings) for (sample, _), group in zip(batch, groups, strict=True)]

    use_together(
        policy if todo else None,
        lambda: append_batches(output, samples, make_loader, batch_size, make_rows, "answering"),
    )
    output.finish(samples)
    answered = sum(sample.id in output.ids for sample in todo)
    return PredictResult(kept=kept, answered=answered, failed=len(todo) - answered)


def samples_without_rows(
    samples: Sequence[Sample], rows: Mapping[str, Mapping[str, Any]], out: str | Path
) -> list[Sample]:
    """Returns the samples without a row.

    Raises :class:`UserError` if a row is for another query of that id, or says another size of its video.
    """
    todo = []
    for sample in samples:
        row = rows.get(sample.id)
        if row is None:
            todo.append(sample)
        elif row.get("query") != sample.query:
            raise UserError(
                f"{out}: id {sample.id!r} is there for another query: choose another --out, or --overwrite"
            )
        elif (size := row.get(VIDEO_BYTES)) is not None and video_size(sample).get(VIDEO_BYTES, size) != size:
            raise UserError(
                f"{out}: id {sample.id!r} is there for another video than {sample.video}, of {size} bytes: "
                f"choose another --out, or --overwrite (or delete {Path(out).name}) to make its rows again"
            )
    return todo


def video_size(sample: Sample) -> dict[str, int]:
    """What a row keeps of its video: ``{"video_bytes": …}``, and nothing if the video is not here.

    A repeat sees by it that the video was replaced. A copy in another folder is the same video.
    """
    try:
        return {VIDEO_BYTES: sample.video.stat().st_size}
    except OSError:
        return {}


def grounding_row(
    sample: Sample, rollouts: Sequence[Rollout], settings: GenerationSettings
) -> dict[str, Any]:
    """The row of a predictions file: the responses to a query, and the spans that were read in them.

    It is ``{"id", "query", "responses", "spans", "rules", "truncated", "video_bytes"}``.
    """
    parsed = [parse_answer(rollout.text, thinking=settings.thinking) for rollout in rollouts]
    return {
        "id": sample.id,
        "query": sample.query,
        "responses": [rollout.text for rollout in rollouts],
        "spans": [found.span for found in parsed],
        "rules": [found.rule for found in parsed],
        "truncated": [rollout.truncated for rollout in rollouts],
        **video_size(sample),
    }
