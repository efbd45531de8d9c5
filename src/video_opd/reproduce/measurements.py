"""What runs reached on the test sets: mean IoUs or accuracies, and paired differences with intervals.

Shapes: ``N`` rows of all test sets, ``S`` seeds, ``D`` draws of videos, ``T`` of seeds for each of these.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.data.annotations import read_samples
from video_opd.evaluation.bootstrap import DRAWS, draws_of_means
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.rows import PERCENT, score_rows, videos_of
from video_opd.reproduce.claims import Difference
from video_opd.reproduce.places import BASE, TEACHER, Place, predictions_of
from video_opd.types import Sample
from video_opd.world.questions import right_answers

POOLED = "all"  # the rows of all test sets together
_T_DRAWS = 50  # for each draw of videos: a t of 2 degrees of freedom is far out in its tails


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The scores of one arm, from 0 to 100: a row of ``scores_NS`` for each question, a column for each seed.

    The score of a grounding query is the IoU of its response, that of a general question 100 or 0.
    """

    scores_NS: np.ndarray
    sets_N: tuple[str, ...]  # the test set of each row, or the ability that it asks for
    videos_N: tuple[str, ...]

    def means(self, testset: str = POOLED) -> list[float]:
        """The mean score on a test set, or on all rows, for each seed."""
        chosen = [testset in (POOLED, name) for name in self.sets_N]
        return [float(x) for x in self.scores_NS[chosen].mean(axis=0)]

    def to_json(self) -> dict[str, Any]:
        return {name: self.means(name) for name in (*dict.fromkeys(self.sets_N), POOLED)}


def measure(sets: Mapping[str, Sequence[Sample]], predictions: Sequence[Mapping[str, Path]]) -> Measured:
    """Reads one arm's predictions: a file of each test set, for each seed."""
    columns = []
    names: list[str] = []
    videos: list[str] = []
    for files in predictions:
        scored = {name: score_rows(rows, read_predictions(files[name])) for name, rows in sets.items()}
        columns.append([PERCENT * row.iou for rows in scored.values() for row in rows])
        names = [name for name, rows in scored.items() for _ in rows]
        videos = [video for rows in scored.values() for video in videos_of(rows)]
    return Measured(scores_NS=np.array(columns).T, sets_N=tuple(names), videos_N=tuple(videos))


def measure_answers(questions: Sequence[Sample], predictions: Sequence[Path]) -> Measured:
    """Reads one arm's responses to general questions: a file for each seed."""
    columns = [
        [PERCENT * right for right in right_answers(questions, read_predictions(path))]
        for path in predictions
    ]
    return Measured(
        scores_NS=np.array(columns).T,
        sets_N=tuple(str(question.source) for question in questions),
        videos_N=tuple(str(question.video) for question in questions),
    )


def samples_of(sets: Mapping[str, Path]) -> dict[str, list[Sample]]:
    return {name: read_samples(path) for name, path in sets.items()}


def measured_shipped(place: Place, models: Sequence[str] = (BASE, TEACHER)) -> dict[str, Measured]:
    return {model: measure_runs(place, [place.runs("shipped") / model]) for model in models}


def measure_runs(place: Place, runs: Sequence[Path]) -> Measured:
    """What an arm reached on the test sets: a run of each seed."""
    files = [{name: predictions_of(run, path) for name, path in place.tests.items()} for run in runs]
    return measure(samples_of(place.tests), files)


def measure_questions(place: Place, runs: Sequence[Path]) -> Measured:
    """What an arm knows besides: the accuracy of a run of each seed on the general questions."""
    return measure_answers(
        read_samples(place.questions), [predictions_of(run, place.questions) for run in runs]
    )


def difference(to: Measured, since: Measured, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """The rise of the pooled mean score from one arm to another, in points: paired, because both have the
    same rows and seeds.

    A seed changes the training rows and the rollouts, so it is a source of chance beside the videos. The
    interval adds up both: the mean over seeds of a bootstrap that draws videos, with all their rows in both
    arms, and a Student's t for the seeds, with their standard error and S - 1 degrees of freedom. To draw
    three seeds again would show two thirds of their variance, and never more than they have shown. Chance
    that belongs to one video under one seed is counted in both parts, which errs on the wide side. An arm
    without seeds (one column: a model that was not trained here) is compared with every seed of the other.
    """
    assert to.videos_N == since.videos_N, "two arms are compared on the same rows"
    rises_NS = to.scores_NS - since.scores_NS
    seeds = rises_NS.shape[1]
    by_seed_S = rises_NS.mean(axis=0)
    means_D = draws_of_means(rises_NS.mean(axis=1, keepdims=True), to.videos_N, draws=draws, seed=seed)[:, 0]
    if seeds > 1:
        t_DT = np.random.default_rng([seed, 1]).standard_t(seeds - 1, size=(draws, _T_DRAWS))
        means_D = (means_D[:, None] + t_DT * by_seed_S.std(ddof=1) / math.sqrt(seeds)).ravel()
    low, high = np.percentile(means_D, [2.5, 97.5])
    return Difference(
        rise=float(by_seed_S.mean()),
        low=float(low),
        high=float(high),
        above=int((by_seed_S > 0).sum()),
        among=seeds,
        unit="seeds",
    )


def differences(
    arms: Mapping[str, Measured], pairs: Iterable[tuple[str, str]] | None = None
) -> list[dict[str, Any]]:
    """The paired difference of every pair of arms; None: of every two, both ways."""
    return [
        {"of": to, "against": since, **difference(arms[to], arms[since]).to_json()}
        for to, since in (permutations(arms, 2) if pairs is None else pairs)
    ]


def find(record: Mapping[str, Any], to: str, since: str) -> Difference:
    """The difference of arm ``to`` against ``since`` in a record that has ``differences``."""
    (found,) = (d for d in record["differences"] if (d["of"], d["against"]) == (to, since))
    return Difference.read(found)


def gap_table(mious: Mapping[str, Any], rows: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Markdown: the mean IoU of each (name, arm, gap) by test set and over all rows, and its gap."""
    sets = [name for name in next(iter(mious.values())) if name != POOLED]
    yield "| | " + " | ".join(sets) + " | all | gap [95%] |"
    yield "|---|" + "---|" * (len(sets) + 2)
    for name, arm, gap in rows:
        yield f"| {name} | " + " | ".join(spread(mious[arm][s]) for s in (*sets, POOLED)) + f" | {gap} |"
    yield ""


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``54.1 ± 0.7``: the mean over seeds and the standard deviation; the mean alone for one seed."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
