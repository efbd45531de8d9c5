"""Every method from one base, on the same rows, with the same steps and seeds: held-out mIoU and time a step.

    python benchmarks/compare_methods.py --out runs/compare --seeds 0 1 2 --steps 40
    python benchmarks/compare_methods.py --out runs/figure6 --methods video-opd grpo --engine plain \
        --seeds 0 --steps 4 --jobs 1 --no-evaluation --name figure6

Each run is the command ``video-opd train recipes/tiny/METHOD.yaml``; a killed comparison continues. Rows are
those of generated training videos as they come: nobody selects. Intervals are bootstrap over the videos of
the test set; the mean over the three sets has the spread over seeds beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from video_opd.jsonl import read_jsonl
from video_opd.world.demo import shipped
from video_opd.world.make import make_world
from video_opd.world.measure import evaluate_model, make_test_sets

ROOT = Path(__file__).parents[1]
METHODS = ("sft", "op-rkd", "op-fkd", "grpo", "video-opd")
TRAIN_SEED = 300  # of the pool, + the run's seed


def main() -> None:
    arguments = parse()
    out = Path(arguments.out)
    tests = make_test_sets(out / "test")
    pools = {
        seed: make_world(out / f"pool-{seed}", videos={"train": arguments.videos}, seed=TRAIN_SEED + seed)
        for seed in arguments.seeds
    }
    runs = [(method, seed) for seed in arguments.seeds for method in arguments.methods]

    def run(job: tuple[str, int]) -> None:
        method, seed = job
        command = command_of(arguments, method, pools[seed]["train"], tests, out / f"{method}-{seed}", seed)
        threads = {} if arguments.jobs == 1 else {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env={**os.environ, **threads, "OMP_WAIT_POLICY": "PASSIVE"})

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, runs))
    record = {
        "command": sys.argv,
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__},
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "engine": arguments.engine,
        "jobs": arguments.jobs,
        "methods": {
            method: summary(method, arguments.seeds, tests, out, arguments.evaluation)
            for method in arguments.methods
        },
    }
    if arguments.evaluation:
        record["models"] = {
            name: {
                split: scores(evaluate_model(name, shipped(name), split, data, out / "eval"))
                for split, data in tests.items()
            }
            for name in ("tiny-base", "tiny-teacher")
        }
    result = ROOT / "benchmarks" / "results" / f"{arguments.name}.json"
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    print(f"wrote {result.relative_to(ROOT)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for videos and runs")
    parser.add_argument("--name", default="compare_methods", help="of the file in benchmarks/results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--videos", type=int, default=100, help="generated training videos, four rows each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--engine", default="prefix", choices=("prefix", "plain"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--evaluation", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def command_of(
    arguments: argparse.Namespace, method: str, data: Path, tests: dict[str, Path], out: Path, seed: int
) -> list[str]:
    changes = {
        "data.train": data,
        "data.cache_dir": out.parent / "clips",
        "data.workers": 1,
        "model.path": shipped("tiny-base"),
        "model.engine": arguments.engine,
        "optim.max_steps": arguments.steps,
        "optim.batch_size": arguments.batch_size,
        "run.seed": seed,
        "run.dir": out,
        "run.save_every": arguments.steps,
        "run.trackers": "[]",
        "evaluate.data": "[" + ", ".join(str(path) for path in tests.values()) + "]"
        if arguments.evaluation
        else "[]",
        "evaluate.batch_size": 32,
    }
    if method in ("video-opd", "op-rkd", "op-fkd"):
        changes["teacher.path"] = shipped("tiny-teacher")
    recipe = ROOT / "recipes" / "tiny" / f"{method}.yaml"
    words = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "video_opd", "train", str(recipe), *words]


def summary(
    method: str, seeds: list[int], tests: dict[str, Path], out: Path, evaluation: bool
) -> dict[str, Any]:
    """Of one method: scores of every seed and test set, and the median seconds a step."""
    step_s = [
        row["time/step_s"]
        for seed in seeds
        for _, row in read_jsonl(out / f"{method}-{seed}" / "metrics.jsonl")
        if row["step"] > 1  # the first has the checks in it
    ]
    found: dict[str, Any] = {"step_s": statistics.median(step_s), "seeds": {}}
    if evaluation:
        for seed in seeds:
            found["seeds"][seed] = {
                split: scores(
                    json.loads((out / f"{method}-{seed}/eval/student-{data.stem}.json").read_text())
                )
                for split, data in tests.items()
            }
    return found


def scores(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "mIoU": record["mIoU"],
        "ci95": record["ci95"]["mIoU"],
        "R@0.5": record["R@0.5"],
        "R@0.7": record["R@0.7"],
        "best_constant": record["best_constant"]["mIoU"],
        "query_swap": record["query_swap"]["share"],
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: mIoU a test set (means over seeds), and over all sets ± the spread over seeds."""
    splits = ("short", "long", "subtle")
    if "models" not in record:
        base = record["methods"][next(iter(record["methods"]))]["step_s"]
        lines = ["| method | seconds a step | of the first |", "|---|---|---|"]
        for method, found in record["methods"].items():
            lines.append(f"| {method} | {found['step_s']:.2f} | {found['step_s'] / base:.2f} |")
        return "\n".join(lines)
    lines = [
        "| | "
        + " | ".join(f"{split} mIoU [95%]" for split in splits)
        + " | mean (± over seeds) | s a step |",
        "|---|" + "---|" * (len(splits) + 2),
    ]
    for name, found in record["models"].items():
        cells = [
            f"{found[s]['mIoU']:.1f} [{found[s]['ci95'][0]:.1f}, {found[s]['ci95'][1]:.1f}]" for s in splits
        ]
        mean = statistics.fmean(found[s]["mIoU"] for s in splits)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {mean:.1f} | |")
    for method, found in record["methods"].items():
        seeds = list(found["seeds"].values())
        cells = []
        for split in splits:
            mean = statistics.fmean(seed[split]["mIoU"] for seed in seeds)
            low, high = (statistics.fmean(seed[split]["ci95"][i] for seed in seeds) for i in (0, 1))
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        means = [statistics.fmean(seed[split]["mIoU"] for split in splits) for seed in seeds]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        lines.append(
            f"| {method} | "
            + " | ".join(cells)
            + f" | {statistics.fmean(means):.1f} ± {spread:.1f} | {found['step_s']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
