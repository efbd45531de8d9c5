"""Every output of every command is locked while the command runs, before anything heavy is imported."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from output_cases import outputs, parsers_of_commands
from places import ROOT

from video_opd.cli import main, report
from video_opd.cli.output import locked_outputs
from video_opd.cli.parser import Kind, Place
from video_opd.errors import UserError
from video_opd.locks import locked_file, locked_folder

# Flags whose value is a text, and to which nothing is written.
READ = {
    *("--student", "--teacher", "--teacher-from", "--model", "--data", "--scores", "--predictions"),
    *("--baseline", "--video-root", "--data-root", "--queries", "--durations", "--device"),
    *("--source", "--split", "--suite", "--host", "--token-file", "--cache-dir"),
}
RECIPE = str(ROOT / "recipes" / "tiny" / "video-opd.yaml")
ROUNDS = str(ROOT / "recipes" / "tiny" / "rounds.yaml")
# The words that a command needs besides its output. No file that they name is there, but for the recipes.
WORDS = {
    "demo": [],
    "train": [RECIPE],
    "rounds": [ROUNDS],
    "predict": ["m", "d"],
    "score": ["r"],
    "select": ["--data", "d", "--scores", "s", "--strategy", "topk", "--k", "1"],
    "evaluate": ["--data", "d", "--model", "m"],
    "suite": ["m"],
    "ground": ["m", "v", "q"],
    "report": ["r"],
    "reproduce": [],
    "data check": ["d"],
    "data convert": ["d"],
    "data stats": ["d", "--probe"],
    "world make": [],
    "bench engine": [],
    "bench data": [],
}


@contextmanager
def held(path: Path, kind: Kind) -> Iterator[None]:
    """Another thread holds the lock of ``path``. Raises its UserError if it gets none."""
    taken, done = threading.Event(), threading.Event()
    refused: list[UserError] = []

    def hold() -> None:
        try:
            with (locked_file if kind == "file" else locked_folder)(path):
                taken.set()
                done.wait()
        except UserError as error:
            refused.append(error)
            taken.set()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        if refused:
            raise refused[0]
        yield
    finally:
        done.set()
        thread.join()


def test_a_flag_with_a_text_is_read_or_written() -> None:
    for name, parser in parsers_of_commands():
        known = READ.union(output.flag for output in parser.outputs)
        for action in parser._actions:
            is_text = action.option_strings and action.nargs != 0 and action.type is action.choices is None
            if is_text and action.help != argparse.SUPPRESS:
                assert known.intersection(action.option_strings), f"{name}: is it an output? {action}"


@pytest.mark.parametrize(("command", "flag", "kind"), outputs())
def test_a_command_is_refused_what_another_one_writes(
    command: str, flag: str, kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ["--out", str(tmp_path / "other")] if command in ("predict", "score") and flag != "--out" else []
    with held(tmp_path / "new" / "out", kind):
        words = [*command.split(), *WORDS[command], flag, str(tmp_path / "new" / "out"), *needed]
        assert main(words) == 2
    said = f"{tmp_path / 'new' / 'out'}: another thread of this process ({os.getpid()}) is writing it"
    assert f"video-opd: {said}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []  # no lock, and no folder that was made for one


def test_the_lock_is_held_from_before_the_command_until_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(arguments: argparse.Namespace) -> None:
        assert (tmp_path / "r.html.lock").exists()
        with pytest.raises(UserError, match="another thread"), held(tmp_path / "r.html", "file"):
            pass

    monkeypatch.setattr(report, "run", run)
    assert main(["report", "run", "--out", str(tmp_path / "r.html")]) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_only_read_is_not_locked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(tmp_path / "c.jsonl", "file"):
        assert main(["data", "stats", "no/data", "--out", str(tmp_path / "c.jsonl")]) == 2
    assert "no/data" in capsys.readouterr().err


def test_of_two_with_several_outputs_one_gets_them_all(tmp_path: Path) -> None:
    """All take their locks in one order, whatever the order of their flags: the first lock decides."""
    a, b = (Place(str(tmp_path / name), "file") for name in "ab")
    with held(tmp_path / "a", "file"), held(tmp_path / "b", "file"):
        for places in ([a, b], [b, a]):
            with pytest.raises(UserError, match="/a: another thread"), locked_outputs(places):
                pass


def test_stdout_and_what_a_launcher_starts_are_not_locked_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with locked_outputs([Place("-", "file"), Place(os.devnull, "file"), Place("", "file")]):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with locked_outputs([Place("p", "file")]):
        assert list(tmp_path.iterdir()) == []
