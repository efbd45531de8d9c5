"""Tasks: their order, what a repeated run leaves out, what a failure says, and that no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from places import SRC
from process_cases import descendants, is_alive, needs_proc, wait_until

from video_opd.errors import UserError
from video_opd.reproduce.places import has_all_rows
from video_opd.reproduce.tasks import Task, commits_of, expected_seconds, run_stages, settings_words


class Notes:
    """Tasks that note when they start. Their command is one that ends at once."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.finished: set[str] = set()

    def task(self, name: str, *words: Any, works: bool = True, seconds: float = 10) -> Task:
        def start() -> Sequence[Any]:
            if name not in self.finished:
                self.started.append(name)
            if works:
                self.finished.add(name)
            return words or ["--version"]

        return Task(name=name, words=start, done=lambda: name in self.finished, seconds=seconds)


def test_stages_follow_one_another_and_done_tasks_are_not_run_again(tmp_path: Path) -> None:
    notes = Notes()
    stages = [[notes.task(name) for name in names] for names in ("ab", "c", "de")]
    assert expected_seconds(stages, 2) == 25
    run_stages(stages[:1], tmp_path, 1)
    assert expected_seconds(stages, 2) == 15
    run_stages(stages, tmp_path, 2)
    assert [set(notes.started[:2]), notes.started[2], set(notes.started[3:])] == [{*"ab"}, "c", {*"de"}]
    run_stages(stages, tmp_path, 2)
    assert len(notes.started) == 5
    assert "video-opd" in (tmp_path / "a.log").read_text()


def test_the_longest_tasks_of_a_stage_are_started_first(tmp_path: Path) -> None:
    notes = Notes()
    run_stages([[notes.task(f"{s} s", seconds=s) for s in (1, 30, 20)], [notes.task("next")]], tmp_path, 1)
    assert notes.started == ["30 s", "20 s", "1 s", "next"]


def test_a_task_that_waits_for_one_starts_beside_the_others_of_its_stage(tmp_path: Path) -> None:
    notes = Notes()
    long, short, first = notes.task("long"), notes.task("short", seconds=5), notes.task("first")
    after = [notes.task("of short", seconds=1).waiting_for(short), notes.task("of long").waiting_for(long)]
    # With one at a time an earlier stage goes before a later one, and then the longest.
    run_stages([[first], [short, long], [*after, notes.task("of all", seconds=5)]], tmp_path, 1)
    assert notes.started == ["first", "long", "short", "of long", "of all", "of short"]

    notes, begun = Notes(), tmp_path / "begun"
    (tmp_path / "waits.py").write_text(
        "import pathlib, sys, time\n"
        "for _ in range(3000):\n"
        "    if pathlib.Path(sys.argv[1]).exists(): sys.exit()\n"
        "    time.sleep(0.01)\n"
        "sys.exit('the next task has not begun')"
    )
    waits = Task(name="waits", words=lambda: [begun], done=begun.exists, seconds=9, module="waits")
    short = notes.task("short")

    def end_the_wait() -> Sequence[Any]:
        begun.touch()
        return ["--version"]

    next_one = Task(name="next", words=end_the_wait, done=begun.exists, seconds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        run_stages([[waits, short], [next_one.waiting_for(short)]], tmp_path / "logs", 2)
    assert (tmp_path / "logs" / "waits.log").exists()


def test_nothing_starts_after_a_failure_though_it_waits_for_nothing(tmp_path: Path) -> None:
    notes = Notes()
    bad, good = notes.task("bad", "evaluat"), notes.task("good", seconds=5)
    with pytest.raises(UserError, match="bad ended with exit code 2"):
        run_stages([[bad, good], [notes.task("free").waiting_for(), notes.task("last")]], tmp_path, 1)
    assert notes.started == ["bad"]


def test_a_task_that_fails_says_why_and_what_follows_is_not_started(tmp_path: Path) -> None:
    notes = Notes()
    stages = [[notes.task("good"), notes.task("bad", "evaluat"), notes.task("late")], [notes.task("next")]]
    with pytest.raises(UserError, match=r"bad ended with exit code 2 .*bad\.log\): .*evaluat"):
        run_stages(stages, tmp_path, 1)
    assert notes.started == ["good", "bad"]


def test_a_command_that_leaves_its_work_undone_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="short ended with exit code 0"):
        run_stages([[Notes().task("short", works=False)]], tmp_path, 1)


def test_what_was_made_otherwise_is_not_taken_for_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs, data, out = tmp_path / "logs", tmp_path / "data.jsonl", tmp_path / "out"
    (tmp_path / "copies.py").write_text("import shutil, sys; shutil.copy(*sys.argv[1:3])")
    monkeypatch.syspath_prepend(tmp_path)
    data.write_text("rows")

    def run(*words: Any, name: str = "copy") -> None:
        task = Task(name=name, words=lambda: [data, out, *words], done=out.exists, seconds=1, module="copies")
        run_stages([[task]], logs, 1)
        assert len(commits_of([[task]], logs)) == 1

    run("--optim.lr", 3e-4)
    run("--optim.lr", 3e-4)  # out is there now, which it was not
    with pytest.raises(UserError, match=r"copy was made by another command, .*copy\.json\): choose another"):
        run("--optim.lr", 6e-4)
    data.write_text("others")
    with pytest.raises(UserError, match="or from other files"):
        run("--optim.lr", 3e-4)
    data.write_text("rows")
    run("--optim.lr", 3e-4)
    with pytest.raises(UserError, match="copy-2 is there, but not how it was made"):
        run("--optim.lr", 3e-4, name="copy-2")
    out.unlink()  # as of a command that was killed before it wrote anything
    with pytest.raises(UserError, match="copy was made by another command"):
        run("--optim.lr", 6e-4)
    run("--optim.lr", 3e-4)


def test_rows_of_other_ids_are_not_those_that_were_asked_for(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    row = {"video": "v.mp4", "query": "q", "duration": 4.0, "spans": [[1, 2]]}
    data.write_text("".join(json.dumps({"id": name, **row}) + "\n" for name in "ab"))
    for names, whole in (("a", False), ("ac", False), ("ba", True)):
        out.write_text("".join(json.dumps({"id": name}) + "\n" for name in names))
        assert has_all_rows(out, data) == whole


def test_commands_keep_the_bytecode_of_what_they_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "imported.py").touch()
    (tmp_path / "imports.py").write_text("import imported")
    monkeypatch.syspath_prepend(tmp_path)
    kept = tmp_path / "__pycache__"
    task = Task(name="t", words=list, done=kept.exists, seconds=1, module="imports")
    run_stages([[task]], tmp_path / "logs", 1)  # it raises if the command leaves this undone


def test_settings_are_the_words_of_a_recipe() -> None:
    assert list(settings_words({"optim.lr": 3e-4, "run.dir": Path("a b")})) == [
        "--optim.lr", "0.0003", "--run.dir", "a b",
    ]  # fmt: skip
    assert list(settings_words({"run.dir": Path("a #1")})) == ["--run.dir", "'a #1'"]  # "#" begins a comment


STARTS = """
import sys
from pathlib import Path
from video_opd.reproduce.tasks import Task, run_stages
words = ["world", "make", "--out", sys.argv[1], "--videos", "train=10000", "--workers", "1"]
run_stages([[Task(name="world", words=lambda: words, done=lambda: False, seconds=1)]], Path(sys.argv[1]), 1)
"""


@needs_proc
def test_commands_end_when_the_process_that_runs_them_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS, tmp_path], env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    wait_until(lambda: any(tmp_path.glob("videos/*.mp4")))
    children = descendants(parent.pid)
    assert children and all(map(is_alive, children))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(map(is_alive, children)))
