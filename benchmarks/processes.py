"""One batch on one process or several: seconds a step, what each process holds, and the same result.

    python benchmarks/processes.py --out runs/processes --processes 2

``video-opd train recipes/tiny/video-opd.yaml`` under ``torchrun``, with DDP and with ``model.sharding
fsdp2``, one thread each; the ways take turns. On two cores two processes can at best be twice as fast.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import machine, make_pools, parser, step_seconds, train_command, write_result

from video_opd.bench.timing import summary
from video_opd.jsonl import read_jsonl

POOL_SEED = 1000


def main() -> None:
    arguments = parse()
    out, count = Path(arguments.out), arguments.processes
    (pool,) = make_pools(out, [0], POOL_SEED, arguments.videos).values()
    ways: dict[str, tuple[int, str]] = {
        "one process": (1, "null"),
        f"{count} processes, DDP": (count, "null"),
        f"{count} processes, FSDP2": (count, "fsdp2"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for repeat in range(arguments.repeats):
        for number, (name, (processes, sharding)) in enumerate(ways.items()):
            run = out / f"run-{number}-{repeat}"
            command = train_command(
                "video-opd",
                data=pool,
                tests={},
                out=run,
                clips=out / "clips",
                seed=0,
                steps=arguments.steps,
                changes={"model.sharding": sharding, "run.check": "false"},
            )
            peaks[name] = launch(command, processes)
            seconds[name].append(step_seconds([run]))
            print(f"{name}: {seconds[name][-1]:.2f} s a step, {peaks[name] / 2**20:.0f} MiB", flush=True)
    found: dict[str, dict[str, Any]] = summary(seconds, "one process")
    for number, name in enumerate(ways):
        found[name]["peak_bytes"] = peaks[name]
        rows = [row for _, row in read_jsonl(out / f"run-{number}-0" / "metrics.jsonl")]
        found[name]["loss"] = [row["loss"] for row in rows]
    print(table(found))
    for name, way in found.items():
        off = max(abs(a - b) for a, b in zip(way["loss"], found["one process"]["loss"], strict=True))
        print(f"{name}: losses differ from one process's by {off:.2g} at most")
    record = {"command": sys.argv, "machine": machine(), "settings": vars(arguments), "ways": found}
    write_result("processes", record)


def launch(command: list[str], processes: int) -> int:
    """Runs it on so many processes: the peak of the largest one's resident memory, in bytes."""
    launched = ["/usr/bin/env", "python3", "-c", MEASURED, *under(command, processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    printed = subprocess.run(launched, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    return int(re.findall(r"^peak (\d+)$", printed, re.M)[-1])


# RUSAGE_CHILDREN keeps the largest child that was waited for: a process of its own for each run.
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def under(command: list[str], processes: int) -> list[str]:
    """``python -m video_opd …`` by torchrun, where there is more than one process."""
    if processes == 1:
        return command
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [command[0], *launcher, *command[1:]]


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| | seconds a step | faster | peak of a process |", "|---|---|---|---|"]
    for name, way in found.items():
        speed = way["speedup"]
        lines.append(
            f"| {name} | {way['seconds']:.2f} | {speed['median']:.2f}× [{speed['low']:.2f}, "
            f"{speed['high']:.2f}] | {way['peak_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos and runs")
    options.add_argument("--processes", type=int, default=2)
    options.add_argument("--videos", type=int, default=24, help="of the pool, four candidates each")
    options.add_argument("--steps", type=int, default=5, help="of a run; the first is not counted")
    options.add_argument("--repeats", type=int, default=3, help="turns")
    return options.parse_args()


if __name__ == "__main__":
    main()
