"""Reads the files of a run folder after whatever happened to it, and keeps an account of what it left out.

A file may be missing, cut short, overwritten with zeros, a folder, a pipe or a link to itself. Reading never
raises for any of these, never waits, and never holds more than a limit in memory.
"""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from video_opd.config.tree import parse_yaml
from video_opd.errors import UserError
from video_opd.files import MOST_TEXT_BYTES
from video_opd.jsonl import no_key_twice
from video_opd.terminal import visible

T = TypeVar("T")
Note = Callable[[str], None]  # takes a reason, "duration is 0"

MOST_BYTES = 1 << 28  # bytes of a file of rows
MOST_LINE_BYTES = 1 << 24
MOST_FILES = 1000  # files of eval/, and rounds
MOST_REASONS = 20  # reasons shown of a folder, each with its count
MOST_REASON_LETTERS = 200


class RunFiles:
    """The files below ``folder``. ``name`` is put before the name of each file in the account."""

    def __init__(self, folder: Path, name: str = "") -> None:
        self.folder, self._name = folder, name
        self._cases: dict[tuple[str, str], list[str]] = {}  # (file, reason) → the places where it was found
        self._counts: dict[tuple[str, str], int] = {}

    @property
    def left_out(self) -> tuple[str, ...]:
        """``"metrics.jsonl: 3 × not JSON (first on line 7)"``, …; empty if everything was read."""
        lines = []
        for (file, reason), count in self._counts.items():
            (place,) = self._cases[file, reason]
            where = f" ({'first on ' if count > 1 else 'on '}{place})" if place else ""
            lines.append(visible(f"{self._name}{file}: {f'{count} × ' if count > 1 else ''}{reason}{where}"))
        rest = len(lines) - MOST_REASONS
        return (*lines[:MOST_REASONS], *([f"and {rest} reasons more"] if rest > 0 else []))

    def note(self, file: str, reason: str, place: str = "") -> None:
        reason = reason if len(reason) <= MOST_REASON_LETTERS else reason[:MOST_REASON_LETTERS] + "…"
        self._cases.setdefault((file, reason), [place])
        self._counts[file, reason] = self._counts.get((file, reason), 0) + 1

    def names(self, folder: str, matches: Callable[[str], bool]) -> list[str]:
        """The names of what matches in a folder below this one; none if it is missing or no folder."""
        path = self.folder / folder
        if not os.path.lexists(path):
            return []
        try:
            found = sorted((name for name in os.listdir(path) if matches(name)), key=lambda n: (len(n), n))
        except OSError as error:
            self.note(folder or "the folder", f"cannot be listed ({error.strerror})")
            return []
        if len(found) > MOST_FILES:
            self.note(folder or "the folder", f"more than {MOST_FILES} entries; the others were not read")
        return found[:MOST_FILES]

    def rows(self, file: str, check: Callable[[dict[str, Any], Note], T | None]) -> Iterator[T]:
        """Yields what ``check`` makes of each row; it returns None for a row that is left out."""
        raw = self._open(file)
        if raw is None:
            return
        with raw:
            number = read = 0
            while True:
                try:
                    line = raw.readline(MOST_LINE_BYTES)
                except OSError as error:
                    self.note(file, f"cannot be read ({error.strerror})", f"line {number + 1}")
                    return
                if not line:
                    break
                number, read, place = number + 1, read + len(line), f"line {number + 1}"
                if len(line) == MOST_LINE_BYTES or read > MOST_BYTES:
                    self.note(file, "too long; the rest of the file was not read", place)
                    return
                row = self._parsed(file, line.removeprefix(b"\xef\xbb\xbf"), place)
                checked = None if row is None else check(row, functools.partial(self.note, file, place=place))
                if checked is not None:
                    yield checked
            if number == 0:
                self.note(file, "empty")

    def record(self, file: str) -> dict[str, Any] | None:
        """The object that a JSON file holds; None if it is missing or cannot be used."""
        content = self.content(file)
        return None if content is None else self._parsed(file, content, "")

    def recipe(self, file: str) -> tuple[dict[str, Any], str]:
        """The tree of a YAML file, and its text; both empty if it is missing or cannot be used."""
        content = self.content(file)
        if content is None:
            return {}, ""
        text = content.decode("utf-8", errors="backslashreplace")
        try:
            tree = parse_yaml(content.decode("utf-8"), file)
        except UnicodeDecodeError as error:
            self.note(file, f"not UTF-8 at byte {error.start}")
            return {}, visible(text, keep="\n\t")
        except UserError as error:
            self.note(file, str(error).removeprefix(file).lstrip(": "))
            return {}, visible(text, keep="\n\t")
        if not isinstance(tree, dict):
            self.note(file, "empty" if tree is None else f"a {type(tree).__name__}, not sections of keys")
            tree = {}
        return {str(key): value for key, value in tree.items()}, visible(text, keep="\n\t")

    def content(self, file: str) -> bytes | None:
        """The bytes of a small file; None if it is missing or cannot be read."""
        raw = self._open(file)
        if raw is None:
            return None
        with raw:
            try:
                content = raw.read(MOST_TEXT_BYTES + 1)
            except OSError as error:
                self.note(file, f"cannot be read ({error.strerror})")
                return None
        if len(content) > MOST_TEXT_BYTES:
            self.note(file, f"larger than {MOST_TEXT_BYTES >> 20} MiB")
            return None
        if not content.strip(b"\0 \t\r\n"):
            self.note(file, "empty" if not content else f"{len(content)} bytes, and nothing in them")
            return None
        return content

    def _open(self, file: str) -> Any:
        """The file, opened; None, with a note, for anything but a plain file. Opening a pipe would wait."""
        path = self.folder / file
        if not os.path.lexists(path):
            return None
        try:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode):
                self.note(file, "a folder, not a file" if stat.S_ISDIR(mode) else "not a plain file")
                return None
            return path.open("rb")
        except OSError as error:
            self.note(file, f"cannot be opened ({error.strerror})")
            return None

    def _parsed(self, file: str, content: bytes, place: str) -> dict[str, Any] | None:
        if not content.strip():
            return None
        if not content.strip(b"\0 \t\r\n"):
            self.note(file, "zeros", place)
            return None
        try:
            row = json.loads(content.decode("utf-8"), object_pairs_hook=no_key_twice)
        except UnicodeDecodeError:
            self.note(file, "not UTF-8", place)
        except json.JSONDecodeError as error:
            half = bool(place) and not content.endswith(b"\n")
            self.note(file, "a half line" if half else f"not JSON ({error.msg})", place)
        except (ValueError, RecursionError) as error:
            self.note(file, f"not JSON ({error})", place)
        else:
            if isinstance(row, dict):
                return row
            self.note(file, f"{'null' if row is None else 'a ' + type(row).__name__}, not an object", place)
        return None
