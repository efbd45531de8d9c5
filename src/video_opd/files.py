"""Files and folders that are replaced whole or not at all.

The new content is written under a temporary name beside its target, flushed to the disk, and renamed. A kill
or a full disk leaves what was there before. (A folder is replaced by two renames. A kill between them leaves
the old folder as ``.old-NAME``, from where :func:`discard_unfinished` and the next writer bring it back.)

A writer holds a ``flock`` on its temporary file, and the kernel drops it when the writer has died. So the
temporary files of dead writers can be told from those of living ones, and only they are removed.

Example::

    with replacing_file("runs/a/model.bin") as temporary:
        temporary.write_bytes(content)
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from video_opd.errors import UserError

MOST_TEXT_BYTES = 1 << 24  # of a file that holds one record: settings, a summary, a list of files
_LINK_MEMORY = 4096  # folders; videos of a data file share few
UNFINISHED = ".part-"  # the names of unfinished files and folders begin with it
REPLACED = ".old-"  # the same for a folder that is about to be removed
_MOST_NAME_BYTES = 255  # of a file's name, on all common file systems
_RANDOM_BYTES = 4  # at the end of the name of an unfinished file, in hexadecimal digits


def relative_path(path: str | Path, folder: str | Path) -> str:
    """``path`` as it is written into a file that lies in ``folder``: relative to that, with slashes.

    Where ``folder`` lies behind a symbolic link, ``..`` leaves the folder that the link points to. The
    result then goes by the real folders; everywhere else it is that of ``os.path.relpath``.
    """
    path, here = Path(path), os.getcwd()
    parent = _relative_folder(os.path.join(here, path.parent), os.path.join(here, folder))
    return PurePosixPath(Path(parent).as_posix(), path.name).as_posix()


@functools.lru_cache(_LINK_MEMORY)
def _relative_folder(path: str, folder: str) -> str:
    relative = os.path.relpath(path, folder)
    real, real_folder = os.path.realpath(path), os.path.realpath(folder)
    if os.path.realpath(os.path.join(real_folder, relative)) == real:
        return relative
    return os.path.relpath(real, real_folder)


@contextlib.contextmanager
def replacing_file(path: str | Path, *, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary path; the file that the block writes there then takes the place of ``path``.

    The folder is made if it is not there. If ``path`` is a link, the file that it points to is replaced. The
    permissions of a file that was there stay. The temporary file is there and empty; the block writes into
    it, and does not replace it by another.
    ``flush=False`` does not wait for the disk: it is for files whose content is checked when they are read.

    Raises :class:`UserError` that names ``path`` and the remedy if the block or the replacement raises
    OSError, and if ``path`` is not a plain file: replacing a device or a pipe would take it away from
    everybody. Other exceptions of the block pass unchanged. The temporary file is removed in every case.
    """
    target = _target(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise UserError(f"{path}: not a plain file; name a file to write")
    # The name ends in random letters: it matches no pattern such as *.json, and two writers do not collide.
    temporary = target.with_name(f"{_unfinished(target.name)}.{os.urandom(_RANDOM_BYTES).hex()}")
    lock = None
    try:
        with disk_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _made_and_locked(temporary)
            mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
            _set_mode(temporary, None if mode is None else mode | stat.S_IRUSR | stat.S_IWUSR)
            yield temporary
            if flush:
                _flush(temporary)
            _set_mode(temporary, mode)
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new empty folder; it takes the place of ``path`` when the block has ended.

    The parent folder is made if it is not there. If ``path`` is a link, the folder that it points to is
    replaced. One process at a time may replace a folder.

    Raises :class:`UserError` that names ``path`` and the remedy if the block or the replacement raises
    OSError, and if ``path`` is a file. Other exceptions of the block pass unchanged.
    """
    target = _target(path)
    if os.path.exists(target) and not os.path.isdir(target):
        raise UserError(f"{path}: a file; name a folder to write")
    temporary = target.with_name(f"{UNFINISHED}{target.name}")
    old = target.with_name(f"{REPLACED}{target.name}")
    try:
        with disk_errors(path):
            _tidy(temporary, old, target)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            if target.exists():  # a folder that is not empty cannot be replaced in one step
                os.replace(target, old)
            os.replace(temporary, target)
    finally:
        _tidy(temporary, old, target)


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths name one file, there or yet to be written. False for devices, pipes and folders: they
    are not replaced."""
    there = [os.path.exists(path) for path in (one, other)]
    with contextlib.suppress(OSError, ValueError):  # a path that no file can have
        if all(there):
            return os.path.isfile(one) and os.path.samefile(one, other)
        return not any(there) and os.path.realpath(one) == os.path.realpath(other)
    return False


def need_another_file(name: str, out: str | Path, inputs: Iterable[tuple[str, str | Path]]) -> None:
    """Raises :class:`UserError` if the output ``out`` is one of the files that are read.

    ``name`` is what the message calls the output; ``inputs`` are (name, path) of the files that are read.
    """
    for read, path in inputs:
        if is_same_file(out, path):
            raise UserError(f"{name} {out} is also {read}: it would be replaced; name another file")


def discard_unfinished(folder: str | Path, name: str = "") -> None:
    """Removes the unfinished files and folders that a kill left in ``folder``.

    Files that another process is writing stay, and so do all unfinished files on a file system without locks.
    Nothing may be replacing a folder there. With ``name``, only those whose own names begin with it are
    removed. A folder that was moved aside, and whose successor did not come, is brought back.
    """
    pattern = f"{glob.escape(name)}*"
    for old in Path(folder).glob(f"{REPLACED}{pattern}"):
        name = old.name.removeprefix(REPLACED)
        _tidy(old.with_name(f"{UNFINISHED}{name}"), old, old.with_name(name))
    for path in Path(folder).glob(f"{UNFINISHED}{pattern}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            _remove_if_abandoned(path)


def discard_unfinished_file(path: str | Path, besides: Sequence[str] = ("",)) -> None:
    """Removes the temporary files that killed writers of the file ``path`` left. Living ones are left alone.

    ``besides`` are endings of the names of files that are written with it; "" is the file itself.
    """
    target = _target(path)
    for ending in besides:
        name = glob.escape(_unfinished(target.name + ending))
        pattern = f"{name}.{'[0-9a-f]' * 2 * _RANDOM_BYTES}"
        for left in target.parent.glob(pattern):
            _remove_if_abandoned(left)


def read_text(path: str | Path) -> str:
    """The text of a file that holds one record, in UTF-8.

    Raises OSError as ``open`` does, and ValueError for bytes that are no UTF-8. Raises :class:`UserError` for
    a pipe or a device, which would wait or never end, and for a file of more than ``MOST_TEXT_BYTES``.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path}: not a plain file; put the file there that belongs there")
    with open(path, "rb") as file:
        content = file.read(MOST_TEXT_BYTES + 1)
    if len(content) > MOST_TEXT_BYTES:
        raise UserError(
            f"{path}: larger than {MOST_TEXT_BYTES >> 20} MiB, which no such file is; put the file there "
            "that belongs there"
        )
    return content.decode("utf-8")


def write_text(path: str | Path, text: str) -> Path:
    """Replaces ``path`` by ``text`` in UTF-8 and returns it. Raises as :func:`replacing_file` does.

    A lone surrogate, from a broken file name for example, has no UTF-8 form: its escape is written.
    """
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turns an OSError of the block into a :class:`UserError` that names ``path`` and the remedy."""
    try:
        yield
    except OSError as error:
        reason = str(error.strerror or error).splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({reason}; {_free(path)}): free some space or choose another place, "
            "then repeat the command; what was written before is kept"
        ) from error


def _target(path: str | Path) -> Path:
    """The place that ``path`` names, links followed. Raises :class:`UserError` if it names none."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # the working folder was deleted; a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a path that can be written ({reason}); choose another place") from None


def _unfinished(name: str) -> str:
    """How the name of the unfinished file ``name`` begins. A name that is too long for it is cut, and told
    from others by its digest."""
    longest = _MOST_NAME_BYTES - len(UNFINISHED) - 1 - 2 * _RANDOM_BYTES
    encoded = os.fsencode(name)
    if len(encoded) <= longest:
        return f"{UNFINISHED}{name}"
    digest = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    kept = encoded[: longest - len(digest) - 1].decode("utf-8", errors="ignore")
    return f"{UNFINISHED}{kept}-{digest}"


def _set_mode(file: Path, mode: int | None) -> None:
    """Sets the permissions, as far as the file system has any; None leaves them."""
    if mode is not None:
        with contextlib.suppress(OSError):
            file.chmod(mode)


def _made_and_locked(temporary: Path) -> int:
    """Makes the file and returns a descriptor that locks it, as far as the file system has locks.

    ``flock`` belongs to the descriptor: a POSIX record lock would end when the block closes the file.
    """
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            # Between the two calls the file looked abandoned. If it was removed, the lock is worth nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                return descriptor
        os.close(descriptor)


def _remove_if_abandoned(temporary: Path) -> None:
    """Removes the file unless it is locked by its writer, or cannot be locked."""
    with contextlib.suppress(OSError):
        if temporary.is_symlink():
            temporary.unlink()
            return
        # NFS gives an exclusive lock to descriptors that may write.
        descriptor = os.open(temporary, os.O_RDWR | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()
        finally:
            os.close(descriptor)


def _tidy(temporary: Path, old: Path, target: Path) -> None:
    """Removes what a replacement leaves; brings the old folder back if the new one did not come."""
    if old.exists() and not target.exists():
        os.replace(old, target)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(file: Path) -> None:
    """Waits until the content is on the disk: a power cut must not keep the rename and lose the content."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())


def _free(path: str | Path) -> str:
    for folder in Path(os.path.abspath(path)).parents:
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"
    return "no free space is known"
