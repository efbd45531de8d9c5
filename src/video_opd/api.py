"""What a notebook needs: load a model, find events in a video, measure answers.

``from video_opd import load, ground, evaluate, train`` imports this module when one of them is first used.
Nothing here imports torch before a model is loaded.

Example::

    model = load("models/tiny-teacher")
    answer = ground(model, "holiday.mp4", "the dog jumps into the lake", samples=8)
    answer.span, answer.agreement    # ((12.54, 17.83), 0.81)
"""

from __future__ import annotations

import io
import json
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

PAGE_FRAMES = 48  # of a page: they stand in for a video that a browser does not play


def load(
    path: str | Path, *, device: str | None = None, settings: Mapping[str, Any] | None = None
) -> InferenceModel:
    """A checkpoint, ready to answer.

    Args:
        path: a folder for ``from_pretrained``, a Qwen3-VL (dense or with experts), or a name on a hub. One
            that ``video-opd train`` wrote knows how it was shown its videos; others get the defaults.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; a GPU where there is one when None.
        settings: keys of a recipe's ``model``, ``video`` and ``prompt`` sections.

    Raises:
        UserError: not such a checkpoint, an unknown key.

    Example::

        model = load("models/tiny-teacher", settings={"video.fps": 1, "model.dtype": "bfloat16"})
    """
    from video_opd.models.inference import load_inference_model, read_inference_config

    words = _overrides(settings)
    return load_inference_model(read_inference_config(str(path), words, device=device), device)


def _overrides(settings: Mapping[str, Any] | None) -> list[str]:
    """``settings`` as the words of a command line."""
    words = []
    for key, value in (settings or {}).items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


@overload
def ground(  # type: ignore[overload-overlap]  # a text is a sequence of texts to mypy
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
    """Where in a video an event lies; the video is decoded and read once for all queries.

    Args:
        model: what :func:`load` returned, or a path for it.
        video: a video file.
        query: what to look for, or several of them.
        samples: of a query; above 1 the answer is their consensus, and ``answer.agreement`` says how much
            they agree (docs/ground.md).
        temperature: of the samples; 0 (greedy) for one, 1 for several when None.
        window_s: search a long video in windows of so many seconds instead of thinning it.
        overlap_s: of neighbouring windows; half a window when None.
        max_new_tokens: of an answer, at most.
        seed: of the draws.
        batch_size: answers that are written at a time.

    Returns:
        One answer for one query, a list for a list. ``span`` is in seconds, or None.

    Raises:
        UserError: a video that cannot be used, an empty query, impossible settings.

    Example::

        for answer in ground(model, "kitchen.mp4", ["the cup falls", "he opens the door"]):
            print(answer.query, answer.span)
    """
    from video_opd.evaluation.predict import GenerationSettings
    from video_opd.grounding.ground import ground as run

    opened = load(model) if isinstance(model, str | Path) else model
    answers = run(
        opened.policy,
        opened.encoder,
        opened.budget,
        video,
        [query] if isinstance(query, str) else list(query),
        settings=GenerationSettings.choose(
            samples,
            temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            thinking=opened.config.prompt.thinking,
        ),
        window_s=window_s,
        overlap_s=overlap_s,
        batch_size=batch_size,
        backend=opened.config.video.backend,
    )
    return answers[0] if isinstance(query, str) else answers


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics, and beside them what they are worth (docs/evaluation.md). ``str()`` is what is printed."""

    metrics: Metrics
    best_constant: ConstantPrediction | None  # None without durations
    query_swap: QuerySwap | None  # None where no video has two queries to tell apart

    @property
    def miou(self) -> float:
        """In percent."""
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
    """Grounding metrics of answers, with intervals and controls. With ``predictions`` it needs no torch.

    Args:
        data: a data file, or its rows.
        predictions: a predictions file, or answers by the rows' ids: a span ``(start_s, end_s)``, a text, a
            :class:`~video_opd.types.Prediction`, or None for no answer.
        model: answers now, greedily, asked as the protocol asks; in place of ``predictions``.
        protocol: ``"paper"``, ``"timelens"`` or another of docs/evaluation.md.
        video_root: where the videos are; beside the data when None.
        max_new_tokens: of the model's answers, at most; the protocol's when None.
        batch_size: answers that the model writes at a time.

    Raises:
        UserError: neither or both of ``predictions`` and ``model``, a file that cannot be read, no annotated
            row, no prediction that belongs to one.

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
        found, otherwise = _predicted(model, samples, protocol, max_new_tokens, batch_size)
    else:
        assert predictions is not None
        found, otherwise = _given(predictions, samples, protocol)
    return Evaluation(
        metrics=metrics.evaluate(samples, found, protocol, deviations=otherwise),
        best_constant=best_constant(samples),
        query_swap=query_swap(samples, found, protocol),
    )


def _given(
    predictions: str | Path | Mapping[str, Any], samples: list[Sample], protocol: str
) -> tuple[dict[str, Prediction], dict[str, Any] | None]:
    """The answers by id, and what they were made with otherwise than the protocol says, if that is known."""
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
    answers = read_model_predictions([path], asked, name="model")
    found, _ = answers.of(samples)
    return found, file_deviations(answers.files, asked)


def _predicted(
    model: InferenceModel | str | Path,
    samples: list[Sample],
    protocol: str,
    max_new_tokens: int | None,
    batch_size: int,
) -> tuple[dict[str, Prediction], dict[str, Any] | None]:
    from video_opd.evaluation.predict import GenerationSettings, predict
    from video_opd.evaluation.protocols import get_protocol

    asked = get_protocol(protocol)
    opened = load(model) if isinstance(model, str | Path) else model
    opened = opened.with_prompt_style(asked.prompt_style)
    thinking = opened.config.prompt.thinking
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "predictions.jsonl"
        predict(
            opened.policy,
            samples,
            opened.prompts,
            out,
            provenance=opened.provenance(),
            settings=GenerationSettings(
                max_new_tokens=asked.max_new_tokens if max_new_tokens is None else max_new_tokens,
                thinking=thinking,
            ),
            batch_size=batch_size,
        )
        return _read(out, samples, protocol)


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path, settings: Mapping[str, Any] | None = None
) -> RunResult:
    """Trains a model as a recipe says, or continues a run that was interrupted (docs/methods.md).

    A run that is finished returns at once.

    Args:
        recipe: a YAML file, its content as nested mappings, or a :class:`~video_opd.config.Recipe`.
        settings: keys that replace those of the recipe.

    Returns:
        Where the run left its results: ``path`` (the run's folder), ``model`` (a folder for :func:`load`),
        ``steps`` and ``metrics`` (of the last step).

    Raises:
        UserError: an unknown key, settings that cannot work together, models or data that cannot be read, a
            folder that holds a run of another recipe.

    Example::

        result = train("recipes/tiny/video-opd.yaml", settings={"optim.max_steps": 20})
        answer = ground(result.model, "kitchen.mp4", "the cup falls")
    """
    from video_opd.config import Recipe, load_recipe, recipe_from_dict
    from video_opd.config.tree import apply_overrides

    words = _overrides(settings)
    if isinstance(recipe, str | Path):
        chosen = load_recipe(recipe, words)
    else:
        tree = recipe.to_dict() if isinstance(recipe, Recipe) else dict(recipe)
        chosen = recipe_from_dict(apply_overrides(tree, words))
    from video_opd.training.loop import train as run  # imports torch: a wrong recipe is found before

    return run(chosen)


def write_page(
    out: str | Path,
    video: str | Path,
    answers: Sequence[GroundedAnswer],
    *,
    model: str = "",
    embed_mb: float | None = None,
) -> Path:
    """The page of ``video-opd ground --view``: the video, its answers on a timeline, operated by keys.

    Args:
        out: an HTML file.
        video: the file that ``answers`` are about.
        answers: what :func:`ground` returned.
        model: its name, for the headline.
        embed_mb: a larger video is linked, not put into the page; 20 MB when None.

    Raises:
        UserError: a video that cannot be used, a page that cannot be written.
    """
    from video_opd.data.video import probe
    from video_opd.grounding.page import EMBED_MB, Film, write_view
    from video_opd.grounding.stills import stills

    info = probe(video)
    film = Film(
        path=info.path,
        codec=info.codec,
        fps=info.fps,
        duration_s=info.duration_s,
        frames=stills(info.path, count=PAGE_FRAMES),
    )
    records = [{**answer.to_json(), "line": answer.line()} for answer in answers]
    return write_view(out, film, records, model=model, embed_mb=EMBED_MB if embed_mb is None else embed_mb)
