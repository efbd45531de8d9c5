"""Appendix A: the noise of the gradients of Video-OPD and GRPO, and where it comes from (eq 10)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
        "noise_to_signal": {e: _spread([p[e]["noise_to_signal"] for p in prompts]) for e in ESTIMATORS},
        "covariance_share": {e: _spread([p[e]["covariance_share"] for p in prompts]) for e in ESTIMATORS},
        "less_noise": {
            e: _difference([_log_ratio(p["grpo"], p[e]) for p in prompts]) for e in ESTIMATORS if e != "grpo"
        },
        "less_covariance": {
            e: _difference([_less_covariance(p["grpo"], p[e]) for p in prompts])
            for e in ESTIMATORS
            if e != "grpo"
        },
    }


def _log_ratio(grpo: Mapping[str, float], ours: Mapping[str, float]) -> float:
    return math.log10(grpo["noise_to_signal"] / ours["noise_to_signal"])


def _less_covariance(grpo: Mapping[str, float], ours: Mapping[str, float]) -> float:
    return 100 * (grpo["covariance_share"] - ours["covariance_share"])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _difference(values: Sequence[float]) -> dict[str, Any]:
    """The mean over prompts, with a 95% interval of the bootstrap over them."""
    known = np.array([value for value in values if math.isfinite(value)])
    drawn = np.random.default_rng(0).integers(len(known), size=(DRAWS, len(known)))
    low, high = np.percentile(known[drawn].mean(axis=1), [2.5, 97.5])
    return Difference(
        rise=float(known.mean()),
        low=float(low),
        high=float(high),
        above=int((known > 0).sum()),
        among=len(known),
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
        "squared norm of the expected gradient: median [least, most] over prompts:\n"
    )
    yield "| estimator | noise / signal | share of the variance from covariances between tokens |"
    yield "|---|---|---|"
    for estimator, name in ESTIMATORS.items():
        noise, share = record["noise_to_signal"][estimator], record["covariance_share"][estimator]
        yield (
            f"| {name} | {noise['median']:.2f} [{noise['min']:.2f}, {noise['max']:.2f}] "
            f"| {share['median']:.0%} [{share['min']:.0%}, {share['max']:.0%}] |"
        )
    yield ""
