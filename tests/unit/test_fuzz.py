"""Broken files are refused in one line: no crash, no hang, no traceback.

A quick part of the cases runs with the suite; all of them with

    VIDEO_OPD_FUZZ=1 python -m pytest tests/unit/test_fuzz.py

Each case is a function of its kind and number (``fuzz_cases.py``), so a failure is repeated by its number.
The cases run in a process of their own, so that a crash of a decoder is a finding and not the tests' end.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

WHOLE = os.environ.get("VIDEO_OPD_FUZZ", "") not in ("", "0")
# All cases, and how many of them run with the suite.
COUNTS = {"annotation": (600, 60), "prediction": (600, 60), "recipe": (600, 60), "video": (1000, 40)}
LONGEST_CASE_S = 300.0  # a case takes a moment; one that takes minutes hangs
FIRST_CASE_S = 900.0  # imports and the good files that videos are made from


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
    script = worker or str(Path(__file__).with_name("fuzz_cases.py"))
    process = subprocess.Popen(
        [sys.executable, script, kind, str(first), str(count), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    current, begun, pending = first, False, b""
    limit_s = FIRST_CASE_S
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not says_something(selector, max(0.0, deadline - time.monotonic())):
                process.kill()
                process.wait()
                wrong.append(f"{kind} {current}: took more than {limit_s:g} s")
                return current + 1
            block = os.read(process.stdout.fileno(), 1 << 16)
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
    if begun or code != 0:
        wrong.append(f"{kind} {current}: ended its process with {code}")
        return current + 1
    return count


def says_something(selector: selectors.BaseSelector, within_s: float) -> bool:
    return bool(selector.select(within_s))


@pytest.mark.parametrize("kind", COUNTS)
def test_broken_files_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    count = COUNTS[kind][0 if WHOLE else 1]
    found, wrong = run_kind(kind, count, tmp_path)
    print(f"{kind}: {count} cases, {dict(found)}")
    assert not wrong, "\n".join(wrong)
    assert sum(found.values()) == count
    assert found["refused"] >= count // 4  # the cases are broken, and some of them are not
    assert found["read"] >= 1


def test_the_whole_has_two_thousand_cases() -> None:
    assert sum(whole for whole, _ in COUNTS.values()) >= 2000


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
