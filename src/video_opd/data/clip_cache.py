"""Keeps decoded clips on disk, up to a bound. The least recently used clips are removed first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import threading
import zipfile
from pathlib import Path

import numpy as np

from video_opd.config import VideoConfig
from video_opd.data.budget import PAIR
from video_opd.data.video import clip_digest, load_clip
from video_opd.errors import UserError
from video_opd.files import discard_unfinished, replacing_file
from video_opd.types import Clip

logger = logging.getLogger(__name__)

# 3: clips of files that are refused now, as those with pauses in their edit list; 2: an entry had no seal;
# 1: frames of files without presentation times were guesses.
FORMAT = 4
# numpy reads an array's header with Python's parser, whose state the threads of Python 3.11 share: of two
# that parse at a time one may fail with a SystemError (https://github.com/python/cpython/issues/106905).
_PARSER = threading.Lock()
_RESCAN_EVERY = 64  # writes between two looks at the folder, which other processes write to as well


class ClipCache:
    """Keeps clips under ``folder``, at most ``max_bytes`` of them. Threads and processes may share a folder.

    The key of a clip is its file's path, size and change time, the budget and the backend. An entry that does
    not match its seal, or holds values that no video has, is decoded again. If the disk cannot be written to,
    one warning says so, and nothing more is written.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._writable = True
        self._puts = 0
        self._bytes = 0

    def load(self, path: Path, budget: VideoConfig, backend: str) -> Clip:
        """Returns the clip, from disk if it is there. Raises VideoError as :func:`load_clip` does."""
        entry = self._entry(path, budget, backend)
        clip = None if entry is None else self._read(entry, path)
        if clip is None:
            clip = load_clip(path, budget, backend)
            if entry is not None:
                self._write(entry, clip)
        return clip

    def _entry(self, path: Path, budget: VideoConfig, backend: str) -> Path | None:
        try:
            stat = path.stat()
        except (OSError, ValueError):
            return None  # load_clip raises the error that names the problem
        file = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]  # a row may name it by another path
        known = [FORMAT, *file, backend, budget.without_decoder()]
        key = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
        return self.folder / f"{key}.npz"

    def _read(self, entry: Path, path: Path) -> Clip | None:
        """The clip in ``entry``; None if it is missing, damaged, or not what a decoded video can be: the clip
        is then decoded again and replaces it."""
        try:
            _check_uncompressed(entry)
            with _PARSER, np.load(entry, allow_pickle=False) as stored:
                text, seal = str(stored["meta"]), str(stored["seal"])
                frames, times_s, indices = stored["frames"], stored["times_s"], stored["frame_indices"]
            if seal != _seal(text, frames, times_s, indices):
                return None
            with contextlib.suppress(OSError):  # the folder is somebody else's, or the entry was removed
                os.utime(entry)
            meta = json.loads(text)
            height, width = meta["source_size_px"]
            clip = Clip(
                path=path,
                frames=frames,
                times_s=times_s,
                frame_indices=indices,
                source_fps=meta["source_fps"],
                duration_s=meta["duration_s"],
                source_size_px=(height, width),
                digest=meta["digest"],
            )
            return clip if _is_possible(clip) else None
        except (
            *(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile),
            *(MemoryError, OverflowError, RecursionError, SyntaxError, NotImplementedError, RuntimeError),
            SystemError,  # of the parser, if another library's thread parsed at the same time
        ):
            return None

    def _write(self, entry: Path, clip: Clip) -> None:
        if not self._writable or clip.frames.nbytes > self.max_bytes:
            return
        names = ("source_fps", "duration_s", "source_size_px", "digest")
        meta = json.dumps({name: getattr(clip, name) for name in names})
        arrays = {name: getattr(clip, name) for name in ("frames", "times_s", "frame_indices")}
        try:
            # Reading an entry checks its digest, so writing does not wait for the disk.
            seal = np.array(_seal(meta, *arrays.values()))
            with replacing_file(entry, flush=False) as temporary:
                with open(temporary, "wb") as file:
                    np.savez(file, meta=np.array(meta), seal=seal, **arrays)
                size = temporary.stat().st_size  # another process may remove the entry once it is there
            self._trim(size)
        except (OSError, UserError) as error:
            with self._lock:
                first, self._writable = self._writable, False
            if first:
                logger.warning("no more clips are cached: %s", error)

    def _trim(self, added_bytes: int) -> None:
        with self._lock:
            self._bytes += added_bytes
            self._puts += 1
            if self._bytes <= self.max_bytes and self._puts % _RESCAN_EVERY != 1:
                return
            if self._puts == 1:
                discard_unfinished(self.folder)  # the bound does not count what killed processes left
            entries = []
            for entry in self.folder.glob("*.npz"):
                with contextlib.suppress(OSError):  # another process may have removed it
                    stat = entry.stat()
                    entries.append((stat.st_mtime_ns, stat.st_size, entry))
            self._bytes = sum(size for _, size, _ in entries)
            for _, size, entry in sorted(entries):
                if self._bytes <= self.max_bytes:
                    break
                entry.unlink(missing_ok=True)
                self._bytes -= size


def _check_uncompressed(entry: Path) -> None:
    """Raises ValueError for an archive whose content is larger than itself: this class never compresses."""
    with zipfile.ZipFile(entry) as archive:
        if sum(item.file_size for item in archive.infolist()) > entry.stat().st_size:
            raise ValueError("a compressed archive")


def _seal(meta: str, frames: np.ndarray, times_s: np.ndarray, indices: np.ndarray) -> str:
    """A digest of everything that is read from an entry. It finds damage; it does not say who wrote it."""
    digest = hashlib.blake2b(meta.encode(), digest_size=16)
    for array in (frames, times_s, indices):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _is_possible(clip: Clip) -> bool:
    """Whether the values of an entry are those that a decoded video may have, whoever wrote them."""
    frames, times_s, indices = clip.frames, clip.times_s, clip.frame_indices
    count = len(times_s)
    numbers = (clip.source_fps, clip.duration_s)
    return (
        frames.dtype == np.uint8
        and (times_s.dtype, indices.dtype) == (np.float64, np.int64)
        and frames.ndim == 4
        and frames.shape[3] == 3
        and frames.size > 0
        and times_s.shape == indices.shape == frames.shape[:1]
        and count % PAIR == 0
        and all(type(number) is float and math.isfinite(number) and number > 0 for number in numbers)
        and all(type(pixels) is int and pixels > 0 for pixels in clip.source_size_px)
        and bool(
            np.isfinite(times_s).all() and (np.diff(times_s) >= 0).all() and (np.diff(indices) >= 0).all()
        )
        and times_s[0] >= 0
        and indices[0] >= 0
        and times_s[-1] < clip.duration_s
        and clip.digest == clip_digest(frames, times_s)
    )
