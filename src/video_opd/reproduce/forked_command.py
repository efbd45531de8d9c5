"""Commands as forks of one process that has imported what they need.

Importing torch and transformers takes a command four seconds, which would be half of a short one's time.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context, parent_process, resource_tracker
from pathlib import Path

PRELOADED = "video_opd.cli.preloaded"
# Starting a process asks for the exit codes of the others, and each can be read once.
_LOCK = threading.Lock()


def run_command(module: str, words: Sequence[str], output: Path, threads: int) -> int:
    """Runs ``python -m module words`` on ``threads`` threads, and returns its exit code.

    The file ``output`` holds what it prints. The command ends when this process does. Several threads may
    call this at once.
    """
    output.write_bytes(b"")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    # Container images often set it, and the processes of each command would compile what they import again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    context = get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    process = context.Process(target=_run, args=(module, list(words), output, environment, threads))
    with _LOCK:
        # Ctrl-C reaches the commands, and not the process that they are forked from. (Starting the tracker,
        # which is the first thing that a first start does, would unblock the signal.)
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    connection.wait([process.sentinel])
    with _LOCK:
        process.join()
    assert process.exitcode is not None, "it has ended"
    return process.exitcode


def _run(
    module: str, words: Sequence[str], output: Path, environment: Mapping[str, str], threads: int
) -> None:
    """In a fork."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    np.random.seed()  # all forks would draw the same
    torch.seed()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # which Python runs in a fork from 3.13 on


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
