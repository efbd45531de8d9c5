"""The functions for a notebook: load a model, find events in a video, measure predictions, train.

``from video_opd import load, ground, evaluate, train`` gives the same functions. torch is imported only when
one of them needs it.

Example::

    model = load("models/tiny-teacher")
    answer = ground(model, "holiday.mp4", "the dog jumps into the lake", samples=8)
    answer.span, answer.agreement    # ((12.54, 17.83), 0.81)
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from video_opd.errors import UserError

if TYPE_CHECKING:
    from video_opd.config import Recipe
    from video_opd.evaluation.best_constant import ConstantPrediction
    from video_opd.evaluation.metrics import Metrics
    from video_opd.evaluation.query_swap import QuerySwap
    from video_opd.grounding.ground import GroundedAnswer
    from video_opd.models.inference import InferenceModel
    from video_opd.training.loop import RunResult
    from video_opd.types import Prediction, Sample

__all__ = ["Evaluation", "evaluate", "ground", "load", "train", "write_page"]

PAGE_FRAMES = 48  # frames in a page, for browsers that do not play the video


def load(
    path: str | Path, *, device: str | None = None, settings: Mapping[str, Any] | None = None
) -> InferenceModel:
    """Loads a model that can ground and be evaluated.

    Args:
        path: a model folder of a Qwen3-VL (dense or with experts), or its name on a hub. A model that
            ``video-opd train`` wrote is shown videos as in its training; other models get the defaults.
        device: such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None takes a GPU if there is one.
        settings: keys of a recipe's ``model``, ``video`` and ``prompt`` sections.

    Raises:
        UserError: if ``path`` is no such model, and for an unknown key.

    Example::

        model = load("models/tiny-teacher", settings={"video.fps": 1, "model.dtype": "bfloat16"})
    """
    from video_opd.config.tree import override_words
    from video_opd.models.inference import load_inference_model, read_inference_config

    overrides = override_words(settings or {})
    return load_inference_model(read_inference_config(str(path), overrides, device=device), device)


@overload
def ground(  # type: ignore[overload-overlap]  # to mypy a str is a Sequence[str], too
    model: InferenceModel | str | Path,
    video: str | Path,
    query: str,
    *,
    samples: int = ...,
    temperature: float | None = ...,
    window_s: float | None = ...,
    overlap_s: float | None = ...,
    max_new_tokens: int = ...,
    seed: int = ...,
    batch_size: int = ...,
) -> GroundedAnswer: ...
@overload
def ground(
    model: InferenceModel | str | Path,
    video: str | Path,
    query: Sequence[str],
    *,
    samples: int = ...,
    temperature: float | None = ...,
    window_s: float | None = ...,
    overlap_s: float | None = ...,
    max_new_tokens: int = ...,
    seed: int = ...,
    batch_size: int = ...,
) -> list[GroundedAnswer]: ...
def ground(
    model: InferenceModel | str | Path,
    video: str | Path,
    query: str | Sequence[str],
    *,
    samples: int = 1,
    temperature: float | None = None,
    window_s: float | None = None,
    overlap_s: float | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 8,
) -> GroundedAnswer | list[GroundedAnswer]:
    """Finds when an event happens in a video. The video is decoded and prefilled once for all queries.

    Args:
        model: a model from :func:`load`, or the path of one.
        video: a video file.
        query: the event to look for, or several of them.
        samples: responses that are sampled for a query. If there are several, their consensus is the answer,
            and ``answer.agreement`` says how much they agree (docs/ground.md).
        temperature: of the sampling; None means 0 (greedy) for one sample and 1 for several.
        window_s: seconds of a window; a long video is then searched in windows. None shows it whole, with
            fewer frames a second than a short one.
        overlap_s: seconds that neighbouring windows share; half a window if None.
        max_new_tokens: length of a response at most.
        seed: of the sampling.
        batch_size: responses that are sampled together.

    Returns:
        One answer for one query, and a list of them for a list. ``answer.span`` is in seconds, or None.

    Raises:
        UserError: if the video cannot be used, for an empty query, and for impossible settings.

    Example::

        for answer in ground(model, "kitchen.mp4", ["the cup falls", "he opens the door"]):
            print(answer.query, answer.span)
    """
    from video_opd.evaluation.predict import GenerationSettings
    from video_opd.grounding.ground import ground as run

    loaded = load(model) if isinstance(model, str | Path) else model
    answers = run(
        loaded.policy,
        loaded.encoder,
        loaded.budget,
        video,
        [query] if isinstance(query, str) else list(query),
        settings=GenerationSettings.choose(
            samples,
            temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            thinking=loaded.config.prompt.thinking,
        ),
        window_s=window_s,
        overlap_s=overlap_s,
        batch_size=batch_size,
        backend=loaded.config.video.backend,
    )
    return answers[0] if isinstance(query, str) else answers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics, and the controls that say what they are worth (docs/evaluation.md).

    ``str(evaluation)`` is what ``video-opd evaluate`` prints.
    """

    metrics: Metrics
    best_constant: ConstantPrediction | None  # None if the rows have no durations
    query_swap: QuerySwap | None  # None if no video has two queries to tell apart

    @property
    def miou(self) -> float:
        """The mean IoU in percent."""
        return self.metrics.miou

    def to_json(self) -> dict[str, Any]:
        """The record of ``video-opd evaluate --json``."""
        from video_opd.evaluation.metrics import evaluation_record

        return evaluation_record(self.metrics, self.best_constant, self.query_swap)

    def __str__(self) -> str:
        from rich.console import Console

        from video_opd.evaluation.terminal import print_metrics

        console = Console(file=io.StringIO(), force_terminal=False)
        print_metrics(
            {"answers": self.metrics},
            constant=self.best_constant,
            swaps={"answers": self.query_swap},
            console=console,
        )
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def evaluate(
    data: str | Path | Sequence[Sample],
    predictions: str | Path | Mapping[str, Any] | None = None,
    *,
    model: InferenceModel | str | Path | None = None,
    protocol: str = "paper",
    video_root: str | Path | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
) -> Evaluation:
    """Computes grounding metrics, with confidence intervals and controls.

    The predictions are either given, and then torch is not imported, or made by a model.

    Args:
        data: a data file, or its rows.
        predictions: a predictions file, or a prediction for each row's id: a span ``(start_s, end_s)``, the
            text of a response, a :class:`~video_opd.types.Prediction`, or None for no span.
        model: makes the predictions, greedily and with the protocol's prompt.
        protocol: ``"paper"``, ``"timelens"`` or another of docs/evaluation.md.
        video_root: the folder of the videos; the data file's folder if None.
        max_new_tokens: length of the model's responses at most; the protocol's if None. A model that thinks
            before it answers needs one.
        batch_size: responses that the model writes together.

    Raises:
        UserError: unless exactly one of ``predictions`` and ``model`` is given; if a file cannot be read, if
            no row is annotated, if no prediction belongs to an annotated row, and for a model that thinks if
            no length is given.

    Example::

        evaluate("test.jsonl", {"kitchen-1": (12.5, 14.0)}).metrics.values["R@0.5"]
    """
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation import metrics
    from video_opd.evaluation.best_constant import best_constant
    from video_opd.evaluation.query_swap import query_swap

    if (predictions is None) == (model is None):
        raise UserError("evaluate needs either predictions or a model")
    samples = read_samples(data, video_root) if isinstance(data, str | Path) else list(data)
    if model is not None:
        if not any(sample.spans for sample in samples):  # before the model predicts for hours
            raise UserError(metrics.NOT_ANNOTATED)
        found, deviations = _predict(model, samples, protocol, max_new_tokens, batch_size)
    else:
        assert predictions is not None
        found, deviations = _given(predictions, samples, protocol)
    return Evaluation(
        metrics=metrics.evaluate(samples, found, protocol, deviations=deviations),
        best_constant=best_constant(samples),
        query_swap=query_swap(samples, found, protocol),
    )


def _given(
    predictions: str | Path | Mapping[str, Any], samples: list[Sample], protocol: str
) -> tuple[dict[str, Prediction], dict[str, Any] | None]:
    """The predictions by id, and their deviations from the protocol (None if these are not known)."""
    from video_opd.evaluation.predictions import parse_row
    from video_opd.types import Prediction

    if isinstance(predictions, str | Path):
        return _read(predictions, samples, protocol)
    found = {}
    for identity, value in predictions.items():
        if isinstance(value, Prediction):
            found[identity] = value
            continue
        row = (
            {"response": value}
            if isinstance(value, str)
            else {"span": None if value is None else list(value)}
        )
        found[identity] = parse_row({"id": identity, **row}, f"prediction {identity!r}", protocol=protocol)
    return found, None


def _read(
    path: str | Path, samples: list[Sample], protocol: str
) -> tuple[dict[str, Prediction], dict[str, Any] | None]:
    from video_opd.evaluation.predictions import file_deviations, read_model_predictions
    from video_opd.evaluation.protocols import get_protocol

    asked = get_protocol(protocol)
    predictions = read_model_predictions([path], asked, name="model")
    found, _ = predictions.of(samples)
    return found, file_deviations(predictions.files, asked)


def _predict(
    model: InferenceModel | str | Path,
    samples: list[Sample],
    protocol: str,
    max_new_tokens: int | None,
    batch_size: int,
) -> tuple[dict[str, Prediction], dict[str, Any] | None]:
    from video_opd.evaluation.predict import GenerationSettings, predict, response_length
    from video_opd.evaluation.protocols import get_protocol

    asked = get_protocol(protocol)
    loaded = load(model) if isinstance(model, str | Path) else model
    loaded = loaded.with_prompt_style(asked.prompt_style)
    thinking = loaded.config.prompt.thinking
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "predictions.jsonl"
        predict(
            loaded.policy,
            samples,
            loaded.prompts,
            out,
            provenance=loaded.provenance(),
            settings=GenerationSettings(
                max_new_tokens=response_length(max_new_tokens, asked.max_new_tokens, thinking=thinking),
                thinking=thinking,
            ),
            batch_size=batch_size,
        )
        return _read(out, samples, protocol)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path, settings: Mapping[str, Any] | None = None
) -> RunResult:
    """Trains a model by a recipe (docs/methods.md).

    A run that was interrupted is continued, and a run that is finished returns at once.

    Args:
        recipe: a YAML file, its content as nested mappings, or a :class:`~video_opd.config.Recipe`.
        settings: keys of the recipe with other values, such as ``{"optim.max_steps": 20}``.

    Returns:
        The results of the run: ``path`` (the run folder), ``model`` (its model folder, for :func:`load`),
        ``steps``, and ``metrics`` (those of the last step).

    Raises:
        UserError: for an unknown key and for settings that contradict each other; if models or data cannot be
            read; if the run folder holds a run of another recipe.

    Example::

        result = train("recipes/tiny/video-opd.yaml", settings={"optim.max_steps": 20})
        answer = ground(result.model, "kitchen.mp4", "the cup falls")
    """
    from video_opd.config import Recipe, load_recipe, recipe_from_dict
    from video_opd.config.tree import override_words

    overrides = override_words(settings or {})
    if isinstance(recipe, str | Path):
        chosen = load_recipe(recipe, overrides)
    else:
        tree = recipe.given() if isinstance(recipe, Recipe) else dict(recipe)
        chosen = recipe_from_dict(tree, overrides=overrides)
    from video_opd.training.loop import train as run  # imports torch, so only after the recipe is checked

    return run(chosen)


def write_page(
    out: str | Path,
    video: str | Path,
    answers: Sequence[GroundedAnswer],
    *,
    model: str = "",
    embed_mb: float | None = None,
) -> Path:
    """Writes the page of ``video-opd ground --view``: the video, and its answers on a timeline.

    Args:
        out: the HTML file to write.
        video: the video file that ``answers`` are about.
        answers: answers from :func:`ground`.
        model: the model's name, for the headline.
        embed_mb: size in MB up to which the page contains the video; a larger one is linked. 20 if None.

    Returns:
        ``out`` as a path.

    Raises:
        UserError: if the video cannot be used, and if the page cannot be written.
    """
    from video_opd.data.stills import stills
    from video_opd.data.video import probe
    from video_opd.grounding import page

    info = probe(video)
    shown = page.PageVideo(
        path=info.path,
        codec=info.codec,
        fps=info.fps,
        duration_s=info.duration_s,
        frames=stills(info.path, count=PAGE_FRAMES),
    )
    records = [{**answer.to_json(), "line": answer.line()} for answer in answers]
    limit_mb = page.EMBED_MB if embed_mb is None else embed_mb
    return page.write_page(out, shown, records, model=model, embed_mb=limit_mb)
