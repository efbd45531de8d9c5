"""Appendix A: the noise of the gradients of Video-OPD and GRPO, and where it comes from (eq 10)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.errors import need
from video_opd.evaluation.bootstrap import DRAWS
from video_opd.reproduce.claims import COVARIANCE_SHARE, NOISE, Claim, Difference
from video_opd.reproduce.places import Place, make_videos
from video_opd.reproduce.tasks import Stage, Task

NAME = "appendix-a"
TITLE = "Appendix A: the noise of gradients"
SUITE = "figures"
VIDEOS = 8  # of each seed, one prompt each
ROLLOUTS = 64
ESTIMATORS = {
    "grpo": "GRPO",
    "video-opd": "Video-OPD, sampled",
    "video-opd-baseline": "Video-OPD, sampled, less its expectation",
    "video-opd-full": "Video-OPD, full",
}
POOL = "gradient-pool"
MODULE = "video_opd.reproduce.gradient_noise"


def prepare(place: Place, seeds: Sequence[int]) -> None:
    make_videos(place, seeds, VIDEOS, [0.0], POOL)


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    return [[_task(place, seed) for seed in seeds]]


def _task(place: Place, seed: int) -> Task:
    out = measured_of(place, seed)
    words = ["--data", place.pool(seed, 0.0, POOL), "--out", out, "--rollouts", ROLLOUTS]
    return Task(
        name=f"{NAME}-seed-{seed}",
        words=lambda: words,
        done=out.exists,
        seconds=60.0 * VIDEOS,
        module=MODULE,
    )


def measured_of(place: Place, seed: int) -> Path:
    return place.runs(NAME) / f"seed-{seed}.json"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    found = [json.loads(measured_of(place, seed).read_text(encoding="utf-8"))["prompts"] for seed in seeds]
    prompts = [row["estimators"] for rows in found for row in rows]
    return {
        "settings": {"prompts": len(prompts), "rollouts": ROLLOUTS},
        "noise_to_signal": {e: _spread(prompts, e, "noise_to_signal") for e in ESTIMATORS},
        "covariance_share": {e: _spread(prompts, e, "covariance_share") for e in ESTIMATORS},
        "less_noise": {
            e: _mean([math.log10(grpo / ours) for grpo, ours in _pairs(prompts, e, "noise_to_signal")])
            for e in ESTIMATORS
            if e != "grpo"
        },
        "less_covariance": {
            e: _mean([100 * (grpo - ours) for grpo, ours in _pairs(prompts, e, "covariance_share")])
            for e in ESTIMATORS
            if e != "grpo"
        },
    }


Prompts = Sequence[Mapping[str, Mapping[str, float | None]]]
"""The figures of each prompt by estimator; None is a figure that its gradients do not have."""


def _spread(prompts: Prompts, estimator: str, figure: str) -> dict[str, float]:
    """Over the prompts that have the figure, and how many these are."""
    found = [value for prompt in prompts if (value := prompt[estimator][figure]) is not None]
    need(bool(found), f"no prompt has a {figure} of {estimator}: take more prompts or rollouts")
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "prompts": len(found)}


def _pairs(prompts: Prompts, estimator: str, figure: str) -> Iterator[tuple[float, float]]:
    """GRPO's figure and the estimator's, of each prompt that has both."""
    for prompt in prompts:
        grpo, ours = prompt["grpo"][figure], prompt[estimator][figure]
        if grpo is not None and ours is not None:
            yield grpo, ours


def _mean(differences: Sequence[float]) -> dict[str, Any]:
    """The mean over prompts, with a 95% interval of the bootstrap over them."""
    need(bool(differences), "no prompt has figures of both estimators: take more prompts or rollouts")
    each = np.array(differences)
    drawn = np.random.default_rng(0).integers(len(each), size=(DRAWS, len(each)))
    low, high = np.percentile(each[drawn].mean(axis=1), [2.5, 97.5])
    return Difference(
        rise=float(each.mean()),
        low=float(low),
        high=float(high),
        above=int((each > 0).sum()),
        among=len(each),
        unit="prompts",
    ).to_json()


def claims(record: Mapping[str, Any]) -> list[Claim]:
    where = f"{record['settings']['rollouts']} rollouts of each prompt"
    less_noise = [
        Claim(
            says=f"The gradient of {ESTIMATORS[e]} is less noisy than GRPO's",
            source="appendix A",
            where=where,
            difference=Difference.read(found),
            score=NOISE,
        )
        for e, found in record["less_noise"].items()
    ]
    less_covariance = Claim(
        says="GRPO's noise comes from covariances between tokens, Video-OPD's does not",
        source="eq 10",
        where=where,
        difference=Difference.read(record["less_covariance"]["video-opd"]),
        score=COVARIANCE_SHARE,
    )
    return [*less_noise, less_covariance]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: noise relative to signal, and the share of covariances, by estimator."""
    settings = record["settings"]
    yield (
        f"The gradient of every token of {settings['rollouts']} rollouts of the base to each of "
        f"{settings['prompts']} prompts. Noise is the variance of the mean over eight rollouts, signal the "
        "squared norm of the expected gradient: median [least, most] over prompts. A prompt is without "
        "signal if the estimate of the signal is not above 0; it is left out where the ratio is compared:\n"
    )
    covariances = "share of the variance from covariances between tokens"
    yield f"| estimator | noise / signal | without signal | {covariances} |"
    yield "|---|---|---|---|"
    for estimator, name in ESTIMATORS.items():
        noise, share = record["noise_to_signal"][estimator], record["covariance_share"][estimator]
        yield (
            f"| {name} | {noise['median']:.2f} [{noise['min']:.2f}, {noise['max']:.2f}] "
            f"| {settings['prompts'] - noise['prompts']} of {settings['prompts']} "
            f"| {share['median']:.0%} [{share['min']:.0%}, {share['max']:.0%}] |"
        )
    yield ""
