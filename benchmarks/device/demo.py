"""The main job, from generated videos to a report, by the command that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from section import Report, run

from video_opd.jsonl import read_jsonl

STEPS, TINY_STEPS = 10, 2


def run_demo(report: Report, tiny: bool) -> None:
    steps = TINY_STEPS if tiny else STEPS
    report.note(summary="the demo has not ended")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        command = [sys.executable, "-m", "video_opd", "demo", "--steps", str(steps), "--out", str(out)]
        began_s = time.perf_counter()
        code = subprocess.run(command).returncode
        took_s = time.perf_counter() - began_s
        report.add(f"video-opd demo --steps {steps}", f"exit status {code}, {took_s:.0f} s", code == 0)
        if code == 0:
            add_results(report, out, steps, took_s)


def add_results(report: Report, out: Path, steps: int, took_s: float) -> None:
    rows = [row for _, row in read_jsonl(out / "metrics.jsonl")]
    environment = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    del environment["command"]  # it names folders of the machine
    report.add("steps", f"{len(rows)}, the last took {rows[-1]['time/step_s']:.2f} s", len(rows) == steps)
    for name in ("base", "student", "teacher"):
        found = json.loads((out / "eval" / f"{name}-short.json").read_text(encoding="utf-8"))
        report.add(f"{name}, short test set", f"mIoU {found['mIoU']:.1f}", mIoU=found["mIoU"])
    report.note(
        environment=environment,
        seconds=took_s,
        summary=f"{took_s:.0f} s, {steps} steps of {rows[-1]['time/step_s']:.2f} s",
    )


if __name__ == "__main__":
    sys.exit(run(run_demo, __doc__))
