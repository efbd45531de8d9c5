"""Locks on outputs: of two commands on one output, one works and the other is refused.

A command holds a lock on each of its outputs while it runs. A second command on the same output raises
:class:`UserError`, which names the host and the process of the first::

    with locked_folder("runs/a"):          # runs/a/.lock
        ...
    with locked_file("p.jsonl"):           # p.jsonl.lock
        ...

The lock is a POSIX record lock on a small file, which says who holds it. The kernel drops the lock when the
process ends, however it ends, so a lock file that a kill leaves is no obstacle. Child processes do not
inherit the lock. Over NFS the server keeps it (version 4, or version 3 with its lock service), so it holds
between hosts; a mount with ``nolock`` or ``local_lock`` limits it to one host, which cannot be noticed. On a
file system without locks, the command says so once and goes on.

The processes that one launcher started share a lock: each holds one byte of the file. The first process takes
all of them before it lets the others take theirs, so a process that is left over from a killed run still
keeps the next run out.

A function that replaces its file in one step (:func:`video_opd.files.replacing_file`) takes no lock itself:
of two callers the last one wins, and its file is whole. The commands lock those files, too.

Devices, pipes and whatever else cannot be replaced have no lock: the command refuses them itself. Folders
that were made for a lock file, and are empty when the lock ends, are removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from video_opd.errors import UserError
from video_opd.files import discard_unfinished_file
from video_opd.processes import Processes
from video_opd.progress import log

HELD = (errno.EACCES, errno.EAGAIN)  # POSIX allows either
TO_THE_END = 0  # as a length: every byte that a file can have
BESIDES = ("", ".meta.json", ".window")  # suffixes of the files that share an output's lock
# A process that has just taken a lock has yet to write its name; one that is refused tries again this often.
LOOKS, LOOK_EVERY_S = 100, 0.02


@dataclass(kw_only=True)
class _Lock:
    """A lock of this process. ``descriptor`` is None where no lock could be had."""

    descriptor: int | None
    process: int
    thread: int
    depth: int = 1  # how many blocks of this thread are inside each other
    made: list[Path] = field(default_factory=list)  # folders, the innermost first


_locks: dict[str, _Lock] = {}  # path of the lock file -> lock
_guard = threading.Lock()
_told: set[str] = set()
# A fork has the dictionary, but not the locks.
os.register_at_fork(after_in_child=_locks.clear)


@contextmanager
def locked_file(out: str | Path, processes: Processes | None = None) -> Iterator[None]:
    """Keeps other commands from writing the file ``out`` during the block.

    The unfinished files that killed commands left beside ``out`` are removed.

    A block inside another one on the same output, in the same thread, holds the same lock. With several
    ``processes``, all of them must enter the block. Raises :class:`UserError`, in all of them, if another
    process or another thread is writing ``out``.
    """
    path = os.path.realpath(out)
    with _locked(Path(f"{path}.lock"), out, processes or Processes(), os.path.isfile) as taken:
        if taken:
            discard_unfinished_file(path, BESIDES)
        yield


@contextmanager
def locked_folder(folder: str | Path, processes: Processes | None = None) -> Iterator[None]:
    """Keeps other commands from writing into ``folder`` during the block, like :func:`locked_file`."""
    with _locked(Path(os.path.realpath(folder), ".lock"), folder, processes or Processes(), os.path.isdir):
        yield


def is_being_written(folder: str | Path) -> bool:
    """Whether a living process says that it is writing in ``folder``. It takes no lock, and only reads.

    A process of another host is believed to live. Raises nothing: without a lock file it is False.
    """
    path = os.path.realpath(os.path.join(folder, ".lock"))
    with _guard:
        if path in _locks:  # opening the file here, and closing it, would end this process's own lock
            return True
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError):
        return False
    try:
        owner = _owner(descriptor)
    finally:
        os.close(descriptor)
    return owner is not None and owner.lives


@contextmanager
def _locked(
    path: Path, output: str | Path, processes: Processes, is_right: Callable[[str | Path], bool]
) -> Iterator[bool]:
    """Yields whether this block took the lock, so that nobody else is writing the output."""
    # Several processes enter together whatever is there, because they wait for each other.
    if processes.count == 1 and os.path.exists(output) and not is_right(output):
        yield False
        return
    key, thread = str(path), threading.get_ident()
    with _guard:
        lock = _locks.get(key)
        if lock is not None and lock.thread != thread:
            raise UserError(_refusal(output, f"another thread of this process ({os.getpid()})"))
        if lock is not None:
            lock.depth += 1
        else:
            lock = _locks[key] = _Lock(descriptor=None, process=os.getpid(), thread=thread)
    try:
        if lock.depth == 1:
            _enter(lock, path, output, processes)
        yield lock.depth == 1 and lock.descriptor is not None and processes.first
    except BaseException:
        _leave(lock, path, processes, finished=False)
        raise
    _leave(lock, path, processes, finished=True)


def _enter(lock: _Lock, path: Path, output: str | Path, processes: Processes) -> None:
    def take() -> None:
        lock.descriptor = _take(path, output, lock.made)
        if lock.descriptor is not None and processes.count > 1:
            fcntl.lockf(lock.descriptor, fcntl.LOCK_UN, TO_THE_END, 1)

    processes.on_first(take)
    if not processes.first:
        lock.descriptor = _join(path, processes.rank)


def _leave(lock: _Lock, path: Path, processes: Processes, *, finished: bool) -> None:
    if lock.process != os.getpid():  # a fork that left the block of its parent
        return
    lock.depth -= 1
    if lock.depth:
        return
    if lock.descriptor is not None:
        # The file is removed while the lock is held, so that nobody takes a lock on a file that is gone. If
        # the work failed, other processes may still be writing: then the file stays.
        with suppress(OSError):
            if processes.first and (finished or _lock_all(lock.descriptor)):
                path.unlink()
        os.close(lock.descriptor)
    with suppress(OSError):
        for folder in lock.made:
            folder.rmdir()
    with _guard:
        _locks.pop(str(path), None)


def _take(path: Path, output: str | Path, made: list[Path]) -> int | None:
    """The descriptor of the lock file, with all its bytes locked; None if no lock can be had there.

    The folders that had to be made for it are appended to ``made``.
    """
    owner = None
    for look in range(LOOKS):
        try:
            made += [folder for folder in path.parents if folder not in made and not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            # Python's descriptors are closed in a program that this process starts.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and look + 1 < LOOKS:
                continue  # another command has just removed the folder that it made for its own lock
            if os.path.exists(output):
                _tell(path, error)
            return None  # a command that cannot write there says so itself
        try:
            locked = _lock_all(descriptor)
        except OSError as error:
            os.close(descriptor)
            _tell(path, error)
            return None
        if locked and _is_current(descriptor, path):
            _write_owner(descriptor)
            return descriptor
        owner = None if locked else _owner(descriptor)
        os.close(descriptor)
        if owner is not None and owner.lives:
            break
        time.sleep(LOOK_EVERY_S)  # the name is that of an earlier, dead process
    raise UserError(_refusal(output, "another process" if owner is None else str(owner)))


def _join(path: Path, rank: int) -> int | None:
    """Locks byte ``rank`` of the file that the first process has locked."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None  # the first process has no lock either
    with suppress(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
    return descriptor


def _lock_all(descriptor: int) -> bool:
    """Whether all bytes of the file are locked now. Raises OSError if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, TO_THE_END)
    except OSError as error:
        if error.errno in HELD:
            return False
        raise
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """False if the file was removed, by the process that held the lock before."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class _Owner:
    host: str
    pid: int
    since: str

    @property
    def lives(self) -> bool:
        """Whether the process is there. Processes of other hosts are believed to be."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # another user's
        return True

    def __str__(self) -> str:
        # The first process may have ended before the others of its launcher.
        who = "process" if self.lives else "a process that was started with process"
        return f"{who} {self.pid} on host {self.host} (since {self.since})"


def _write_owner(descriptor: int) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    with suppress(OSError):  # on a full disk the lock holds, too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode() + b"\n", 0)


def _owner(descriptor: int) -> _Owner | None:
    try:
        row = json.loads(os.pread(descriptor, 4096, 0))
        return _Owner(host=str(row["host"]), pid=int(row["pid"]), since=str(row["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refusal(output: str | Path, owner: str) -> str:
    return f"{output}: {owner} is writing it: wait until that has ended, or choose another output"


def _tell(path: Path, error: OSError) -> None:
    if str(path) not in _told:
        _told.add(str(path))
        log(f"{path}: cannot be locked ({error.strerror}); see that no other command writes there meanwhile")
