"""Kills of launchers, workers, pools and single commands: nobody stays alive, and the files end as without.

Each kind of kill is tried ``VIDEO_OPD_TIMES`` times, and its longest time until nobody was alive is printed.
Launchers are torchrun's own. Single commands that need torch are forks of a process that has imported it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SRC
from process_cases import descendants, is_alive, needs_proc, wait_until

from video_opd.jsonl import read_jsonl

pytestmark = [pytest.mark.slow, needs_proc]

TIMES = int(os.environ.get("VIDEO_OPD_TIMES") or 2)
HERE = Path(__file__).parent
CHECKPOINTS = SRC / "video_opd" / "world" / "checkpoints"
BASE, TEACHER = str(CHECKPOINTS / "tiny-base"), str(CHECKPOINTS / "tiny-teacher")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
OURS = [sys.executable, "-m", "video_opd"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TORCHRUN += ["-m", "video_opd"]
SHORT = ["--max-new-tokens", "16", "--batch-size", "1"]
SHORT += ["--video.min_frame_tokens", "4", "--video.max_frame_tokens", "8"]
OURSELVES = ("log", "paused")  # files of these tests, not of the commands

Choose = Callable[[int], int]
ended_s: dict[str, list[float]] = {}  # kind of kill -> seconds until nobody was alive


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    for kind, times_s in ended_s.items():
        print(f"{kind}: {len(times_s)} kills, nobody was alive after {max(times_s):.1f} s at the latest")


class Forked:
    """A command that :class:`Commands` has started; of ``subprocess.Popen`` it has what is used here."""

    def __init__(self, commands: Commands, pid: int) -> None:
        self.commands, self.pid, self.returncode = commands, pid, 0

    def poll(self) -> int | None:
        return None if is_alive(self.pid) else self.wait()

    def wait(self) -> int:
        if self.pid in self.commands.running:
            self.commands.running.remove(self.pid)
            self.returncode = self.commands.ask({"wait": self.pid})
        return self.returncode


class Commands:
    """The process that forks them (start_commands.py). Without ``pause`` they wait nowhere."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "start_commands.py"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running: set[int] = set()
        self.pause: tuple[str, str, int] = ("nowhere", "", 0)

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, words: list[str], folder: Path) -> Forked:
        pid = self.ask({"words": words, "folder": str(folder), "pause": self.pause})
        self.running.add(pid)
        return Forked(self, pid)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    assert commands.process.stdin is not None
    commands.process.stdin.close()
    commands.process.wait()


Running = subprocess.Popen[bytes] | Forked


def start(words: list[str], folder: Path, commands: Commands | None = None) -> Running:
    """``words`` begin with a program or, for ``commands``, with a command of ours."""
    folder.mkdir(exist_ok=True)
    if commands is not None:
        return commands.start(words, folder)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            words, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )


def finish(words: list[str], folder: Path, commands: Commands | None = None) -> None:
    assert start(words, folder, commands).wait() == 0, (folder / "log").read_text()


def launcher(pid: int) -> int:
    return pid


def worker(pid: int) -> int:
    """A process below the launcher that runs our command."""
    found = [
        child for child in descendants(pid) if b"video_opd" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return random.choice(found or [pid])


def kill_often(
    kind: str,
    words: list[str],
    folder: Path,
    progress: Callable[[], int],
    *,
    choose: Choose = launcher,
    number: signal.Signals = signal.SIGKILL,
    twice: bool = False,
    wait_s: float = 0.3,
    commands: Commands | None = None,
) -> None:
    """Starts the command and kills it after it has made progress, TIMES times; then lets it end.

    SIGINT goes to all its processes, as from a terminal. A command that ended before begins anew.
    """
    draws, kills = random.Random(kind), 0
    while kills < TIMES:
        before = progress()
        process = start(words, folder, commands)
        wait_until(lambda p=process, n=before: p.poll() is not None or progress() > n, every_s=0.002)  # type: ignore[misc]
        time.sleep(draws.uniform(0.0, wait_s))
        family = descendants(process.pid) | {process.pid}
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "log").read_text()
            shutil.rmtree(folder)
            continue
        began_s = time.monotonic()
        for _ in range(1 + twice):
            if process.poll() is None:
                if number == signal.SIGINT:
                    os.killpg(process.pid, number)
                else:
                    os.kill(choose(process.pid), number)
                time.sleep(0.05)
        process.wait()
        wait_until(lambda f=family: not any(map(is_alive, f)))  # type: ignore[misc]
        ended_s.setdefault(kind, []).append(time.monotonic() - began_s)
        print(f"{kind}: nobody was alive {ended_s[kind][-1]:.1f} s later", flush=True)
        kills += 1
    finish(words, folder, commands)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but our own, hidden ones included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in OURSELVES
    }


def bytes_of(*files: Path) -> int:
    return sum(file.stat().st_size for file in files if file.exists())


def steps_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    finish([*OURS, "world", "make", "--out", "w", "--videos", "train=8", "long=1", "--workers", "2"], folder)
    return folder / "w" / "train.jsonl"


def recipe(name: str, rows: Path) -> list[str]:
    words = [str(ROOT / "recipes" / "tiny" / f"{name}.yaml"), "--run.dir", "run", "--run.trackers", "[]"]
    words += ["--model.path", BASE, "--teacher.path", TEACHER, "--data.train", str(rows)]
    words += ["--optim.micro_batch_size", "2", "--run.save_every", "1"]
    return [*words, "--optim.max_steps", str(2 + 2 * TIMES)]


IN_SHARDS = ["--model.sharding", "fsdp2", "--model.reduce", "micro_batch", "--teacher.placement", "sharded"]
IN_SHARDS += ["--optim.offload", "true"]


@pytest.mark.parametrize("holding", [[], IN_SHARDS], ids=["whole", "in shards"])
@pytest.mark.parametrize("choose", [launcher, worker])
def test_a_run_on_two_processes(rows: Path, tmp_path: Path, choose: Choose, holding: list[str]) -> None:
    """The launcher names a worker that was killed."""
    words = [*TORCHRUN, "train", *recipe("video-opd", rows), "--optim.batch_size", "4", *holding]
    finish(words, tmp_path / "whole")
    run = tmp_path / "killed" / "run"
    kind = f"train{' in shards' if holding else ''}, {choose.__name__}"
    kill_often(kind, words, run.parent, lambda: steps_of(run), choose=choose)
    if choose is worker:
        said = (run.parent / "log").read_text()
        assert re.search(r"rank +: \d", said) and "Signal 9 (SIGKILL) received by PID" in said
    whole = tmp_path / "whole" / "run"
    for name in ("model/model.safetensors", "rollouts.jsonl"):
        assert (whole / name).read_bytes() == (run / name).read_bytes(), name
    steps = [row["step"] for _, row in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, 3 + 2 * TIMES))


@pytest.mark.parametrize("choose", [launcher, worker])
@pytest.mark.parametrize("command", ["predict", "score"])
def test_rows_of_two_processes(rows: Path, tmp_path: Path, command: str, choose: Choose) -> None:
    words = [*TORCHRUN, command, *SHORT, "--out", "p.jsonl"]
    if command == "predict":
        words += [BASE, str(rows)]
    else:
        words += ["--student", BASE, "--teacher", TEACHER, "--data", str(rows), "--k", "1"]
    finish(words, tmp_path / "whole")
    killed = tmp_path / "killed"

    def progress() -> int:
        return bytes_of(*killed.glob("p.jsonl"), *killed.glob("p.jsonl.part-*"))

    kill_often(f"{command}, {choose.__name__}", words, killed, progress, choose=choose, wait_s=0.1)
    assert files_of(killed) == files_of(tmp_path / "whole")


STAGES = ("scoring", "before selection", "after selection", "training")


@pytest.mark.parametrize("stage", STAGES)
def test_rounds(rows: Path, tmp_path: Path, stage: str, commands: Commands) -> None:
    """The selection takes no time, so it waits until it is killed."""
    short = ["--data.limit", "12", "--tvdf.k", "4", "--tvdf.batch_size", "1", "--rounds.count", "1"]
    short += ["--tvdf.teacher_k", "1", "--tvdf.student_k", "1", "--tvdf.min_teacher_iou", "0"]
    words = ["rounds", *recipe("rounds", rows), "--optim.batch_size", "2", *short, "--evaluate.data", "[]"]
    finish(words, tmp_path / "whole", commands)
    killed = tmp_path / "killed"
    run, paused = killed / "run", killed / "paused"
    progress: dict[str, Callable[[], int]] = {
        "scoring": lambda: bytes_of(run / "round-1" / "scores.jsonl"),
        "before selection": lambda: bytes_of(paused),
        "after selection": lambda: bytes_of(paused),
        "training": lambda: steps_of(run / "round-1"),
    }
    commands.pause = (stage, "paused", TIMES)
    kill_often(f"rounds, {stage}", words, killed, progress[stage], commands=commands)
    commands.pause = ("nowhere", "", 0)
    finish(words, killed, commands)
    # The files of the clip cache hold the time, too.
    timed = ("metrics.jsonl", "environment.json", "report.html", "README.md")

    def files(folder: Path) -> dict[str, bytes]:
        return {
            name: content
            for name, content in files_of(folder).items()
            if not name.endswith(timed) and "checkpoints" not in name and "clips" not in name
        }

    whole = files(tmp_path / "whole")
    assert {"run/round-1/scores.jsonl", "run/round-1/model/model.safetensors"} <= set(whole)
    assert files(killed) == whole


@pytest.mark.parametrize(
    ("kind", "number", "twice"),
    [
        ("killed", signal.SIGKILL, False),
        ("interrupted", signal.SIGINT, False),
        ("interrupted twice", signal.SIGINT, True),
    ],
)
def test_a_world(tmp_path: Path, kind: str, number: signal.Signals, twice: bool) -> None:
    """Its parent is killed, or everybody is interrupted, once or twice."""
    words = [*OURS, "world", "make", "--out", "w", "--videos", "train=12", "long=2", "--workers", "2"]
    finish(words, tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_often(
        f"world make, {kind}",
        words,
        killed,
        lambda: len(list((killed / "w").rglob("*.mp4*"))),
        number=number,
        twice=twice,
        wait_s=1.0,
    )
    assert files_of(killed) == files_of(tmp_path / "whole")


def test_a_check(rows: Path, tmp_path: Path) -> None:
    words = [*OURS, "data", "check", str(rows), "--out", "c.jsonl", "--write-good", "good.jsonl"]
    finish(words, tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_often("data check", words, killed, lambda: bytes_of(killed / "c.jsonl"), wait_s=0.1)
    found, whole = files_of(killed), files_of(tmp_path / "whole")
    assert set(found) == set(whole)
    for name in whole:  # videos are checked in any order
        assert sorted(found[name].split(b"\n")) == sorted(whole[name].split(b"\n")), name


def test_a_clip(rows: Path, tmp_path: Path, commands: Commands) -> None:
    """Killed while it writes the clip, which is at its end."""
    video = str(rows.parent / "videos" / "long-0-00000.mp4")
    words = ["ground", BASE, video, "something", "--max-new-tokens", "16", "--cut", "v.mp4"]
    words += ["--view", "v.html", "--video.min_frame_tokens", "4", "--video.max_frame_tokens", "8"]
    finish(words, tmp_path / "whole", commands)
    killed = tmp_path / "killed"

    def progress() -> int:
        return len([path for path in killed.glob("*v.mp4*") if path.suffix != ".lock"])

    kill_often("ground --cut", words, killed, progress, wait_s=0.0, commands=commands)
    assert files_of(killed) == files_of(tmp_path / "whole")
