"""The functions that experiments share: runs of the ``video-opd`` command, and tables of their results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from video_opd.jsonl import read_jsonl
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPLITS = ("short", "long", "subtle")
BASE, TEACHER = "tiny-base", "tiny-teacher"

Scores = Mapping[str, Mapping[str, Any]]
"""The results of one model: a record for each test set."""


def train_command(
    method: str,
    *,
    data: Path,
    tests: Mapping[str, Path],
    out: Path,
    clips: Path,
    seed: int,
    steps: int,
    changes: Mapping[str, Any] | None = None,
) -> list[str]:
    """``video-opd train recipes/tiny/METHOD.yaml`` on ``data``, evaluated on ``tests`` at the end."""
    settings: dict[str, Any] = {
        "data.train": data,
        "data.cache_dir": clips,
        "data.workers": 1,
        "model.path": shipped(BASE),
        "optim.max_steps": steps,
        "run.seed": seed,
        "run.dir": out,
        "run.save_every": steps,
        "run.trackers": "[]",
        "evaluate.data": "[" + ", ".join(str(path) for path in tests.values()) + "]",
        "evaluate.batch_size": 32,
        **(changes or {}),
    }
    if method in ("video-opd", "op-rkd", "op-fkd"):
        settings.setdefault("teacher.path", shipped(TEACHER))
    recipe = ROOT / "recipes" / "tiny" / f"{method}.yaml"
    return video_opd(
        "train", recipe, *(word for key, value in settings.items() for word in (f"--{key}", value))
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser that shows a script's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def video_opd(*words: Any) -> list[str]:
    return [sys.executable, "-m", "video_opd", *(str(word) for word in words)]


def run_all(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """All of them, ``jobs`` at a time: with one thread each, if several. What was killed continues."""
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "OMP_WAIT_POLICY": "PASSIVE"}

    def run(command: Sequence[str]) -> None:
        subprocess.run(command, check=True, env=environment)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))


def machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "platform": platform.platform(), "torch": torch.__version__}


def write_result(name: str, record: Mapping[str, Any]) -> None:
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


def step_seconds(runs: Sequence[Path]) -> float:
    """Median over the steps of all runs, but for the first of each, which has the checks in it."""
    return statistics.median(
        row["time/step_s"] for run in runs for _, row in read_jsonl(run / "metrics.jsonl") if row["step"] > 1
    )


def make_pools(out: Path, seeds: Sequence[int], first_seed: int, videos: int) -> dict[int, Path]:
    """A data file of generated training videos for each seed; ``first_seed`` tells experiments apart."""
    return {
        seed: make_world(out / f"pool-{seed}", videos={"train": videos}, seed=first_seed + seed)["train"]
        for seed in seeds
    }


def scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation that a table shows."""
    return {
        "mIoU": record["mIoU"],
        "ci95": record["ci95"]["mIoU"],
        "R@0.5": record["R@0.5"],
        "R@0.7": record["R@0.7"],
        "best_constant": record["best_constant"]["mIoU"],
        "query_swap": record["query_swap"]["share"],
    }


def table(
    rows: Mapping[str, Sequence[Scores]], extra: Mapping[str, str] | None = None, header: str = ""
) -> str:
    """Markdown: mIoU a test set (means over seeds, of the intervals too), and over all sets ± over seeds.

    ``rows`` has the scores of each seed; ``extra`` one more cell for a row.
    """
    lines = [
        "| | "
        + " | ".join(f"{split} [95%]" for split in SPLITS)
        + f" | mean ± over seeds |{header and f' {header} |'}",
        "|---|" + "---|" * (len(SPLITS) + 1 + bool(header)),
    ]
    for name, seeds in rows.items():
        cells = []
        for split in SPLITS:
            mean = statistics.fmean(seed[split]["mIoU"] for seed in seeds)
            low, high = (statistics.fmean(seed[split]["ci95"][i] for seed in seeds) for i in (0, 1))
            cells.append(f"{mean:.1f} [{low:.1f}, {high:.1f}]")
        means = [statistics.fmean(seed[split]["mIoU"] for split in SPLITS) for seed in seeds]
        spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
        cells.append(f"{statistics.fmean(means):.1f}{spread}")
        if header:
            cells.append((extra or {}).get(name, ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
