"""Pools of processes that never outlive their parent.

The workers end at once, in the middle of their tasks, when the parent is killed, when it is interrupted, and
when the block around the pool raises. Ctrl-C, which a terminal sends to all of them, is left to the parent.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context
from typing import Any


@contextmanager
def worker_pool(workers: int | None = None, start_method: str = "spawn") -> Iterator[ProcessPoolExecutor]:
    """A pool of ``workers`` processes (None: one for each core), for the block.

    Results that the block has not waited for are lost. ``start_method`` is "spawn" or "forkserver": a fork of
    the caller would copy the locks of its threads, and the end of the pipe that must close with it.
    """
    context = get_context(start_method)
    # Nobody writes to the pipe. Its writing end closes when the parent closes it or ends.
    lifeline, parents_end = context.Pipe(duplex=False)
    pool = _Pool(workers, mp_context=context, initializer=_follow, initargs=(lifeline,))
    try:
        yield pool
    except BaseException:
        parents_end.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def worker_map(workers: int | None, chunksize: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """The ``map`` of a pool, for the block; for one worker Python's own, in this process.

    Another process would take a second to start and do the same work. ``chunksize`` is the number of tasks
    that a worker takes at a time.
    """
    if workers == 1:
        yield map
    else:
        with worker_pool(workers) as pool:
            yield functools.partial(pool.map, chunksize=chunksize)


class _Pool(ProcessPoolExecutor):
    """``submit`` starts workers. A worker begins with SIGINT blocked, so that Ctrl-C cannot reach it before
    it ignores the signal itself."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(lifeline: connection.Connection) -> None:
    """Initialises a worker: it leaves Ctrl-C to its parent, and ends when the parent's end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait_for_end() -> None:
        connection.wait([lifeline])
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
