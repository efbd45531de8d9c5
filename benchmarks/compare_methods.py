"""Every method from one base, on the same rows, with the same steps and seeds: held-out mIoU and time a step.

    python benchmarks/compare_methods.py --out runs/compare --seeds 0 1 2 --steps 40
    python benchmarks/compare_methods.py --out runs/figure6 --methods video-opd grpo --engine plain \
        --seeds 0 --steps 4 --jobs 1 --no-evaluation --name figure6

Each run is the command ``video-opd train recipes/tiny/METHOD.yaml``, with the changes of its arm; a killed
comparison continues. Rows are those of generated training videos as they come: nobody selects. Intervals are
bootstrap over the videos of the test set; the mean over the three sets has the spread over seeds beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import (
    machine,
    make_pools,
    parser,
    run_all,
    shipped_scores,
    step_seconds,
    student_scores,
    table,
    train_command,
    write_result,
)

from video_opd.world.measure import make_test_sets

# Each arm is a recipe of ``recipes/tiny`` and the changes to it.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "op-rkd": ("op-rkd", {}),
    "op-fkd": ("op-fkd", {}),
    "grpo": ("grpo", {}),
    "video-opd": ("video-opd", {"loss.baseline": "none"}),  # the paper's, eq 6
    "video-opd-baseline": ("video-opd", {"loss.baseline": "kl"}),
    "video-opd-full": ("video-opd", {"loss.baseline": "none", "loss.estimator": "full"}),
}
TRAIN_SEED = 300  # of the pool, + the run's seed


def main() -> None:
    arguments = parse()
    out, seeds, methods = Path(arguments.out), arguments.seeds, arguments.methods
    tests = make_test_sets(out / "test")
    pools = make_pools(out, arguments.seeds, TRAIN_SEED, arguments.videos)
    changes: dict[str, Any] = {
        "model.engine": arguments.engine,
        "optim.lr": "3e-4",  # the same for every method
        "optim.batch_size": arguments.batch_size,
        "optim.micro_batch_size": min(8, arguments.batch_size),
    }
    commands = [
        train_command(
            ARMS[method][0],
            data=pools[seed],
            tests=tests if arguments.evaluation else {},
            out=out / f"{method}-{seed}",
            clips=out / "clips",
            seed=seed,
            steps=arguments.steps,
            changes=changes | ARMS[method][1],
        )
        for seed in seeds
        for method in methods
    ]
    run_all(commands, arguments.jobs)
    step_s = {method: step_seconds([out / f"{method}-{seed}" for seed in seeds]) for method in methods}
    record: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine(),
        "settings": vars(arguments),
        "step_s": step_s,
    }
    if arguments.evaluation:
        rows = shipped_scores(tests, out / "eval")
        rows |= {
            method: [student_scores(out / f"{method}-{seed}", tests) for seed in seeds] for method in methods
        }
        record["scores"] = rows
        print(table(rows, {name: f"{value:.2f}" for name, value in step_s.items()}, "s a step"))
    else:
        first = step_s[methods[0]]
        print("| method | seconds a step | of the first |\n|---|---|---|")
        for method, value in step_s.items():
            print(f"| {method} | {value:.2f} | {value / first:.2f} |")
    write_result(arguments.name, record)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos and runs")
    options.add_argument("--name", default="compare_methods", help="of the file in benchmarks/results")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--videos", type=int, default=100, help="generated training videos, four rows each")
    options.add_argument("--methods", nargs="+", default=list(ARMS), choices=list(ARMS))
    options.add_argument("--engine", default="prefix", choices=("prefix", "plain"))
    options.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    options.add_argument("--evaluation", action=argparse.BooleanOptionalAction, default=True)
    return options.parse_args()


if __name__ == "__main__":
    main()
