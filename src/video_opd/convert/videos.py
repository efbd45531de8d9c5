"""The videos of a source: the names that it gives them are looked up under the video root."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePosixPath

from video_opd.convert.formats.video_names import ending_of, stem_of
from video_opd.errors import UserError
from video_opd.files import relative_path

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
        self._found: dict[str, str] = {}
        self._listed: dict[str, frozenset[str]] = {}
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; --video-root names the folder of the videos")

    def find(self, name: str) -> str:
        """The path of the video ``name``, which is a path, a file name, or a name without an ending.

        It is the first of these that exists: the name, the name with another ending, both without leading
        folders. If there is no root, or none of them exists, it is the name, with .mp4 if it has no ending.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> str:
        named = PurePosixPath(name if ending_of(name) else f"{name}{VIDEO_SUFFIXES[0]}")
        if self.root is None:
            return named.as_posix()
        *folders, file = PurePosixPath(name).parts
        candidates = _candidates(file)
        for i in range(len(folders) + 1):
            for folder in _spellings(str(PurePosixPath(*folders[i:]))):
                names = self._names(folder)
                for candidate in candidates:
                    if candidate in names and (self.root / folder / candidate).is_file():
                        return self._relative(PurePosixPath(folder, candidate))
        found = self._relative(named)
        self.missing.add(found)
        return found

    def _names(self, folder: str) -> frozenset[str]:
        """The names in a folder under the root. It is listed once, because a video has many candidates."""
        assert self.root is not None
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(self.root / folder))
            except (OSError, ValueError):  # it is not there, cannot be read, or cannot be a name
                self._listed[folder] = frozenset()
        return self._listed[folder]

    def _relative(self, path: PurePosixPath) -> str:
        assert self.root is not None
        if self.root.is_absolute():
            return (self.root / path).as_posix()
        return relative_path(self.root / path, self.folder)


def _spellings(name: str) -> list[str]:
    """``name``, then with each accented letter as one character and as two: file systems store either."""
    if name.isascii():
        return [name]
    return list(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def _candidates(file: str) -> list[str]:
    """The file name, then with each ending in place of its own, then with each ending behind its own.

    Cameras write endings in capitals.
    """
    candidates = []
    for name in _spellings(file):
        candidates.append(name)
        for base in dict.fromkeys((stem_of(name), name)):
            for suffix in VIDEO_SUFFIXES:
                candidates += base + suffix, base + suffix.upper()
    return candidates


def probed_duration_s(path: Path) -> float | None:
    """The duration that the video file itself states, in seconds; None if it cannot be read."""
    from video_opd.data.video import VideoError, probe

    try:
        return probe(path).duration_s
    except (VideoError, OSError):
        return None
