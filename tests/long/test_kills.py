"""Kills of launchers, workers and pools: nobody stays alive, and the repeated command ends the same.

``VIDEO_OPD_TIMES`` says how often each is tried.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SRC
from process_cases import descendants, is_alive, needs_proc, wait_until

from video_opd.jsonl import read_jsonl

pytestmark = [pytest.mark.slow, needs_proc]

TIMES = int(os.environ.get("VIDEO_OPD_TIMES") or 2)
CHECKPOINTS = SRC / "video_opd" / "world" / "checkpoints"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
OURS = [sys.executable, "-m", "video_opd"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(words: list[str], folder: Path, **options: Any) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(words, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, **options)


def finish(words: list[str], folder: Path) -> None:
    assert start(words, folder).wait() == 0, (folder / "log").read_text()


def kill_one(process: subprocess.Popen[bytes], choose: Callable[[int], int]) -> None:
    """Kills the launcher or one of its workers, and waits until all of them have ended."""
    family = descendants(process.pid) | {process.pid}
    victim = choose(process.pid)
    os.kill(victim, signal.SIGKILL)
    began_s = time.monotonic()
    process.wait()
    wait_until(lambda: not any(map(is_alive, family)))
    print(f"{choose.__name__} killed: nobody was alive {time.monotonic() - began_s:.1f} s later")


def launcher(pid: int) -> int:
    return pid


def worker(pid: int) -> int:
    """A process below the launcher that runs our command."""
    found = [
        child for child in descendants(pid) if b"video_opd" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return random.choice(found or [pid])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    finish([*OURS, *["world", "make", "--out", "w", "--videos", "train=8", "--workers", "2"]], folder)
    return folder / "w" / "train.jsonl"


@pytest.mark.parametrize("choose", [launcher, worker])
def test_a_run_on_two_processes(rows: Path, tmp_path: Path, choose: Callable[[int], int]) -> None:
    """Killed in the middle of its steps, again and again, until it has been killed so often as was asked."""
    words = [*TORCHRUN, "-m", "video_opd", "train", str(ROOT / "recipes" / "tiny" / "video-opd.yaml")]
    words += ["--model.path", str(CHECKPOINTS / "tiny-base"), "--data.train", str(rows), "--run.dir", "run"]
    words += ["--teacher.path", str(CHECKPOINTS / "tiny-teacher"), "--run.trackers", "[]"]
    words += ["--optim.batch_size", "4", "--optim.micro_batch_size", "2", "--run.save_every", "1"]
    words += ["--optim.max_steps", str(2 + 2 * TIMES)]
    finish(words, tmp_path / "whole")
    draws, kills = random.Random(0), 0
    run = tmp_path / "killed" / "run"
    while kills < TIMES:
        before = steps_of(run)
        process = start(words, run.parent)
        wait_until(lambda p=process, n=before: p.poll() is not None or steps_of(run) > n)  # type: ignore[misc]
        time.sleep(draws.uniform(0.0, 0.5))
        if process.poll() is None:
            kill_one(process, choose)
            kills += 1
        elif (run / "done.json").exists():  # the machine was faster
            shutil.rmtree(run)
    finish(words, run.parent)
    whole = tmp_path / "whole" / "run"
    for name in ("model/model.safetensors", "rollouts.jsonl"):
        assert (whole / name).read_bytes() == (run / name).read_bytes(), name
    steps = [row["step"] for _, row in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, 3 + 2 * TIMES))


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("choose", [launcher, worker])
def test_predictions_on_two_processes(rows: Path, tmp_path: Path, choose: Callable[[int], int]) -> None:
    words = [*TORCHRUN, "-m", "video_opd", "predict", str(CHECKPOINTS / "tiny-base"), str(rows)]
    words += ["--out", "p.jsonl", "--max-new-tokens", "16", "--batch-size", "1"]
    words += ["--video.min_frame_tokens", "4", "--video.max_frame_tokens", "8"]
    finish(words, tmp_path / "whole")
    killed = tmp_path / "killed"
    for number in range(TIMES):
        process = start(words, killed)
        wait_until(lambda p=process: p.poll() is not None or any(killed.glob("p.jsonl.part-*")))  # type: ignore[misc]
        time.sleep(random.Random(number).uniform(0.0, 0.2))
        if process.poll() is None:
            kill_one(process, choose)
    finish(words, killed)
    assert files_of(killed) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_world(tmp_path: Path, number: signal.Signals, times: int) -> None:
    """Its parent is killed, or everybody is interrupted, once or twice."""
    words = [*OURS, *["world", "make", "--out", "w", "--videos", "train=12", "long=2", "--workers", "2"]]
    finish(words, tmp_path / "whole")
    killed = tmp_path / "killed"
    for trial in range(TIMES):
        process = start(words, killed, start_new_session=True)
        wait_until(lambda p=process: p.poll() is not None or bool(files_of(killed)))  # type: ignore[misc]
        time.sleep(random.Random(trial).uniform(0.0, 1.0))
        family = descendants(process.pid) | {process.pid}
        for _ in range(times):
            if process.poll() is None:
                os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
                time.sleep(0.05)
        began_s = time.monotonic()
        process.wait(timeout=300)
        wait_until(lambda f=family: not any(map(is_alive, f)))  # type: ignore[misc]
        print(f"{number.name} × {times}: {process.returncode}, {time.monotonic() - began_s:.1f} s")
    finish(words, killed)
    assert files_of(killed) == files_of(tmp_path / "whole")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the log, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "log"
    }
