"""Several rounds of TVDF against one with as many samples. Figure 5 and table 6 on the generated world.

    python benchmarks/rounds.py --out runs/rounds-against-one --seeds 0 1 2

For each seed and the same candidates: ``video-opd rounds recipes/tiny/rounds.yaml`` with three rounds of
``k`` rows, each scored with the last student, and with one round of three times the rows and steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import (
    BASE,
    ROOT,
    TEACHER,
    machine,
    make_pools,
    mean_miou,
    parser,
    run_all,
    shipped_scores,
    student_scores,
    table,
    video_opd,
    write_result,
)

from video_opd.world.demo import shipped
from video_opd.world.measure import make_test_sets

POOL_SEED = 900  # + the run's seed


def main() -> None:
    arguments = parse()
    out, seeds, rounds = Path(arguments.out), arguments.seeds, arguments.rounds
    tests = make_test_sets(out / "test")
    pools = make_pools(out, arguments.seeds, POOL_SEED, arguments.videos)

    def command(count: int, seed: int) -> list[str]:
        """``count`` rounds that share the samples and the steps of all."""
        settings: dict[str, Any] = {
            "model.path": shipped(BASE),
            "teacher.path": shipped(TEACHER),
            "data.train": pools[seed],
            "data.limit": "null",
            "data.cache_dir": out / "clips",
            "data.workers": 1,
            "run.seed": seed,
            "run.dir": folder(out, count, seed),
            "run.trackers": "[]",
            "evaluate.data": "[" + ", ".join(str(path) for path in tests.values()) + "]",
            "optim.max_steps": arguments.steps * rounds // count,
            "tvdf.k": arguments.k * rounds // count,
            "tvdf.batch_size": 32,
            "rounds.count": count,
        }
        words = (word for key, value in settings.items() for word in (f"--{key}", value))
        return video_opd("rounds", ROOT / "recipes" / "tiny" / "rounds.yaml", *words)

    run_all([command(count, seed) for seed in seeds for count in (rounds, 1)], arguments.jobs)
    rows = shipped_scores(tests, out / "eval")
    for number in range(1, rounds + 1):
        rows[f"round {number} of {rounds}"] = [
            student_scores(folder(out, rounds, seed) / f"round-{number}", tests) for seed in seeds
        ]
    rows[f"one round of {rounds} times the samples"] = [
        student_scores(folder(out, 1, seed) / "round-1", tests) for seed in seeds
    ]
    print(table(rows))
    last, one = list(rows)[-2:]
    gaps = [mean_miou(a) - mean_miou(b) for a, b in zip(rows[last], rows[one], strict=True)]
    print(f"{last} above {one}, seed by seed: " + ", ".join(f"{gap:+.1f}" for gap in gaps))
    summaries = {
        f"{count} rounds, seed {seed}": json.loads((folder(out, count, seed) / "rounds.json").read_text())
        for seed in seeds
        for count in (rounds, 1)
    }
    record = {"command": sys.argv, "machine": machine(), "settings": vars(arguments), "scores": rows}
    write_result("rounds", {**record, "summaries": summaries})


def folder(out: Path, count: int, seed: int) -> Path:
    return out / f"rounds-{count}-{seed}"


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos and runs")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--videos", type=int, default=320, help="of the pool, four candidates each")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--k", type=int, default=192, help="rows of one of the rounds")
    options.add_argument("--steps", type=int, default=24, help="optimiser steps of one of the rounds")
    options.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    return options.parse_args()


if __name__ == "__main__":
    main()
