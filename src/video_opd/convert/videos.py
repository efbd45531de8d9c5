"""The videos of a source: the names that it gives them are looked up under the video root."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from video_opd.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class Videos:
    """Finds videos by name and remembers which are missing.

    ``find`` returns a path relative to ``folder``, the new data file's folder, or an absolute path if the
    root is absolute. The new file therefore needs no video root.
    """

    def __init__(self, root: str | Path | None, folder: Path) -> None:
        self.root = None if root is None else Path(root)
        self.folder = folder
        self.missing: set[str] = set()
        self._found: dict[tuple[str, bool], str] = {}
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; --video-root names the folder of the videos")

    def find(self, name: str, *, is_id: bool) -> str:
        """The first of these that exists: the name, with another ending, both without leading folders.

        If there is no root, or none of them exists, it is the name, with .mp4 if the name has no ending.
        """
        if (name, is_id) not in self._found:
            self._found[name, is_id] = self._find(name, is_id)
        return self._found[name, is_id]

    def _find(self, name: str, is_id: bool) -> str:
        plain = f"{name}{VIDEO_SUFFIXES[0]}" if is_id else PurePosixPath(name).as_posix()
        if self.root is None:
            return plain
        parts = PurePosixPath(plain).parts
        tails = [PurePosixPath(*parts[i:]) for i in range(len(parts))]
        stem = name if is_id else None
        for tail in tails:
            for candidate in _endings(tail, stem):
                if os.path.isfile(self.root / candidate):
                    return self._relative(candidate)
        found = self._relative(PurePosixPath(plain))
        self.missing.add(found)
        return found

    def _relative(self, path: PurePosixPath) -> str:
        assert self.root is not None
        if self.root.is_absolute():
            return (self.root / path).as_posix()
        return Path(os.path.relpath(self.root / path, self.folder)).as_posix()


def _endings(path: PurePosixPath, stem: str | None) -> Iterator[PurePosixPath]:
    """The path, then the same with each ending. ``stem`` is the name without an ending, dots included."""
    yield path
    base = path.stem if stem is None else PurePosixPath(stem).name
    for suffix in VIDEO_SUFFIXES:
        yield path.with_name(f"{base}{suffix}")


def probed_duration_s(path: Path) -> float | None:
    """The duration that the video file itself states, in seconds; None if it cannot be read."""
    from video_opd.data.video import VideoError, probe

    try:
        return probe(path).duration_s
    except (VideoError, OSError):
        return None
