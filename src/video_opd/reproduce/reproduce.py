"""Runs experiments and keeps what they found: ``NAME.json`` for each, and the page that is made from them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from video_opd.files import write_text
from video_opd.progress import duration, log
from video_opd.reproduce.claims import SEEDS
from video_opd.reproduce.places import Place
from video_opd.reproduce.tasks import commits_of, expected_seconds, run_stages
from video_opd.training.run_folder import git_commit


def reproduce(
    experiments: Sequence[ModuleType],
    out: str | Path,
    results: str | Path,
    *,
    seeds: int = SEEDS,
    jobs: int = 2,
) -> None:
    """Runs the experiments with the seeds 0 to ``seeds`` − 1, ``jobs`` commands at a time.

    Videos and runs are kept in ``out``, and what a killed run finished is not run again. The result of each
    is written to the folder ``results`` as ``NAME.json``. Raises UserError if a command fails, or if ``out``
    holds what was made by other commands or from other files.
    """
    place, numbers = Place(out=Path(out).resolve()), list(range(seeds))
    logs = place.out / "logs"
    plans = {experiment: experiment.stages(place, numbers) for experiment in experiments}
    total_s = sum(expected_seconds(stages, jobs) for stages in plans.values())
    log(f"about {duration(total_s)} of training and answering are left, {jobs} commands at a time")
    for experiment, stages in plans.items():
        log(f"{experiment.TITLE}: {sum(map(len, stages))} runs")
        experiment.prepare(place, numbers)
        run_stages(stages, logs, jobs)
        record = {
            "experiment": experiment.NAME,
            "seeds": numbers,
            "commit": git_commit(),
            "commits_of_runs": commits_of(stages, logs),
            "machine": machine(),
            "result": experiment.result(place, numbers),
        }
        text = json.dumps(record, indent=1) + "\n"
        log(f"wrote {write_text(result_file(results, experiment.NAME), text)}")


def result_file(results: str | Path, name: str) -> Path:
    return Path(results) / f"{name}.json"


def machine() -> dict[str, Any]:
    import torch

    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name: on Linux the kernel knows it, and Python does not."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
