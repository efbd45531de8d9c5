"""Commands as forks: what they print, how they end, and that what is forked has touched no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import SRC

from video_opd.reproduce.forked_command import PRELOADED, run_command


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("print(*sys.argv[1:])", 0, "a b"),
        ("print('half', file=sys.stderr); sys.exit(3)", 3, "half"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("print('half', flush=True); os.kill(os.getpid(), 9)", -9, "half"),
        ("import subprocess; subprocess.run(['echo', 'below'])", 0, "below"),
    ],
)
def test_what_a_command_prints_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, code: int, last: str
) -> None:
    (tmp_path / "forked_example.py").write_text(f"import os, sys\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = tmp_path / "said"
    said.write_text("of an earlier try\n" * 9)
    assert run_command("forked_example", ["a", "b"], said, 1) == code
    lines = said.read_text().splitlines()
    assert lines[-1] == last
    assert "of an earlier try" not in lines


def test_a_command_finds_torch_imported_and_has_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forked_threads.py").write_text(
        "import os, sys\n"
        "torch = sys.modules['torch']\n"
        "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    said = tmp_path / "said"
    for threads in (1, 3):
        assert run_command("forked_threads", [], said, threads) == 0
        assert said.read_text() == f"{threads} {threads}\n"


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
