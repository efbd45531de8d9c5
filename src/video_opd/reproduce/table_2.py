"""Tables 2 and 7: what the curriculum chooses, at an equal number of rows, with exact and loose annotations.

For each seed a pool is scored once; every arm chooses the same number of rows with ``video-opd select`` and
trains Video-OPD on them (estimator full, whose seeds differ least). The responses that were scored are
compared with the annotations of each level, so loose annotations change what the gate and the ranks see, and
nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.jsonl import read_jsonl
from video_opd.reproduce.claims import Claim
from video_opd.reproduce.measurements import POOLED, differences, find, measure_runs, measured_shipped, spread
from video_opd.reproduce.places import (
    BASE,
    EVALUATION_SECONDS,
    QUERIES,
    TEACHER,
    Place,
    has_all_rows,
    make_videos,
    shipped_stage,
    train_task,
)
from video_opd.reproduce.rates import BATCH, chosen_rate, prepare_tuning, tuned, tuning_stage
from video_opd.reproduce.tasks import Stage, Task
from video_opd.temporal import annotation_iou
from video_opd.world.demo import STUDENT_K, TEACHER_K
from video_opd.world.measure import MAX_NEW_TOKENS
from video_opd.world.shipped import shipped

NAME = "table-2"
TITLE = "Tables 2 and 7: the curriculum, with exact and loose annotations"
SUITE = "tables"
POOL = "large-pool"
VIDEOS = 320  # of a pool, with about 1,370 rows
LEVELS = (0.0, 1.0)
ROWS, STEPS = 256, 24
RECIPE = "video-opd-full"
RANDOM, TRPV, DBTP, TVDF = "random", "trpv", "dbtp", "topk"
ARMS: dict[str, tuple[str, list[str]]] = {  # the name, and the flags of ``video-opd select``
    RANDOM: ("no TVDF: random rows", ["--strategy", "random"]),
    TRPV: ("TRPV only: random behind the gate", ["--strategy", "random", "--min-teacher-iou", "0.5"]),
    DBTP: ("DBTP only: largest δ, no gate", ["--strategy", "topk", "--min-teacher-iou", "0"]),
    TVDF: ("TRPV + DBTP: largest δ behind the gate", ["--strategy", "topk"]),
    "dsus": ("TRPV + DSUS", ["--strategy", "dsus"]),
    "bbds": ("TRPV + BBDS", ["--strategy", "bbds"]),
    "gwds": ("TRPV + GWDS", ["--strategy", "gwds"]),
}
CLAIMS = (  # the paper's sentence, its table, and the arms of which the first should be better
    ("The curriculum is better than random rows", "table 2", TVDF, RANDOM),
    ("The gate alone is better than random rows", "table 2", TRPV, RANDOM),
    ("Disagreement alone is better than random rows", "table 2", DBTP, RANDOM),
    ("The gate adds to disagreement", "table 2", TVDF, DBTP),
    ("Top-k is better than DSUS", "table 7", TVDF, "dsus"),
    ("Top-k is better than BBDS", "table 7", TVDF, "bbds"),
    ("Top-k is better than GWDS", "table 7", TVDF, "gwds"),
)


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, LEVELS, POOL)


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    runs = [
        train_task(
            place,
            run_of(place, arm, level, seed),
            RECIPE,
            data=rows_of(place, arm, level, seed),
            evaluate=place.tests,
            seed=seed,
            steps=STEPS,
            changes=tuned(place, RECIPE),
        )
        for seed in seeds
        for level in LEVELS
        for arm in ARMS
    ]
    first = [*shipped_stage(place), *tuning_stage(place, [RECIPE])]
    selections = [select_task(place, arm, level, seed) for seed in seeds for level in LEVELS for arm in ARMS]
    return [[*first, *(score_task(place, seed) for seed in seeds)], selections, runs]


def score_task(place: Place, seed: int) -> Task:
    data, out = place.pool(seed, 0.0, POOL), scores_of(place, seed)
    models = ["--student", shipped(BASE), "--teacher", shipped(TEACHER), "--data", data, "--out", out]
    draws = ["--k", TEACHER_K, "--student-k", STUDENT_K, "--seed", seed]
    return Task(
        name=f"{NAME}-{out.stem}",
        words=lambda: ["score", *models, *draws, "--max-new-tokens", MAX_NEW_TOKENS, "--batch-size", 32],
        done=lambda: has_all_rows(out, data),
        seconds=3 * EVALUATION_SECONDS * QUERIES * VIDEOS,
    )


def select_task(place: Place, arm: str, level: float, seed: int) -> Task:
    out = rows_of(place, arm, level, seed)
    files = ["--data", place.pool(seed, level, POOL), "--scores", scores_of(place, seed), "--out", out]
    return Task(
        name=f"{NAME}-{out.stem}",
        words=lambda: ["select", *files, "--k", ROWS, "--seed", seed, *ARMS[arm][1]],
        done=out.exists,
        seconds=2,
    )


def scores_of(place: Place, seed: int) -> Path:
    return place.runs(NAME) / f"scores-{seed}.jsonl"


def rows_of(place: Place, arm: str, level: float, seed: int) -> Path:
    """The rows that an arm chose."""
    return place.runs(NAME) / f"rows-{arm}-noise-{level:g}-seed-{seed}.jsonl"


def run_of(place: Place, arm: str, level: float, seed: int) -> Path:
    return place.runs(NAME) / f"{arm}-noise-{level:g}-seed-{seed}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    shipped_models = measured_shipped(place)
    levels = []
    for level in LEVELS:
        arms = {arm: measure_runs(place, [run_of(place, arm, level, seed) for seed in seeds]) for arm in ARMS}
        levels.append(
            {
                "noise": level,
                "mIoU": {arm: found.to_json() for arm, found in arms.items()},
                "annotation_iou": {
                    "pool": [_annotation_iou(place.pool(seed, level, POOL)) for seed in seeds],
                    **{
                        arm: [_annotation_iou(rows_of(place, arm, level, seed)) for seed in seeds]
                        for arm in ARMS
                    },
                },
                "differences": differences({BASE: shipped_models[BASE], **arms}),
            }
        )
    return {
        "settings": {"videos": VIDEOS, "rows": ROWS, "steps": STEPS, **BATCH},
        "rate": chosen_rate(place, RECIPE),
        "levels": levels,
    }


def _annotation_iou(path: Path) -> float:
    """The mean IoU of a data file's annotations with the true spans."""
    found = [annotation_iou(row) for _, row in read_jsonl(path)]
    return statistics.fmean(iou for iou in found if iou is not None)


def claims(record: Mapping[str, Any]) -> list[Claim]:
    return [
        Claim(
            says=says,
            source=source,
            where=f"annotation noise {level['noise']:g}",
            difference=find(level, to, since),
        )
        for says, source, to, since in CLAIMS
        for level in record["levels"]
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: mean IoU of each arm, and how right the annotations of its rows are, at each level."""
    settings, levels = record["settings"], record["levels"]
    pools = [spread(level["annotation_iou"]["pool"], 2) for level in levels]
    yield (
        f"{settings['rows']} rows of a pool of {settings['videos']} videos, {settings['steps']} steps of "
        f"{settings['optim.batch_size']} prompts, Video-OPD with the estimator full at rate "
        f"{record['rate']:g}. Mean IoU over the rows of all test sets, ± the standard deviation over seeds; "
        "beside it, the mean IoU of the chosen rows' annotations with the true spans, which is "
        f"{' and '.join(pools)} in the pools:\n"
    )
    heads = [f"noise {level['noise']:g} | annotations" for level in levels]
    yield "| | " + " | ".join(heads) + " |"
    yield "|---|" + "---|---|" * len(levels)
    for arm, (name, _) in ARMS.items():
        cells = [
            f"{spread(level['mIoU'][arm][POOLED])} | {spread(level['annotation_iou'][arm], 2)}"
            for level in levels
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
