"""Keeps decoded clips on disk, up to a bound. The least recently used clips are removed first."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import zipfile
from pathlib import Path

import numpy as np

from video_opd.config import VideoConfig
from video_opd.data.video import clip_digest, load_clip
from video_opd.errors import UserError
from video_opd.files import replacing_file
from video_opd.types import Clip

logger = logging.getLogger(__name__)

FORMAT = 2  # 1: frames and times of files without presentation times were guesses
_RESCAN_EVERY = 64  # writes between two looks at the folder, which other processes write to as well


class ClipCache:
    """Keeps clips under ``folder``, at most ``max_bytes`` of them. Threads and processes may share a folder.

    The key of a clip is its file's path, size and change time, the budget and the backend. An entry that does
    not match its digest is decoded again. If the disk cannot be written to, one warning says so, and nothing
    more is written.
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
        file = [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
        known = [FORMAT, *file, backend, budget.without_decoder()]
        key = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
        return self.folder / f"{key}.npz"

    def _read(self, entry: Path, path: Path) -> Clip | None:
        try:
            with np.load(entry, allow_pickle=False) as stored:
                meta = json.loads(str(stored["meta"]))
                frames, times_s, indices = stored["frames"], stored["times_s"], stored["frame_indices"]
            os.utime(entry)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # an incomplete file or another format: the clip is decoded again and replaces it
        if clip_digest(frames, times_s) != meta["digest"]:
            return None
        size_px = (int(meta["source_size_px"][0]), int(meta["source_size_px"][1]))
        return Clip(
            path=path,
            frames=frames,
            times_s=times_s,
            frame_indices=indices,
            source_fps=meta["source_fps"],
            duration_s=meta["duration_s"],
            source_size_px=size_px,
            digest=meta["digest"],
        )

    def _write(self, entry: Path, clip: Clip) -> None:
        if not self._writable or clip.frames.nbytes > self.max_bytes:
            return
        names = ("source_fps", "duration_s", "source_size_px", "digest")
        meta = json.dumps({name: getattr(clip, name) for name in names})
        arrays = {name: getattr(clip, name) for name in ("frames", "times_s", "frame_indices")}
        try:
            # Reading an entry checks its digest, so writing does not wait for the disk.
            with replacing_file(entry, flush=False) as temporary, open(temporary, "wb") as file:
                np.savez(file, meta=np.array(meta), **arrays)
            self._trim(entry.stat().st_size)
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
