"""Two of each command that writes, started together on one output: the files are as from one.

A command that appends or continues holds a lock: one works, and the other is refused by the first one's name.
The others write at their end, in one step: both work. ``VIDEO_OPD_TIMES`` says how often each is tried.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SRC

pytestmark = pytest.mark.slow

TIMES = int(os.environ.get("VIDEO_OPD_TIMES") or 3)
CHECKPOINTS = SRC / "video_opd" / "world" / "checkpoints"
BASE, TEACHER = CHECKPOINTS / "tiny-base", CHECKPOINTS / "tiny-teacher"
SMALL = ["--video.min_frame_tokens", "4", "--video.max_frame_tokens", "8"]
REFUSED = re.compile(
    r"^video-opd: (\S+): process (\d+) on host (\S+) \(since [^)]+\) is writing it: wait", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """``words`` are the command's; everything that it writes is in its working directory, below ``out``."""

    words: Sequence[str | Path]
    locked: bool


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, predictions, scores and a run, for commands to read."""
    folder = tmp_path_factory.mktemp("world")
    prepare: list[list[str | Path]] = [
        ["world", "make", "--out", "w", "--videos", "train=6", "short=3", "--workers", "1"],
        ["predict", BASE, "w/short.jsonl", "--out", "p.jsonl", "--max-new-tokens", "16", *SMALL],
        [
            *(
                "score",
                "--student",
                BASE,
                "--teacher",
                TEACHER,
                "--data",
                "w/train.jsonl",
                "--out",
                "s.jsonl",
            ),
            *("--k", "1", "--max-new-tokens", "16", *SMALL),
        ],
        ["train", *recipe(folder, "video-opd"), "--run.dir", "run", "--optim.max_steps", "1"],
    ]
    for words in prepare:
        done = subprocess.run(
            command(words), cwd=folder, env=environment(folder), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    charades = "AAA1 1.0 4.0##a person walks\nAAA2 0.5 3.0##a dog sits\n" * 200
    (folder / "charades_sta_test.txt").write_text(charades)
    (folder / "durations.json").write_text(json.dumps({"AAA1": 30.0, "AAA2": 20.0}))
    return folder


def recipe(world: Path, name: str) -> list[str | Path]:
    return [
        ROOT / "recipes" / "tiny" / f"{name}.yaml",
        *("--model.path", BASE, "--teacher.path", TEACHER, "--data.train", world / "w" / "train.jsonl"),
        *("--optim.batch_size", "2", "--optim.micro_batch_size", "2", "--run.save_every", "1"),
    ]


def cases(world: Path) -> dict[str, Case]:
    data, train = world / "w" / "short.jsonl", world / "w" / "train.jsonl"
    video = min((world / "w" / "videos").glob("short*.mp4"))
    models: list[str | Path] = ["--student", BASE, "--teacher", TEACHER]
    short = ["--max-new-tokens", "16", *SMALL]
    rounds = ["--data.limit", "6", "--tvdf.k", "2", "--rounds.count", "1", "--optim.max_steps", "2"]
    made: list[str | Path] = ["--predictions", world / "p.jsonl"]
    scores: list[str | Path] = ["--scores", world / "s.jsonl", "--strategy", "topk", "--k", "4"]
    scores += ["--min-teacher-iou", "0"]
    locked: dict[str, list[str | Path]] = {
        "train": ["train", *recipe(world, "video-opd"), "--run.dir", "out", "--optim.max_steps", "3"],
        "rounds": [
            *("rounds", *recipe(world, "rounds"), *rounds),
            *("--run.dir", "out", "--evaluate.data", data),
        ],
        "predict": ["predict", BASE, data, "--out", "out/p.jsonl", *short],
        "score": ["score", *models, "--data", train, "--out", "out/s.jsonl", "--k", "1", *short],
        "evaluate --model": ["evaluate", "--data", data, "--model", BASE, *SMALL],
        "data check": ["data", "check", data, "--out", "out/c.jsonl", "--write-good", "out/good.jsonl"],
        "data stats --probe": ["data", "stats", data, "--probe", "--out", "out/c.jsonl"],
        "world make": ["world", "make", "--out", "out", "--videos", "train=3", "--workers", "2"],
    }
    whole: dict[str, list[str | Path]] = {
        "evaluate --json": ["evaluate", "--data", data, *made, "--json", "out/e.json", "--out", "out/e.md"],
        "select": ["select", "--data", train, *scores, "--out", "out/s.jsonl"],
        "ground": ["ground", BASE, video, "a move", "--view", "out/v.html", "--cut", "out/v.mp4", *SMALL],
        "report": ["report", world / "run", "--out", "out/r.html"],
        "data convert": [
            *("data", "convert", "charades-sta", world / "charades_sta_test.txt"),
            *("--durations", world / "durations.json", "--out", "out/d.jsonl"),
        ],
        "data stats --html": ["data", "stats", data, "--html", "out/s.html"],
        "bench data": ["bench", "data", video, "--repeats", "1", "--json", "out/b.json"],
    }
    return {
        **{name: Case(words=words, locked=True) for name, words in locked.items()},
        **{name: Case(words=words, locked=False) for name, words in whole.items()},
    }


NAMES = [
    *("train", "rounds", "predict", "score", "evaluate --model", "data check", "data stats --probe"),
    *("world make", "evaluate --json", "select", "ground", "report", "data convert"),
    *("data stats --html", "bench data"),
]


def command(words: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "video_opd", *map(str, words)]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(SRC), "XDG_CACHE_HOME": str(folder / "out" / "cache")}


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_as_from_one(name: str, world: Path, tmp_path: Path) -> None:
    case = cases(world)[name]
    folder = tmp_path / "here"  # the same for all: some files name it
    started(case, folder).communicate()
    alone = contents(folder / "out")
    assert alone
    refused = 0
    for _ in range(TIMES):
        shutil.rmtree(folder)
        processes = [started(case, folder) for _ in range(2)]
        errors = [process.communicate()[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert contents(folder / "out") == alone
        if not case.locked:
            assert codes == [0, 0], errors
            continue
        # Two of which one was slow to start, and came when the other had ended, both succeed.
        assert sorted(codes) in ([0, 2], [0, 0]), errors
        if 2 in codes:
            refused += 1
            loser = codes.index(2)
            found = REFUSED.findall(errors[loser])
            assert [int(pid) for _, pid, _ in found] == [processes[1 - loser].pid], errors[loser]
    print(f"{name}: {TIMES} times, refused {refused}")
    assert refused or not case.locked


def started(case: Case, folder: Path) -> subprocess.Popen[str]:
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command(case.words),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder: Path) -> dict[str, Any]:
    """What the files hold, without times and the files of trackers."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "video-opd: " not in str(path) and not path.name.startswith("events.out")
    }


def content(path: Path) -> Any:
    if path.name in ("environment.json", "b.json", "report.html", "r.html", "README.md"):
        return None  # it holds times
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    if path.name == "c.jsonl":  # in the order of completion
        return sorted(path.read_text().splitlines())
    return path.read_bytes()
