"""The gain from TVDF: Tables 2 and 7 on the generated world, at an equal number of training samples.

    python benchmarks/curriculum.py --out runs/curriculum --seeds 0 1 2 --k 256 --steps 24

For each seed a pool of candidates is scored once; every arm chooses ``k`` of them by ``video-opd select`` and
trains Video-OPD on them with the same recipe, steps and seed. Arms of table 2: no TVDF (random rows), TRPV
only (random rows that pass the gate), DBTP only (largest δ, no gate), both. Arms of table 7: four samplers
behind the gate; ``topk`` is "both".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from common import (
    BASE,
    TEACHER,
    machine,
    make_pools,
    mean_miou,
    parser,
    run_all,
    student_scores,
    table,
    train_command,
    video_opd,
)
from common import write_result as write

from video_opd.world.demo import shipped
from video_opd.world.measure import make_test_sets

POOL_SEED = 600  # + the run's seed
# The flags that each arm gives ``video-opd select``.
ARMS: dict[str, list[str]] = {
    "no TVDF (random)": ["--strategy", "random"],
    "TRPV only (random behind the gate)": ["--strategy", "random", "--min-teacher-iou", "0.5"],
    "DBTP only (top-k, no gate)": ["--strategy", "topk", "--min-teacher-iou", "0"],
    "TRPV + DBTP (top-k)": ["--strategy", "topk"],
    "TRPV + DSUS": ["--strategy", "dsus"],
    "TRPV + BBDS": ["--strategy", "bbds"],
    "TRPV + GWDS": ["--strategy", "gwds"],
}


def main() -> None:
    arguments = parse()
    out, seeds = Path(arguments.out), arguments.seeds
    tests = make_test_sets(out / "test")
    pools = make_pools(out, arguments.seeds, POOL_SEED, arguments.videos)
    models = ["--student", shipped(BASE), "--teacher", shipped(TEACHER)]
    run_all(
        [score_command(models, pools[seed], scores_of(out, seed), seed) for seed in seeds], arguments.jobs
    )
    trainings, summaries = [], {}
    for seed in seeds:
        for number, (arm, words) in enumerate(ARMS.items()):
            chosen = out / f"selected-{seed}-{number}.jsonl"
            summaries[f"{arm}, seed {seed}"] = select(
                words, pools[seed], scores_of(out, seed), chosen, arguments.k
            )
            trainings.append(
                train_command(
                    "video-opd",
                    data=chosen,
                    tests=tests,
                    out=out / f"arm-{number}-{seed}",
                    clips=out / "clips",
                    seed=seed,
                    steps=arguments.steps,
                )
            )
    run_all(trainings, arguments.jobs)
    rows = {
        arm: [student_scores(out / f"arm-{number}-{seed}", tests) for seed in seeds]
        for number, arm in enumerate(ARMS)
    }
    print(table(rows))
    print(orderings(rows))
    write(
        "curriculum",
        {
            "command": sys.argv,
            "machine": machine(),
            "settings": vars(arguments),
            "selections": summaries,
            "scores": rows,
        },
    )


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos and runs")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--videos", type=int, default=160, help="of the pool, four candidates each")
    options.add_argument("--k", type=int, default=256, help="rows that each arm trains on")
    options.add_argument("--steps", type=int, default=24)
    options.add_argument("--jobs", type=int, default=2, help="commands at a time, one thread each")
    return options.parse_args()


def scores_of(out: Path, seed: int) -> Path:
    return out / f"scores-{seed}.jsonl"


def score_command(models: list[Any], pool: Path, scores: Path, seed: int) -> list[str]:
    more = ["--seed", seed, "--max-new-tokens", 16, "--batch-size", 32]
    return video_opd("score", *models, "--data", pool, "--out", scores, *more)


def select(words: list[str], pool: Path, scores: Path, chosen: Path, k: int) -> dict[str, Any]:
    """Runs the command, and keeps what it says of its choice."""
    import subprocess

    files = ["--data", pool, "--scores", scores, "--out", chosen]
    command = video_opd("select", *files, "--k", k, *words, "--json")
    summary = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {key: summary[key] for key in ("rows", "failed_gate", "candidates", "selected", "filled")}


def orderings(rows: dict[str, list[dict[str, dict[str, Any]]]]) -> str:
    """How the arms compare with random rows, seed by seed."""
    random, *others = rows
    lines = ["", "| compared with random rows | mean difference | seeds above |", "|---|---|---|"]
    for arm in others:
        gaps = [mean_miou(a) - mean_miou(b) for a, b in zip(rows[arm], rows[random], strict=True)]
        lines.append(
            f"| {arm} | {statistics.fmean(gaps):+.1f} | {sum(gap > 0 for gap in gaps)} of {len(gaps)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
