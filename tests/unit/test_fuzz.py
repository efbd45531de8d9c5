"""Broken files are refused in one line: no crash, no hang, no traceback.

A quick part of the cases runs with the suite; all of them with

    VIDEO_OPD_FUZZ=1 python -m pytest tests/unit/test_fuzz.py

Each case is a function of its kind and number (``fuzz_cases.py``), so a failure is repeated by its number.
The cases run in a process of their own, so that a crash of a decoder is a finding and not the tests' end. For
the kinds that need torch, it is a fork of this process, which has imported it.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz_cases import MODULES, case_of, limit_memory, prepare, run_cases
from places import ROOT

WHOLE = os.environ.get("VIDEO_OPD_FUZZ", "") not in ("", "0")
# All cases, and how many of them run with the suite.
COUNTS = {
    "annotation": (600, 60),
    "prediction": (600, 60),
    "recipe": (600, 60),
    "video": (1000, 40),
    "table": (1000, 60),
    "durations": (300, 20),
    "queries": (300, 30),
    "settings": (500, 30),
    "output": (600, 30),
    "scores": (500, 30),
    "rounds": (600, 10),
    "report": (600, 15),
    "checkpoint": (600, 12),
    "model": (400, 3),
    "processor": (400, 3),
    "tokenizer": (400, 3),
    "adapter": (400, 5),
    "resume": (200, 1),
}
LONGEST_CASE_S = 300.0  # a case takes a moment; one that takes minutes hangs
FIRST_CASE_S = 900.0  # imports and the good files that videos are made from


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A process that runs cases, and the end of the pipe on which it says which."""

    output: int
    kill: Callable[[], object]
    wait: Callable[[], int]  # returns the exit code


def run_kind(kind: str, count: int, folder: Path, worker: str = "") -> tuple[Counter[str], list[str]]:
    """Returns the outcomes of the cases, and the failures: ``"video 17: crashed with signal 11"``."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    number = 0
    while number < count:
        number = _run_from(kind, number, count, folder, found, wrong, worker)
    return found, wrong


def _run_from(
    kind: str, first: int, count: int, folder: Path, found: Counter[str], wrong: list[str], worker: str
) -> int:
    """Runs cases in one process until they are done, or one of them ends it. Returns the next number."""
    process = (
        _forked(kind, first, count, folder)
        if kind in MODULES
        else _started(kind, first, count, folder, worker)
    )
    current, begun, pending = first, False, b""
    limit_s = FIRST_CASE_S
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.output, selectors.EVENT_READ)
        while True:
            if not says_something(selector, max(0.0, deadline - time.monotonic())):
                process.kill()
                process.wait()
                os.close(process.output)
                wrong.append(f"{kind} {current}: took more than {limit_s:g} s")
                return current + 1
            block = os.read(process.output, 1 << 16)
            if not block:
                break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                word, number, *rest = line.decode(errors="replace").split(" ", 2)
                current, begun = int(number), word == "begin"
                if word == "end":
                    what = rest[0]
                    found[what.split(":")[0]] += 1
                    if what.startswith("wrong"):
                        wrong.append(f"{kind} {current}: {what}")
                    limit_s = LONGEST_CASE_S
                deadline = time.monotonic() + limit_s
    code = process.wait()
    os.close(process.output)
    if begun or code != 0:
        wrong.append(f"{kind} {current}: ended its process with {code}")
        return current + 1
    return count


def _started(kind: str, first: int, count: int, folder: Path, worker: str) -> Worker:
    script = worker or str(Path(__file__).with_name("fuzz_cases.py"))
    output, end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, script, kind, str(first), str(count), str(folder)],
        stdout=end,
        stderr=subprocess.DEVNULL,
    )
    os.close(end)
    return Worker(output=output, kill=process.kill, wait=process.wait)


def _forked(kind: str, first: int, count: int, folder: Path) -> Worker:
    case_of(kind)  # imports its module
    prepare(kind, folder)
    output, end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            limit_memory()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):  # libraries print
                os.dup2(nowhere, stream)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            with open(end, "w") as report:
                run_cases(kind, first, count, folder, report)
            os._exit(0)
        finally:
            os._exit(70)
    os.close(end)
    return Worker(
        output=output,
        kill=lambda: os.kill(child, signal.SIGKILL),
        wait=lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]),
    )


def says_something(selector: selectors.BaseSelector, within_s: float) -> bool:
    return bool(selector.select(within_s))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where forks find what this process has made for all of them."""
    return tmp_path_factory.mktemp("broken")


@pytest.mark.parametrize("kind", COUNTS)
def test_broken_files_are_refused_in_one_line(kind: str, folder: Path) -> None:
    count = COUNTS[kind][0 if WHOLE else 1]
    found, wrong = run_kind(kind, count, folder)
    print(f"{kind}: {count} cases, {dict(found)}")
    assert not wrong, "\n".join(wrong)
    assert sum(found.values()) == count
    if count >= 20:
        # The cases are broken, and some of them are not. What rounds and runs can make again, they do.
        assert found["refused"] >= count // (20 if kind in ("rounds", "resume") else 4)
        assert found["read"] >= 1


@pytest.mark.parametrize("name", ["Makefile", "CONTRIBUTING.md"])
def test_the_documents_say_how_many_cases_there_are(name: str) -> None:
    assert f" {sum(whole for whole, _ in COUNTS.values()):,} broken files" in (ROOT / name).read_text()


def test_a_crash_a_hang_and_an_exception_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The time of a case is up when the worker says that it hangs, and not before."""
    hangs = tmp_path / "hangs"

    def says_something(selector: selectors.BaseSelector, within_s: float) -> bool:
        while True:
            up = hangs.exists()
            if selector.select(0.05):
                return True
            if up:
                hangs.unlink()
                return False

    monkeypatch.setattr(sys.modules[__name__], "says_something", says_something)
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, sys, time\n"
        "for n in range(int(sys.argv[2]), int(sys.argv[3])):\n"
        "    print('begin', n, flush=True)\n"
        "    if n == 2: os.abort()\n"
        "    if n == 4: open(os.path.join(sys.argv[4], 'hangs'), 'w').close(); time.sleep(600)\n"
        "    print('end', n, 'wrong: KeyError' if n == 5 else 'refused', flush=True)\n"
    )
    found, wrong = run_kind("x", 8, tmp_path, str(worker))
    assert wrong == ["x 2: ended its process with -6", "x 4: took more than 300 s", "x 5: wrong: KeyError"]
    assert found == {"refused": 5, "wrong": 1}
