"""What commands print, on any stdout: ASCII only, closed, on a full disk, a terminal that obeys escapes."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import SRC

from video_opd import progress
from video_opd.cli import main
from video_opd.cli.output import print_json
from video_opd.files import write_text
from video_opd.terminal import print_line, print_lines, visible

ODD = "\x1b[31m→ é 猫 \u202e\udcff\r"
NAMES = ("help", "version", "select", "select --json", "explain", "stats", "stats --json", "check", "formats",
         "report", "evaluate", "evaluate --json", "markdown", "latex")  # fmt: skip


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """Commands that print, by name; their data has a data set and a model of odd names."""
    rows, scores, answers = [], [], []
    for i in range(4):
        row = {
            "id": f"s{i} é→",
            "video": f"{i}.mp4",
            "query": f"猫 {i}",
            "duration": 20.0,
            "spans": [[2.0, 6.0]],
        }
        rows.append(row)
        scores.append({"id": row["id"], "student_iou": 0.1, "teacher_iou": 0.9, "delta": 0.8})
        answers.append({"id": row["id"], "response": "2 to 6 →"})
    for name, lines in (("data é.jsonl", rows), ("scores.jsonl", scores), ("p →.jsonl", answers)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = tmp_path / "run é→"
    run.mkdir()
    (run / "recipe.yaml").write_text("method: sft\n")
    data, out = str(tmp_path / "data é.jsonl"), str(tmp_path / "out é→")
    select = ["select", "--data", data, "--scores", str(tmp_path / "scores.jsonl"), "--k", "2"]
    evaluate = ["evaluate", "--data", f"é→={data}", "--predictions", f"é={tmp_path / 'p →.jsonl'}"]
    return {
        "help": ["select", "--help"],
        "version": ["--version"],
        "select": [*select, "--strategy", "topk", "--out", out],
        "select --json": [*select, "--strategy", "topk", "--out", out, "--json"],
        "explain": [*select, "--explain"],
        "stats": ["data", "stats", data],
        "stats --json": ["data", "stats", data, "--json"],
        "check": ["data", "check", data, "--out", out],
        "formats": ["data", "convert", "--list-formats"],
        "report": ["report", str(run), "--out", out],
        "evaluate": evaluate,
        "evaluate --json": [*evaluate, "--json", "-"],
        "markdown": [*evaluate, "--format", "markdown"],
        "latex": [*evaluate, "--format", "latex"],
    }


def run(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:  # --help
        return int(end.code or 0)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_prints_in_ascii(
    commands: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    held = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
    code = run(commands[name])
    sys.stdout.flush()
    text = held.getvalue().decode("ascii")
    error = capfd.readouterr().err
    assert code in (0, 1 if name == "check" else 0), error  # the videos are not there
    assert text and "Traceback" not in error and "Error:" not in error
    if name.endswith("--json"):
        json.loads(text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_stdout_that_cannot_be_written_is_one_line(
    commands: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    kind: str,
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full if kind == "full" else None)
        code = run(commands[name])
        last = capfd.readouterr().err.splitlines()[-1]
    assert code == 1
    assert (
        last
        == {
            "full": "video-opd: stdout cannot be written (No space left on device)",
            "closed": "video-opd: stdout is closed: the result could not be printed",
        }[kind]
    )


def test_nothing_that_a_terminal_obeys_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_line(ODD)
    print_lines([ODD, ":smile: [bold]"])
    progress.log(f"{ODD}\nnext")
    print_json({"odd": ODD, "c1": "\x9b31m"})
    assert run(["report", ODD, "--out", str(tmp_path / "r.html")]) == 2
    output = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", output)
    assert output.count(r"\x1b[31m→ é 猫 \u202e\udcff") == 4 and ":smile: [bold]" in output
    assert visible("a\tb\n", keep="\n") == "a\\tb\n"


def test_half_a_surrogate_pair_does_not_lose_a_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.json", json.dumps({"a": "\udcff"}, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "\udcff"}


@pytest.mark.parametrize("make", [lambda path: path / ("x" * 300), lambda path: path / "a\0b"])
def test_an_output_that_no_file_can_have_is_refused(
    commands: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
) -> None:
    assert run([*commands["report"][:-1], str(make(tmp_path))]) == 2
    assert re.search("cannot be written|can be written|zero byte", capsys.readouterr().err)


@pytest.mark.parametrize(
    "value", ["1" + "0" * 400, "5e-324", "1e308", "1.7e308", "1e-300", "NaN", "Infinity"]
)
def test_numbers_at_the_end_of_their_range_are_read_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    """In every number of a data file and of a scores file: exit code 0 or 2, never an exception's name."""
    head = '{"id": "a", "video": "a.mp4", "query": "q", '
    data, scores = tmp_path / "d.jsonl", tmp_path / "s.jsonl"
    for times in ('"duration": V', '"duration": V, "spans": [[0, V]]', '"duration": 9, "spans": [[0, V]]',
                  '"spans": [[V, 9]]'):  # fmt: skip
        data.write_text(head + times.replace("V", value) + "}\n")
        assert run(["data", "stats", str(data)]) in (0, 2), times
    data.write_text(head + '"duration": 9, "spans": [[1, 3]]}\n')
    for key in ("student_iou", "teacher_iou", "reverse_kl"):
        row = {"id": "a", "student_iou": 0.1, "teacher_iou": 0.9, "reverse_kl": 1.0, key: "V"}
        scores.write_text(json.dumps(row).replace('"V"', value) + "\n")
        words = ["select", "--data", str(data), "--scores", str(scores), "--k", "1"]
        for more in (["--explain"], ["--strategy", "topk", "--out", str(tmp_path / "o.jsonl")]):
            assert run([*words, *more]) in (0, 2), key
    assert "Error" not in "".join(capsys.readouterr())


def test_a_deleted_working_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["report", "run", "--out", "r.html"]) == 2
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text("method: sft\n")
    assert run(["report", str(tmp_path / "r"), "--out", "r.html"]) == 2
    error = capsys.readouterr().err
    assert error.count("the working folder was deleted") == 2 == error.count("\n") and "Error" not in error


def test_what_libraries_log_and_warn_of_is_visible(tmp_path: Path) -> None:
    """In a process of its own: with handlers that a library has set up, before and after."""
    script = (
        "import logging, sys, warnings\n"
        "early = logging.getLogger('early'); early.addHandler(logging.StreamHandler())\n"
        "from video_opd.cli.output import prepare_streams\n"
        "prepare_streams()\n"
        f"odd = {ODD!r}\n"
        "early.warning('1 %s', odd); early.warning(odd)\n"
        "logging.getLogger('none').warning('2 %s', odd)\n"
        "logging.basicConfig(force=True, format='3 %(message)s'); logging.warning(odd)\n"
        "warnings.warn(odd)\n"
        "from video_opd.suites.suite import _prints_on_stderr\n"
        "with _prints_on_stderr(): print('4', odd, end='', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(SRC), "PYTHONIOENCODING": "utf-8"},
        check=True,
    )
    assert done.stdout == b""
    assert done.stderr.count(rb"\x1b[31m") == 6 and not re.search(rb"[\x1b\r]|\xe2\x80\xae", done.stderr)


def test_a_traceback_is_visible(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> None:
        raise RuntimeError(ODD)

    monkeypatch.setattr("video_opd.cli.report.run", fail)
    assert main(["report", "nowhere", "--out", "x", "--debug"]) == 1
    told = capfd.readouterr().err
    assert "Traceback" in told and r"\x1b[31m" in told and not re.search("[\x1b\r\u202e]", told)


def test_nothing_prints_but_through_the_escapes() -> None:
    """Every ``print`` and ``console.print`` of the package is one of these."""
    allowed = {
        "terminal.py": 4,  # say, print_line, print_text, print_rows
        "progress.py": 2,  # log, which was escaped, and lines of progress
        "cli/__init__.py": 2,
        "cli/output.py": 1,  # JSON
        "cli/ground.py": 1,  # formats for files, which escape by themselves
        "evaluation/terminal.py": 1,  # a table of escaped cells
        "config/__main__.py": 1,  # our own schema
    }
    found: dict[str, int] = {}
    for path in (SRC / "video_opd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _prints(node.func):
                name = path.relative_to(SRC / "video_opd").as_posix()
                found[name] = found.get(name, 0) + 1
    assert found == allowed


def _prints(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id == "print"
    if not isinstance(function, ast.Attribute):
        return False
    written = ast.unparse(function)
    return written.endswith((".print", ".print_exc")) or written in ("sys.stdout.write", "sys.stderr.write")
