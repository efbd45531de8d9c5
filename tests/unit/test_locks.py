"""Two commands on one output: one works, the other is refused by the first one's name."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from places import SRC

from video_opd import locks
from video_opd.errors import UserError
from video_opd.files import replacing_file
from video_opd.locks import locked_file, locked_folder
from video_opd.processes import Processes

HOST = socket.gethostname()
NOBODY = 2**22 + 1  # above the highest number that Linux gives a process


@contextmanager
def other(code: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """Another process, which runs ``code`` and then waits until its input is closed."""
    script = (
        "import sys\nfrom video_opd.locks import *\nfrom video_opd.processes import Processes\n"
        f"{code}\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


FILE, FOLDER = "with locked_file(sys.argv[1]):", "with locked_folder(sys.argv[1]):"


@pytest.mark.parametrize(("code", "lock"), [(FILE, locked_file), (FOLDER, locked_folder)])
def test_a_second_process_is_refused_by_the_name_of_the_first(
    tmp_path: Path, code: str, lock: Callable[[Path], Any]
) -> None:
    out = tmp_path / "new" / "out"
    with other(code, out) as process:
        with pytest.raises(UserError) as refused, lock(out):
            pass
        message = str(refused.value)
        assert message.startswith(f"{out}: process {process.pid} on host {HOST} (since ")
        assert "\n" not in message
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    assert list(tmp_path.rglob("*lock")) == []  # the lock file goes with the lock
    with lock(out):
        pass


def test_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    with other(FILE, tmp_path / "p") as process:
        process.kill()
        process.wait()
        left = json.loads((tmp_path / "p.lock").read_text())
        assert left["pid"] == process.pid and left["host"] == HOST
        with locked_file(tmp_path / "p"):
            assert json.loads((tmp_path / "p.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_children_do_not_keep_the_lock_of_a_dead_parent(tmp_path: Path) -> None:
    code = (
        "import os, subprocess\n"
        "with locked_file(sys.argv[1]):\n"
        "    program = subprocess.Popen(['sleep', '600'], close_fds=False)\n"
        "    fork = os.fork()\n"
        "    if fork == 0: os.execvp('sleep', ['sleep', '600'])\n"
        "    second = os.fork()\n"
        "    if second == 0:\n"
        "        import time; time.sleep(600)\n"
        "    open(sys.argv[2], 'w').write(f'{program.pid} {fork} {second}')"
    )
    with other(code, tmp_path / "p", tmp_path / "pids") as process:
        children = [int(word) for word in (tmp_path / "pids").read_text().split()]
        try:
            process.kill()
            process.wait()
            with locked_file(tmp_path / "p"):
                for child in children:
                    os.kill(child, 0)  # it is there
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_a_fork_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    with locked_file(tmp_path / "p"):
        (held,) = locks._locks.values()
        child = os.fork()
        if child == 0:
            locks._leave(held, tmp_path / "p.lock", Processes(), finished=True)  # it leaves the block
            try:
                with locked_file(tmp_path / "p"):
                    os._exit(1)
            except UserError:
                os._exit(0 if (tmp_path / "p.lock").exists() else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_block_inside_a_block_holds_the_same_lock(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("p")
    with locked_file(tmp_path / "p"):
        with locked_file(tmp_path / "link"):
            assert not (tmp_path / "link.lock").exists()
        assert (tmp_path / "p.lock").exists()
        with pytest.raises(ZeroDivisionError), locked_file(tmp_path / "p"):
            1 / 0  # noqa: B018
        assert refused_in_another_process(tmp_path / "p")
    assert not (tmp_path / "p.lock").exists()


def refused_in_another_process(out: Path) -> bool:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: _try(out))
    process.start()
    process.join()
    return process.exitcode == 7


def _try(out: Path) -> None:
    try:
        with locked_file(out):
            pass
    except UserError:
        os._exit(7)


def test_another_thread_is_refused(tmp_path: Path) -> None:
    found: list[str] = []

    def run() -> None:
        try:
            with locked_file(tmp_path / "p"):
                pass
        except UserError as error:
            found.append(str(error))

    with locked_file(tmp_path / "p"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found and f"another thread of this process ({os.getpid()})" in found[0]


def test_the_name_of_an_earlier_process_is_not_believed(tmp_path: Path) -> None:
    """The holder has the lock, but its name is not in the file yet: there is that of a dead process."""
    with other(FILE, tmp_path / "p") as dead:
        dead.kill()
        dead.wait()
    stale = (tmp_path / "p.lock").read_text()
    with other(FILE, tmp_path / "p") as process:
        named = (tmp_path / "p.lock").read_text()
        (tmp_path / "p.lock").write_text(stale)
        timer = threading.Timer(0.1, lambda: (tmp_path / "p.lock").write_text(named))
        timer.start()
        with pytest.raises(UserError, match=f"process {process.pid} on host"), locked_file(tmp_path / "p"):
            pass
        timer.join()


def test_a_process_of_another_host_is_named(tmp_path: Path) -> None:
    """Whether a process of its number is here, too, says nothing about it."""
    with other(FILE, tmp_path / "p"):
        elsewhere = {"host": "node-7", "pid": NOBODY, "since": "2026-01-02 03:04:05+00:00"}
        (tmp_path / "p.lock").write_text(json.dumps(elsewhere))
        named = rf": process {NOBODY} on host node-7 \(since 2026"
        with pytest.raises(UserError, match=named), locked_file(tmp_path / "p"):
            pass


RANK = (
    "processes = Processes(rank=int(sys.argv[2]), count=2)\n"
    "Processes.on_first = lambda self, work: work() if self.first else None\n"
    "with locked_file(sys.argv[1], processes):"
)


def test_the_processes_of_a_launcher_share_a_lock_and_each_of_them_keeps_others_out(tmp_path: Path) -> None:
    out = tmp_path / "p"
    with other(RANK, out, 0) as first, other(RANK, out, 1) as second:
        with pytest.raises(UserError, match=f"process {first.pid} on host"), locked_file(out):
            pass
        first.kill()  # as a machine without memory does; the other process goes on for a while
        first.wait()
        named = f"was started with process {first.pid} on host"
        with pytest.raises(UserError, match=named), locked_file(out):
            pass
        second.kill()
        second.wait()
        with locked_file(out):
            pass
    assert not (tmp_path / "p.lock").exists()


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> Processes:
    """This process as the first of two, which do not talk."""
    monkeypatch.setattr(Processes, "on_first", lambda self, work: work())
    return Processes(rank=0, count=2)


def test_work_that_failed_leaves_the_file_while_another_process_may_be_writing(
    tmp_path: Path, one_of_two: Processes
) -> None:
    out = tmp_path / "p"
    with pytest.raises(ZeroDivisionError), locked_file(out, one_of_two):
        second = stack_of(other(RANK, out, 1))
        1 / 0  # noqa: B018
    with second:
        assert (tmp_path / "p.lock").exists() and refused_in_another_process(out)


def test_another_process_that_has_finished_leaves_the_lock_to_the_first(
    tmp_path: Path, one_of_two: Processes
) -> None:
    out = tmp_path / "p"
    with locked_file(out, one_of_two):
        with other(RANK, out, 1) as second:
            assert second.stdin is not None
            second.stdin.close()
            assert second.wait() == 0
        assert (tmp_path / "p.lock").exists() and refused_in_another_process(out)
    assert not (tmp_path / "p.lock").exists()


def stack_of(entered: Any) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(entered)
    return stack


@pytest.mark.parametrize("broken", [KeyboardInterrupt, ZeroDivisionError, None])
def test_nothing_is_left_of_a_lock(tmp_path: Path, broken: type[BaseException] | None) -> None:
    gc.collect()  # files that earlier tests have left to it
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    with pytest.raises(broken) if broken else nullcontext(), locked_file(tmp_path / "p"):
        if broken:
            raise broken
    after = os.listdir("/proc/self/fd") if before else []
    assert not {*after} - {*before} and locks._locks == {} and list(tmp_path.iterdir()) == []


def test_the_owner_replaces_whatever_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOOKS", 3)
    (tmp_path / "p.lock").write_text("x" * 500)
    with locked_file(tmp_path / "p"):
        assert json.loads((tmp_path / "p.lock").read_text())["pid"] == os.getpid()
    with other(FILE, tmp_path / "p"):
        for text in ("", "x", "[]", '{"host": 1}', '{"host": "a", "pid": "b", "since": 1}'):
            (tmp_path / "p.lock").write_text(text)
            named = "p: another process is writing it"
            with pytest.raises(UserError, match=named), locked_file(tmp_path / "p"):
                pass


def test_a_lock_holds_without_the_name_of_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(locks, "LOOKS", 3)
    with locked_file(tmp_path / "p"):
        assert refused_in_another_process(tmp_path / "p")


def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    for _ in range(2):
        with locked_file(tmp_path / "p"):
            pass
    told = capsys.readouterr().err
    assert told.count("cannot be locked (No locks available)") == 1 and str(tmp_path / "p.lock") in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_where_nothing_can_be_written_nothing_is_locked(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with locked_file(tmp_path / "p"):
        assert not (tmp_path / "p.lock").exists()


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_there_and_cannot_be_locked_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    """Its folder is read-only, and the file is not. For a new one the command itself says what is wrong."""
    real, out = os.open, tmp_path / "p"
    if there:
        out.write_text("")

    def read_only(path: Any, *options: Any, **settings: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *options, **settings)

    monkeypatch.setattr(os, "open", read_only)
    with locked_file(out):
        pass
    told = capsys.readouterr().err
    assert ("p.lock: cannot be locked (Permission denied)" in " ".join(told.split())) == there


def test_a_path_through_a_file_is_left_to_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with locked_file(tmp_path / "file" / "p"):
        pass


def test_the_lock_file_of_the_last_holder_is_not_taken_for_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes the file between our opening and our locking it: that lock would hold for nobody."""
    real = locks._lock_all
    calls = 0

    def removed_before(descriptor: int) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / "p.lock").unlink()
        return real(descriptor)

    monkeypatch.setattr(locks, "_lock_all", removed_before)
    with locked_file(tmp_path / "p"):
        assert calls == 2 and (tmp_path / "p.lock").exists()
        assert refused_in_another_process(tmp_path / "p")


def test_folders_that_were_made_for_a_lock_and_stayed_empty_are_removed(tmp_path: Path) -> None:
    with locked_file(tmp_path / "a" / "b" / "p"), locked_folder(tmp_path / "c"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked_file(tmp_path / "a" / "b" / "p"):
        (tmp_path / "a" / "written").write_text("")
        1 / 0  # noqa: B018
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["written"]
    (tmp_path / "before").mkdir()
    with locked_folder(tmp_path / "before"):
        pass
    assert (tmp_path / "before").is_dir()


def test_a_folder_that_another_command_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other command made it for its own lock, and removes it between our making it and our lock file."""
    real, calls = os.open, 0

    def removed_before(path: Any, *options: Any) -> int:
        nonlocal calls
        calls += str(path).endswith("p.lock")
        if calls == 1:
            (tmp_path / "new").rmdir()
        return real(path, *options)

    monkeypatch.setattr(os, "open", removed_before)
    with locked_file(tmp_path / "new" / "p"):
        assert calls == 2 and (tmp_path / "new" / "p.lock").exists()


@pytest.mark.parametrize(("lock", "kind"), [(locked_file, "folder"), (locked_folder, "file")])
def test_what_cannot_be_replaced_is_not_locked(
    tmp_path: Path, lock: Callable[[Path], Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("")
    else:
        out.mkdir()
    with lock(out), locked_file(os.devnull):
        assert list(tmp_path.rglob("*")) == [out] and not os.path.exists(f"{os.devnull}.lock")
    assert capsys.readouterr().err == ""


def test_what_a_killed_writer_left_of_a_file_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / f".part-p{ending}.0123abcd" for ending in ("", ".meta.json", ".window")]
    others = [tmp_path / name for name in (".part-p.html.0123abcd", ".part-pp.0123abcd", ".part-p.mine", "p")]
    for path in (*left, *others):
        path.write_text("half")
    with locked_file(tmp_path / "p"):
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)
        with replacing_file(tmp_path / "p") as temporary, locked_file(tmp_path / "p"):
            temporary.write_text("whole")  # the inner block leaves it alone
    assert (tmp_path / "p").read_text() == "whole"
