"""Every output of every command is locked while the command runs, before anything heavy is imported, and none
of them is a file that the command reads."""

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
from video_opd.cli.parser import Kind, Output
from video_opd.errors import UserError
from video_opd.locks import locked_file, locked_folder

# Flags and words that name no file which an output could replace: folders, models, names.
NO_FILES = {
    *("--student", "--teacher", "--model", "--video-root", "--data-root", "--device", "--cache-dir"),
    *("--source", "--split", "--suite", "--host", "--token-file", "MODEL", "RUN", "QUERY"),
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
# Where an input stands among those words; other inputs are added to them.
PLACES = {
    **{("select", "--data"): 1, ("select", "--scores"): 3, ("evaluate", "--data"): 1, ("score", "RECIPE"): 0},
    **{("predict", "DATA"): 1, ("ground", "VIDEO"): 1, ("data convert", "INPUT"): 0},
    **{("data check", "DATA"): 0, ("data stats", "DATA"): 0},
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


def test_a_text_names_an_input_an_output_or_no_file() -> None:
    for name, parser in parsers_of_commands():
        known = NO_FILES | {read.flag for read in parser.inputs} | {out.flag for out in parser.outputs}
        for action in parser._actions:
            is_text = action.nargs != 0 and action.type is action.choices is None
            if is_text and action.help != argparse.SUPPRESS:
                names = action.option_strings or [str(action.metavar).split()[-1]]
                assert known.intersection(names), f"{name}: is it an input or an output? {action}"


def inputs_and_outputs() -> list[tuple[str, str, str]]:
    """(command, input, output) of each pair of files."""
    return [
        (name, read.flag, written.flag)
        for name, parser in parsers_of_commands()
        for read in parser.inputs
        for written in parser.outputs
        if written.kind == "file"
    ]


def words_with(command: str, read: str, file: str) -> list[str]:
    """The words of a command that reads ``file`` as ``read``."""
    words = [*command.split(), *WORDS[command]]
    if (command, read) in PLACES:
        words[len(command.split()) + PLACES[command, read]] = file
    elif read == "--predictions":
        words = ["evaluate", "--data", "d", read, file]
    else:
        words += [read, file] if read.startswith("--") else [file]
    return words


@pytest.mark.parametrize(("command", "read", "written"), inputs_and_outputs())
def test_no_command_replaces_what_it_reads(
    command: str, read: str, written: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("precious\n")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        words = [*words_with(command, read, str(tmp_path / "file")), written, str(tmp_path / name)]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"{written} {tmp_path / name} is also {read}: it would be replaced; name another" in said
        assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious\n" and (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_an_input_may_have_a_name_and_outputs_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = str(tmp_path / "p.jsonl"), str(tmp_path / "q.jsonl")
    Path(file).write_text("{}\n")
    assert main(["evaluate", "--data", "d", "--predictions", f"base={file}", "--json", file]) == 2
    assert f"--json {file} is also --predictions" in capsys.readouterr().err
    assert main(["data", "check", "d", "--out", other, "--write-good", other]) == 2
    assert "one would replace the other" in capsys.readouterr().err
    # The older spelling of --answers, and stdout, which is no file.
    for words in (["--model", "m", "--out", other, "--answers", other], ["--model", "m", "--json", "-"]):
        assert main(["evaluate", "--data", str(tmp_path / "none.jsonl"), *words]) == 2
        assert "none.jsonl" in capsys.readouterr().err
    assert Path(file).read_text() == "{}\n"


def test_score_does_not_replace_the_pool_of_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the recipe's paths start there
    pool = tmp_path / "pool.jsonl"
    pool.write_text("precious\n")
    assert main(["score", RECIPE, "--data.train", str(pool), "--out", str(pool), "--overwrite"]) == 2
    assert f"--out {pool} is also data.train" in capsys.readouterr().err
    assert pool.read_text() == "precious\n"


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
    a, b = (Output(str(tmp_path / name), "file") for name in "ab")
    with held(tmp_path / "a", "file"), held(tmp_path / "b", "file"):
        for places in ([a, b], [b, a]):
            with pytest.raises(UserError, match="/a: another thread"), locked_outputs(places):
                pass


def test_stdout_and_what_a_launcher_starts_are_not_locked_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with locked_outputs([Output("-", "file"), Output(os.devnull, "file"), Output("", "file")]):
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with locked_outputs([Output("p", "file")]):
        assert list(tmp_path.iterdir()) == []
