"""Two of each command that writes, started together on one output.

One works, the other is refused by the first one's name, nothing is written without a lock, and the files are
as from one. ``VIDEO_OPD_TIMES`` says how often each is tried.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lmms_eval_stand_in import TASK, write_data, write_stand_in
from output_cases import outputs, parsers_of_commands
from places import ROOT, SRC

TIMES = int(os.environ.get("VIDEO_OPD_TIMES") or 2)
HERE = Path(__file__).parent
CHECKPOINTS = SRC / "video_opd" / "world" / "checkpoints"
BASE, TEACHER = CHECKPOINTS / "tiny-base", CHECKPOINTS / "tiny-teacher"
Words = Sequence[str | Path]

DECODERS = ("torchcodec", "decord")  # of qwen-vl-utils
SMALL = ("--video.min_frame_tokens", "4", "--video.max_frame_tokens", "8")
SHORT = ("--max-new-tokens", "16", *SMALL)
MODELS = ("--student", BASE, "--teacher", TEACHER)
REFUSED = re.compile(
    r"^video-opd: (\S+): process (\d+) on host (\S+) \(since [^)]+\) is writing it: wait", re.MULTILINE
)
TRACKED = ("events.out", "hparams.yml")  # the beginnings of TensorBoard's files, in folders named by the time
# Content that holds times. A run's model card and report name them, too.
TIMED = {"environment.json", "README.md", "report.html", "bench.json", "data.json"}


def recipe(world: Path, name: str) -> Words:
    return [
        ROOT / "recipes" / "tiny" / f"{name}.yaml",
        *("--model.path", BASE, "--teacher.path", TEACHER, "--data.train", world / "w" / "train.jsonl"),
        *("--optim.batch_size", "2", "--optim.micro_batch_size", "2", "--run.save_every", "1"),
        *("--run.dir", "out"),
    ]


def cases(world: Path) -> dict[str, Words]:
    """Commands that write into ``out`` in their working folder, and read files of ``world``."""
    data, train = world / "w" / "short.jsonl", world / "w" / "train.jsonl"
    video = world / "w" / "videos" / "short-0-00000.mp4"
    rounds = ("--data.limit", "6", "--tvdf.k", "2", "--rounds.count", "1", "--optim.max_steps", "2")
    made = ("--predictions", world / "p.jsonl")
    choice = ("--scores", world / "s.jsonl", "--strategy", "topk", "--k", "4", "--min-teacher-iou", "0")
    suite = ("--data-root", world / "suite", "--tasks", TASK, "--max-new-tokens", "2")
    operations = ("--operations-only", "--lengths", "60", "--rollouts", "2", "--max-new-tokens", "4")
    charades = (world / "charades_sta_test.txt", "--durations", world / "durations.json")
    return {
        "train": ["train", *recipe(world, "video-opd"), "--optim.max_steps", "2"],
        "rounds": ["rounds", *recipe(world, "rounds"), *rounds, "--evaluate.data", data],
        "predict": ["predict", BASE, data, "--out", "out/p.jsonl", *SHORT],
        "score": ["score", *MODELS, "--data", train, "--out", "out/s.jsonl", "--k", "1", *SHORT],
        "select": ["select", "--data", train, *choice, "--out", "out/s.jsonl"],
        "evaluate": ["evaluate", "--data", data, *made, "--json", "out/e.json", "--out", "out/e.md"],
        "evaluate --model": ["evaluate", "--data", data, "--model", BASE, *SMALL],
        "evaluate --answers": [
            *("evaluate", "--data", data, "--model", BASE, "--answers", "out/p.jsonl", *SMALL),
            *("--json", "out/e.json"),
        ],
        "ground": ["ground", BASE, video, "a move", "--view", "out/v.html", "--cut", "out/v.mp4", *SMALL],
        "ground, two queries": ["ground", BASE, video, "a", "b", "--cut", "out/v.mp4", *SMALL],
        "report": ["report", world / "run", "--out", "out/r.html"],
        "reproduce": [
            *("reproduce", "--no-runs", "--out", "out/runs", "--results", "out/results"),
            *("--page", "out/page.md"),
        ],
        "demo": ["demo", "--out", "out", "--steps", "1"],
        "suite": ["suite", BASE, *suite, *SMALL, "--out", "out/general", "--json", "out/copy.json"],
        "data check": ["data", "check", data, "--out", "out/c.jsonl", "--write-good", "out/good.jsonl"],
        "data check, default": ["data", "check", "out/rows.jsonl", "--video-root", data.parent],
        "data stats": [
            *("data", "stats", data, "--probe", "--out", "out/c.jsonl", "--html", "out/s.html"),
        ],
        "data convert": ["data", "convert", "charades-sta", *charades, "--out", "out/d.jsonl"],
        "world make": ["world", "make", "--out", "out", "--videos", "train=3", "--workers", "2"],
        "bench data": ["bench", "data", video, "--repeats", "1", "--json", "out/data.json"],
        "bench engine": ["bench", "engine", *operations, "--json", "out/bench.json"],
    }


NAMES = tuple(cases(Path("world")))


def test_every_output_of_every_command_has_a_case() -> None:
    tried, commands = set(), [name for name, _ in parsers_of_commands()]
    for words in cases(Path("world")).values():
        command = next(name for name in commands if name.split() == list(words[: len(name.split())]))
        tried |= {(command, word) for word in words}
    missing = {(command, flag) for command, flag, _ in outputs()} - tried
    assert not missing


class Commands:
    """The process that forks them (fork_commands.py)."""

    def __init__(self, world: Path) -> None:
        paths = [SRC] if importlib.util.find_spec("lmms_eval") else [SRC, write_stand_in(world / "stand-in")]
        paths += map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))  # of a decoder
        self.process = subprocess.Popen(
            [sys.executable, HERE / "fork_commands.py"],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
            | {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: Words, folder: Path, count: int = 1) -> list[tuple[int, int, str]]:
        """(pid, exit code, stderr) of each of ``count`` that start together in ``folder``."""
        (folder / "meeting").mkdir(parents=True)
        request = {"words": list(map(str, words)), "folder": str(folder), "count": count}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        done = json.loads(self.process.stdout.readline())
        return [(pid, code, (folder / "meeting" / f"said-{pid}").read_text()) for pid, code in done]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="session")
def commands(world: Path) -> Iterator[Commands]:
    """Makes rows, predictions, scores and a run, for commands to read."""
    commands = Commands(world)
    prepare: list[Words] = [
        ["world", "make", "--out", "w", "--videos", "train=6", "short=3", "--workers", "1"],
        ["predict", BASE, "w/short.jsonl", "--out", "p.jsonl", *SHORT],
        ["score", *MODELS, "--data", "w/train.jsonl", "--out", "s.jsonl", "--k", "1", *SHORT],
        ["train", *recipe(world, "video-opd"), "--optim.max_steps", "1"],
    ]
    for words in prepare:
        ((_, code, said),) = commands.run(words, world)
        assert code == 0, said
        shutil.rmtree(world / "meeting")
    (world / "out").rename(world / "run")
    (world / "charades_sta_test.txt").write_text("AAA1 1.0 4.0##a person walks\nAAA2 0.5 3.0##a dog sits\n")
    (world / "durations.json").write_text(json.dumps({"AAA1": 30.0, "AAA2": 20.0}))
    write_data(world / "suite", world / "w" / "videos" / "short-0-00000.mp4")
    yield commands
    assert commands.process.stdin is not None
    commands.process.stdin.close()
    commands.process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_works_and_one_is_refused(name: str, commands: Commands, world: Path, tmp_path: Path) -> None:
    if name == "bench data" and not any(map(importlib.util.find_spec, DECODERS)):
        pytest.skip(f"qwen-vl-utils needs one of {', '.join(DECODERS)}")
    words = cases(world)[name]
    folder = tmp_path / "here"  # the same for all: some files name it
    make_folder(folder, world)
    ((_, code, said),) = commands.run(words, folder)
    assert code == 0, said
    assert unlocked(folder) == ""
    alone = contents(folder / "out")
    assert alone
    for _ in range(TIMES):
        make_folder(folder, world)
        both = commands.run(words, folder, count=2)
        assert sorted(code for _, code, _ in both) == [0, 2], both
        winner, loser = sorted(both, key=lambda command: command[1])
        assert [int(pid) for _, pid, _ in REFUSED.findall(loser[2])] == [winner[0]], loser
        assert unlocked(folder) == ""
        assert contents(folder / "out") == alone
    print(f"{name}: {TIMES} times one worked and one was refused by name; {len(alone)} files as from one")


def make_folder(folder: Path, world: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "out").mkdir(parents=True)
    shutil.copy(world / "w" / "short.jsonl", folder / "out" / "rows.jsonl")


def unlocked(folder: Path) -> str:
    """What was written without a lock."""
    file = folder / "meeting" / "unlocked"
    return file.read_text() if file.exists() else ""


def contents(folder: Path) -> dict[str, Any]:
    """What the files hold, without times, which the clip cache holds, too. No lock may be left."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(TRACKED) and "clips" not in path.parts
    }


def content(path: Path) -> Any:
    if path.name in TIMED:
        return None
    if path.name == "metrics.jsonl":
        rows = lines(path)
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    if path.name == "state.json":  # it seals metrics.jsonl, which holds times
        state = json.loads(path.read_text())
        rows = {name: seal for name, seal in state["rows"].items() if name != "metrics.jsonl"}
        return {key: value for key, value in state.items() if key != "digest"} | {"rows": rows}
    if path.name in ("c.jsonl", "rows.check.jsonl"):  # in the order of completion
        return sorted(path.read_text().splitlines())
    return path.read_bytes()


def lines(path: Path) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
