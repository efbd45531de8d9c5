"""The workers of a pool end with their parent: when it is killed, when it is interrupted, when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from places import SRC
from process_cases import descendants, is_alive, needs_proc, wait_until

from video_opd import pools
from video_opd.pools import worker_map, worker_pool

# Two workers write their ids, and then work for ever.
FOREVER = """
import os, signal, sys, time
from video_opd.pools import worker_map, worker_pool

# A shell starts what runs in its background with Ctrl-C ignored, and these tests may be such.
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while True:
        time.sleep(60)

if __name__ == "__main__":
    with worker_pool(2, sys.argv[2]) as pool:
        for _ in pool.map(work, [sys.argv[1]] * 6):
            pass
"""


@pytest.fixture(params=["spawn", "forkserver"])
def forever(request: pytest.FixtureRequest, tmp_path: Path) -> subprocess.Popen[str]:
    """A process with a pool, in a process group of its own."""
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(FOREVER)
    pids.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, pids, request.param],
        env=os.environ | {"PYTHONPATH": str(SRC)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(list(pids.iterdir())) == 2)
    return process


def ended(pids: Path) -> bool:
    return not any(is_alive(int(file.name)) for file in pids.iterdir())


@needs_proc
def test_the_workers_of_a_killed_parent_end(forever: subprocess.Popen[str], tmp_path: Path) -> None:
    below = descendants(forever.pid)
    assert {int(file.name) for file in (tmp_path / "pids").iterdir()} <= below
    forever.kill()
    forever.wait()
    wait_until(lambda: not any(map(is_alive, below)))  # multiprocessing's helpers, too


@needs_proc
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_ends_all_of_them_in_the_middle_of_their_tasks(
    forever: subprocess.Popen[str], tmp_path: Path, times: int
) -> None:
    below = descendants(forever.pid)
    for _ in range(times):
        if forever.poll() is None:
            os.killpg(forever.pid, signal.SIGINT)  # as a terminal does
    assert forever.wait(timeout=300) != 0
    wait_until(lambda: not any(map(is_alive, below)))
    assert forever.stderr is not None
    assert ", in work\n" not in forever.stderr.read()  # no worker shows a traceback


def test_a_pool_gives_results_in_order() -> None:
    with worker_pool(2) as pool:
        assert list(pool.map(str, range(5))) == list("01234")


def _with_pid(number: int) -> tuple[int, int]:
    return number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_worker_is_this_process(workers: int) -> None:
    with worker_map(workers, chunksize=2) as map_tasks:
        found = list(map_tasks(_with_pid, range(3)))
    assert [number for number, _ in found] == [0, 1, 2]
    assert ({pid for _, pid in found} == {os.getpid()}) == (workers == 1)


def test_workers_take_several_tasks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ThreadPoolExecutor):
        def map(self, *arguments: Any, chunksize: int = 1, **settings: Any) -> Any:
            return [chunksize]

    monkeypatch.setattr(pools, "worker_pool", Pool)
    with worker_map(2, chunksize=4) as map_tasks:
        assert list(map_tasks(_with_pid, range(3))) == [4]


def _blocked() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_ctrl_c_while_a_worker_starts_is_blocked_there(method: str) -> None:
    """It would end the worker before it can ignore the signal, with a traceback."""
    with worker_pool(1, method) as pool:
        assert pool.submit(_blocked).result() and not _blocked()
        assert (pool.submit(os.getppid).result() == os.getpid()) == (method == "spawn")


# A server that another part of a program has started before, with a SIGINT that is not blocked.
SERVED = """
import os, signal
from multiprocessing import forkserver
from video_opd.pools import worker_pool

signal.signal(signal.SIGINT, signal.default_int_handler)

if __name__ == "__main__":
    forkserver.ensure_running()
    with worker_pool(1, "forkserver") as pool:
        worker = pool.submit(os.getpid).result()
        for _ in range(5):  # one may come in a moment when a worker passes errors on
            os.kill(worker, signal.SIGINT)
            assert pool.submit(os.getpid).result() == worker
"""


def test_a_worker_ignores_ctrl_c_whoever_started_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SERVED)
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_block_has_not_waited_for_is_lost() -> None:
    with worker_pool(1) as pool:
        first, *others = [pool.submit(_work_for_a_while) for _ in range(200)]
        first.result()
    assert any(future.cancelled() for future in others)


def _work_for_a_while() -> None:
    time.sleep(0.005)


@needs_proc
def test_a_pool_leaves_no_file_open() -> None:
    with worker_pool(1) as pool:  # multiprocessing keeps a helper of its own
        pool.submit(_blocked).result()
    before = os.listdir("/proc/self/fd")
    with worker_pool(1) as pool:
        pool.submit(_blocked).result()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@needs_proc
def test_an_error_in_the_block_ends_the_workers_and_is_raised(tmp_path: Path) -> None:
    """In the middle of a task without end."""
    note = tmp_path / "pid"
    with pytest.raises(ZeroDivisionError), worker_pool(1) as pool:
        pool.submit(_never_end, note)
        wait_until(lambda: note.exists() and note.read_text() != "")
        1 / 0  # noqa: B018
    assert not is_alive(int(note.read_text()))


def _never_end(note: Path) -> None:
    note.write_text(str(os.getpid()))
    while True:
        time.sleep(60)
