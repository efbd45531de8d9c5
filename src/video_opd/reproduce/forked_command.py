"""Commands as forks of one process that has imported what they need.

Importing torch and transformers takes a command four seconds, which would be half of a short one's time.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
from collections.abc import Sequence
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

PRELOADED = "video_opd.cli.preloaded"


def run_command(module: str, words: Sequence[str], output: Path, threads: int) -> int:
    """Runs ``python -m module words`` on ``threads`` threads, and returns its exit code.

    The file ``output`` holds what it prints. The command ends when this process does.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    process = context.Process(target=_run, args=(module, list(words), output, threads))
    process.start()
    process.join()
    assert process.exitcode is not None, "it has ended"
    return process.exitcode


def _run(module: str, words: Sequence[str], output: Path, threads: int) -> None:
    """In a fork."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of processes that it starts itself
    import torch

    torch.set_num_threads(threads)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
