"""Workers of a launcher end when it is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from places import SRC
from process_cases import is_alive, needs_proc, wait_until

from video_opd.processes import _launcher_was_gone

WORKER = """
import pathlib, sys, threading, time
from video_opd.processes import Processes, follow_launcher as follow
{follow}
{follow}
assert threading.active_count() <= 2  # it follows once
pathlib.Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
while True:
    time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def launch(note: Path, follow: str = "follow()", **environment: str) -> subprocess.Popen[bytes]:
    """A launcher, whose worker writes its process id into ``note`` if it goes on."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER.format(follow=follow), str(note)],
        env=os.environ | {"PYTHONPATH": str(SRC)} | environment,
    )


def worker_of(note: Path) -> int:
    wait_until(lambda: note.exists() and note.read_text() != "")
    return int(note.read_text())


def launched(note: Path, **environment: str) -> tuple[subprocess.Popen[bytes], int]:
    """A launcher and the process id of its worker."""
    return launch(note, **environment), worker_of(note)


@needs_proc
@pytest.mark.parametrize("follow", ["follow()", "Processes.of_environment()"])
def test_a_worker_ends_with_its_launcher(tmp_path: Path, follow: str) -> None:
    launcher, worker = launched(tmp_path / "pid", follow=follow, TORCHELASTIC_RUN_ID="none")
    assert is_alive(worker)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not is_alive(worker))


@needs_proc
@pytest.mark.parametrize("port", [None, "none", "0"])
def test_a_worker_that_cannot_ask_for_its_launchers_store_goes_on(tmp_path: Path, port: str | None) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if port is not None:
        environment |= {"MASTER_ADDR": "localhost" if port == "none" else "256.0.0.1", "MASTER_PORT": port}
    launcher, worker = launched(tmp_path / "pid", **environment)
    assert is_alive(worker)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not is_alive(worker))


@needs_proc
def test_a_worker_ends_before_its_launcher_when_it_is_done() -> None:
    """Its watch over the launcher does not keep it."""
    code = "from video_opd.processes import follow_launcher; follow_launcher()"
    environment = os.environ | {"PYTHONPATH": str(SRC), "TORCHELASTIC_RUN_ID": "none"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=300).returncode == 0


@needs_proc
def test_a_worker_whose_launchers_store_answers_goes_on(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", **address}
        launcher, worker = launched(tmp_path / "pid", **environment)
        connection, _ = server.accept()
        assert connection.recv(1) == b""  # it asked, and has hung up
        assert is_alive(worker)
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not is_alive(worker))


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile nobody watches the launcher."""

    def silent(address: tuple[str, int], timeout: float | None = None) -> None:
        assert timeout is not None and timeout <= 60, "it would wait for minutes"
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    for name, value in (("USE_AGENT_STORE", "True"), ("RUN_ID", "none")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "10.255.255.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert not _launcher_was_gone()


@needs_proc
def test_another_parent_may_leave_before_its_child(tmp_path: Path) -> None:
    """Two workers, one of a launcher: when that one has ended, the other had the time to end, too."""
    plain, stays = launched(tmp_path / "stays")
    launcher, ends = launched(tmp_path / "ends", TORCHELASTIC_RUN_ID="none")
    for process in (plain, launcher):
        process.kill()
        process.wait()
    try:
        wait_until(lambda: not is_alive(ends))
        assert is_alive(stays)
    finally:
        os.kill(stays, signal.SIGKILL)


@needs_proc
def test_a_worker_whose_launcher_was_gone_before_it_looked_ends(tmp_path: Path) -> None:
    """It never saw the launcher alive; but nobody listens where the launcher's store was."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused, and nobody takes it
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        environment = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", **address}
        launch(tmp_path / "pid", **environment).wait(timeout=300)  # it waits for its worker


@pytest.mark.parametrize("agents", ["True", "False", None])
def test_a_store_that_is_the_first_workers_own_says_nothing(
    monkeypatch: pytest.MonkeyPatch, agents: str | None
) -> None:
    """It may not be there yet."""

    def refuse(*_: object, **settings: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    if agents is not None:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agents)
    assert _launcher_was_gone() == (agents == "True")
