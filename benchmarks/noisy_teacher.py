"""The effect of a teacher's systematic error on the student, with TRPV's gate and without it.

    python benchmarks/noisy_teacher.py --out runs/noisy-teacher --seeds 0 1 2

The teacher is the shipped one, fine-tuned (``video-opd train``, method sft) until it answers queries of one
event family with the wrong span and all others as before: the event's, some seconds later, or earlier where
there is no room. A known share of the candidates asks for that family. Students are then trained by Video-OPD
under that teacher on rows that ``video-opd select`` chose with and without the gate, at random and by the
reverse KL, which asks for rows where teacher and student differ. For that family and for the rest: mIoU with
the truth, and with what the teacher was taught.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import BASE, TEACHER, machine, make_pools, parser, run_all, train_command, video_opd, write_result

from video_opd.data.annotations import read_samples, write_rows
from video_opd.evaluation.metrics import evaluate
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.rows import score_rows
from video_opd.jsonl import read_jsonl
from video_opd.types import Sample
from video_opd.world.make import make_world
from video_opd.world.measure import make_test_sets
from video_opd.world.shipped import shipped

LESSON_SEED, POOL_SEED = 800, 700  # + the run's seed, for the pool
GATE = ["--min-teacher-iou", "0.5"]
NO_GATE = ["--min-teacher-iou", "0"]
# The flags that each arm gives ``video-opd select``.
ARMS: dict[str, list[str]] = {
    "random, gate": ["--strategy", "random", *GATE],
    "random, no gate": ["--strategy", "random", *NO_GATE],
    "reverse KL, gate": ["--strategy", "topk", "--rank-by", "reverse_kl", *GATE],
    "reverse KL, no gate": ["--strategy", "topk", "--rank-by", "reverse_kl", *NO_GATE],
}


def main() -> None:
    arguments = parse()
    out, family = Path(arguments.out), arguments.family
    tests = make_test_sets(out / "test")
    teacher = noisy_teacher(out, family, arguments)
    pools = {
        seed: with_share(pool, family, arguments.share, seed)
        for seed, pool in make_pools(out, arguments.seeds, POOL_SEED, arguments.videos).items()
    }
    models = ["--student", shipped(BASE), "--teacher", teacher, "--reverse-kl"]
    run_all(
        [
            video_opd(
                "score", *models, "--data", pool, "--out", out / f"scores-{seed}.jsonl",
                "--seed", seed, "--max-new-tokens", 16, "--batch-size", 32,
            )
            for seed, pool in pools.items()
        ],
        arguments.jobs,
    )  # fmt: skip
    trainings, chosen_share = [], {}
    for seed, pool in pools.items():
        for number, (arm, words) in enumerate(ARMS.items()):
            chosen = out / f"selected-{number}-{seed}.jsonl"
            files = ["--data", pool, "--scores", out / f"scores-{seed}.jsonl", "--out", chosen]
            select = video_opd("select", *files, "--k", arguments.k, *words)
            subprocess.run(select, check=True, capture_output=True)
            sources = [row["source"] for _, row in read_jsonl(chosen)]
            chosen_share[f"{arm}, seed {seed}"] = sources.count(family) / len(sources)
            trainings.append(
                train_command(
                    "video-opd",
                    data=chosen,
                    tests=tests,
                    out=out / f"student-{number}-{seed}",
                    clips=out / "clips",
                    seed=seed,
                    steps=arguments.steps,
                    changes={"teacher.path": teacher},
                )
            )
    evaluations = [
        (name, model, data)
        for name, model in (
            ("base", shipped(BASE)),
            ("clean teacher", shipped(TEACHER)),
            ("teacher", teacher),
        )
        for data in tests.values()
    ]
    predictions = {name: out / "answers" / name for name, _, _ in evaluations}
    run_all(
        trainings
        + [
            video_opd(
                "predict", model, data, "--out", predictions[name] / f"student-{data.stem}.jsonl",
                "--max-new-tokens", 16, "--batch-size", 32,
            )
            for name, model, data in evaluations
        ],
        arguments.jobs,
    )  # fmt: skip
    rows = {
        name: [results_of(folder, tests, family, arguments.shift)] for name, folder in predictions.items()
    }
    for number, arm in enumerate(ARMS):
        rows[arm] = [
            results_of(out / f"student-{number}-{seed}" / "eval", tests, family, arguments.shift)
            for seed in arguments.seeds
        ]
    wrong = {seed: teacher_errors(out / f"scores-{seed}.jsonl", pool, family) for seed, pool in pools.items()}
    print(table(rows, family))
    record = {"command": sys.argv, "machine": machine(), "settings": vars(arguments), "scores": rows}
    write_result(
        "noisy_teacher", {**record, "share_of_family_chosen": chosen_share, "teacher_on_pool": wrong}
    )


def noisy_teacher(out: Path, family: str, arguments: argparse.Namespace) -> Path:
    """The shipped teacher after lessons in which spans of ``family`` are shifted."""
    shift_s = arguments.shift
    data = make_world(out / "lessons", videos={"train": arguments.lessons}, seed=LESSON_SEED)["train"]
    samples = read_samples(data)
    mine = [sample for sample in samples if sample.source == family]
    # As many lessons about the family as about all others: at its share of the videos it is not believed.
    again = max(1, round((len(samples) - len(mine)) / len(mine)))
    rows = [taught(sample, family, shift_s) for sample in samples]
    rows += [
        replace(taught(sample, family, shift_s), id=f"{sample.id}, again {i}")
        for i in range(1, again)
        for sample in mine
    ]
    shifted = data.with_name("shifted.jsonl")
    write_rows(shifted, rows)
    run = out / "noisy-teacher"
    lesson = train_command(
        "sft",
        data=shifted,
        tests={},
        out=run,
        clips=out / "clips",
        seed=0,
        steps=arguments.lesson_steps,
        changes={"model.path": shipped(TEACHER), "optim.lr": arguments.lesson_lr},
    )
    run_all([lesson], 1)
    return run / "model"


def taught(sample: Sample, family: str, by_s: float) -> Sample:
    """``sample`` with the span that the teacher is to believe in."""
    if sample.source != family:
        return sample
    assert sample.duration_s is not None, "the tiny world says how long its videos are"
    return replace(sample, spans=tuple(shift(span, by_s, sample.duration_s) for span in sample.spans))


def shift(span: tuple[float, float], by_s: float, duration_s: float) -> tuple[float, float]:
    """The span ``by_s`` seconds later, or earlier where there is no room for that."""
    start_s, end_s = span
    if end_s + by_s <= duration_s:
        return start_s + by_s, end_s + by_s
    return max(0.0, start_s - by_s), max(end_s - start_s, end_s - by_s)


def with_share(pool: Path, family: str, share: float, seed: int) -> Path:
    """The rows of ``pool`` without so many of other families that ``share`` are of this one."""
    samples = read_samples(pool)
    mine = [sample for sample in samples if sample.source == family]
    others = [sample for sample in samples if sample.source != family]
    random.Random(seed).shuffle(others)
    path = pool.with_name("candidates.jsonl")
    write_rows(path, mine + others[: round(len(mine) * (1 / share - 1))])
    return path


def results_of(folder: Path, tests: dict[str, Path], family: str, shift_s: float) -> dict[str, float]:
    """Returns mIoU over all test sets: the family against truth and lesson, and the other families."""
    truth: list[Sample] = []
    predictions: dict[str, Any] = {}
    for data in tests.values():
        truth += read_samples(data)
        predictions |= read_predictions(folder / f"student-{data.stem}.jsonl")
    mine = [sample for sample in truth if sample.source == family]
    others = [sample for sample in truth if sample.source != family]
    lesson = [taught(sample, family, shift_s) for sample in mine]
    return {
        "n": len(mine),
        "family": evaluate(mine, predictions).miou,
        "family_as_taught": evaluate(lesson, predictions).miou,
        "family_late_s": late_s(mine, predictions),
        "others": evaluate(others, predictions).miou,
        "others_late_s": late_s(others, predictions),
    }


def late_s(samples: Sequence[Sample], predictions: dict[str, Any]) -> float:
    """Returns how much later than its event a prediction lies: the median distance of the middles."""
    found = [
        sum(row.span) / 2 - sum(row.sample.spans[0]) / 2
        for row in score_rows(samples, predictions)
        if row.span is not None
    ]
    return statistics.median(found)


def teacher_errors(scores: Path, pool: Path, family: str) -> dict[str, float]:
    """Share of the candidates that belong to the family, and how many pass the gate, inside and outside."""
    source = {row["id"]: row["source"] for _, row in read_jsonl(pool)}
    passed: dict[bool, list[bool]] = {True: [], False: []}
    for _, row in read_jsonl(scores):
        passed[source[row["id"]] == family].append(row["teacher_iou"] >= 0.5)
    return {
        "share": len(passed[True]) / len(source),
        "passed_family": statistics.fmean(passed[True]),
        "passed_others": statistics.fmean(passed[False]),
    }


def table(rows: dict[str, list[dict[str, float]]], family: str) -> str:
    """Markdown; means over seeds, ± their standard deviation."""

    def cell(seeds: Sequence[float]) -> str:
        return f"{statistics.fmean(seeds):.1f}" + (
            f" ± {statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
        )

    lines = [
        f"| | '{family}': mIoU with the truth | with what the teacher was taught | others: mIoU |",
        "|---|---|---|---|",
    ]
    for name, seeds in rows.items():
        cells = [cell([seed[key] for seed in seeds]) for key in ("family", "family_as_taught", "others")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos and runs")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--family", default="moves right", help="the event family that is taught wrongly")
    options.add_argument("--shift", type=float, default=1.0, help="seconds by which its spans are wrong")
    options.add_argument(
        "--share", type=float, default=1 / 3, help="of the candidates that are of that family"
    )
    options.add_argument("--lessons", type=int, default=400, help="videos that the teacher is spoilt on")
    options.add_argument("--lesson-steps", type=int, default=120)
    options.add_argument("--lesson-lr", type=float, default=5e-4)
    options.add_argument("--videos", type=int, default=240, help="of the pool, four candidates each")
    options.add_argument("--k", type=int, default=320, help="rows that each arm trains on")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    return options.parse_args()


if __name__ == "__main__":
    main()
