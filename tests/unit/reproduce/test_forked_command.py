"""Commands as forks: what they print, how they end, and that what is forked has touched no GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from places import SRC
from process_cases import descendants, is_alive, needs_proc, wait_until

from video_opd.reproduce.forked_command import PRELOADED, run_command

# What a shell starts in the background ignores Ctrl-C, and so do these tests then.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs the lines of a module: (exit code, lines that it printed)."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(body: str, *, threads: int = 1, name: str = "example") -> tuple[int, list[str]]:
        (tmp_path / f"forked_{name}.py").write_text(f"import os, sys\n{body}\n")
        said = tmp_path / f"said-{name}"
        said.write_text("of an earlier try\n" * 9)
        code = run_command(f"forked_{name}", ["a", "b"], said, threads)
        return code, said.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("print(*sys.argv[1:])", 0, "a b"),
        ("print('half', file=sys.stderr); sys.exit(3)", 3, "half"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("print('half', flush=True); os.kill(os.getpid(), 9)", -9, "half"),
        ("import subprocess; subprocess.run(['echo', 'below'])", 0, "below"),
        ("import atexit; atexit.register(print, 'left')", 0, "left"),
        (f"{CTRL_C}; import time; os.kill(os.getpid(), 2); time.sleep(60)", 1, "KeyboardInterrupt"),
    ],
)
def test_what_a_command_prints_and_its_exit_code(run: Any, body: str, code: int, last: str) -> None:
    ended, lines = run(body)
    assert (ended, lines[-1]) == (code, last)
    assert "of an earlier try" not in lines


def test_a_command_finds_torch_imported_and_has_its_threads(run: Any) -> None:
    body = "torch = sys.modules['torch']; print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    for threads in (1, 3):
        assert run(body, threads=threads) == (0, [f"{threads} {threads}"])


def test_a_command_has_the_environment_and_the_folder_of_now(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("1", "2"):
        folder = tmp_path / value
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("FORKED_EXAMPLE", value)
        assert run("print(os.environ['FORKED_EXAMPLE'], os.getcwd())") == (0, [f"{value} {folder}"])
    monkeypatch.delenv("FORKED_EXAMPLE")
    assert run("print('FORKED_EXAMPLE' in os.environ)") == (0, ["False"])


def test_commands_draw_their_own_random_numbers(run: Any) -> None:
    body = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1).item())"
    first, second = (run(body)[1][0].split() for _ in range(2))
    assert not set(first) & set(second)


def test_threads_that_run_commands_do_not_take_one_anothers_exit_codes(run: Any) -> None:
    """Without the lock two to three of a hundred were 255."""
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda n: run("sys.exit(7)", name=f"example_{n % 2}")[0], range(120)))
    assert set(codes) == {7}


IMPORTS = f"""
{CTRL_C}
import sys
from pathlib import Path
from video_opd.reproduce.forked_command import run_command
run_command("video_opd", ["--version"], Path(sys.argv[1]), 1)
"""


@needs_proc
def test_ctrl_c_while_everything_is_imported_shows_one_traceback(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", IMPORTS, tmp_path / "said"],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: any("forkserver" in words_of(child) for child in descendants(parent.pid)))
    below = descendants(parent.pid)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    _, said = parent.communicate(timeout=300)
    assert said.count("Traceback") == 1, said
    wait_until(lambda: not any(map(is_alive, below)))


def words_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except FileNotFoundError:  # it has ended
        return ""


ASKS_NO_GPU = f"""
import os, sys, threading
import torch

def asked(*arguments):
    raise AssertionError("a fork could not use the GPU any more")

torch._C._cuda_getDeviceCount = torch._C._cuda_init = torch.cuda.is_available = asked
import {PRELOADED}
assert not torch.cuda.is_initialized()
assert threading.active_count() == 1  # a fork would copy the locks of others as they stand
print("imported")
"""


def test_what_is_forked_has_asked_for_no_gpu_and_has_no_threads() -> None:
    found = subprocess.run(
        [sys.executable, "-c", ASKS_NO_GPU],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout == "imported\n", found.stderr
