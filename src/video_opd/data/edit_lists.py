"""Edit lists of MP4 and QuickTime files: which part of a track is shown when (ISO/IEC 14496-12, 8.6.6).

FFmpeg follows an edit list, but not all that one may say: it plays every edit at the usual speed, and fills a
pause between two edits with pictures. A file that asks for these would be shown otherwise than players do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_USUAL_RATE = 1 << 16  # 1.0 as a number of 16.16 bits
_MOST_EDITS = 1 << 16
_TRACK_NUMBER = {0: 12, 1: 20}  # where it stands in the header of a track, by the version
_FORM = {0: struct.Struct(">IiI"), 1: struct.Struct(">QqI")}  # duration, media time, rate, by the version


def top_boxes(path: Path) -> list[bytes]:
    """The names of the boxes at the top level of a file, in order."""
    with path.open("rb") as file:
        return [name for name, _, _ in _boxes(file, 0, path.stat().st_size)]


def edit_list_fault(path: Path, track: int) -> str | None:
    """What FFmpeg does not follow in the edit list of the track with this number; None if it follows it."""
    with path.open("rb") as file:
        for name, begin, end in _boxes(file, 0, path.stat().st_size):
            if name != b"moov":
                continue
            for child, at, stop in _boxes(file, begin, end):
                if child == b"trak" and _track_number(file, at, stop) == track:
                    return _fault(_entries(file, at, stop))
    return None


def _fault(entries: list[tuple[int, int, int]]) -> str | None:
    while entries and entries[0][1] == -1:
        entries = entries[1:]  # the track begins later than others: times count from its first frame
    while entries and entries[-1][1] == -1:
        entries = entries[:-1]
    if any(media_time == -1 for _, media_time, _ in entries):
        return "its edit list pauses between two parts, which FFmpeg does not follow"
    if any(rate != _USUAL_RATE and (rate or len(entries) > 1) for _, _, rate in entries):
        return "its edit list plays a part at another speed, which FFmpeg does not follow"
    return None


def _entries(file: BinaryIO, begin: int, end: int) -> list[tuple[int, int, int]]:
    """(duration, media time, rate) of each edit in the box of a track."""
    for name, at, stop in _boxes(file, begin, end):
        if name == b"edts":
            return _entries(file, at, stop)
        if name == b"elst":
            file.seek(at)
            head = file.read(8)
            form = _FORM.get(head[0]) if len(head) == 8 else None
            if form is None:
                return []
            count = min(int.from_bytes(head[4:], "big"), (stop - at - 8) // form.size, _MOST_EDITS)
            content = file.read(max(0, count) * form.size)
            return list(form.iter_unpack(content[: len(content) // form.size * form.size]))
    return []


def _track_number(file: BinaryIO, begin: int, end: int) -> int | None:
    for name, at, _ in _boxes(file, begin, end):
        if name == b"tkhd":
            file.seek(at)
            head = file.read(24)
            offset = _TRACK_NUMBER.get(head[0]) if len(head) == 24 else None
            return None if offset is None else int.from_bytes(head[offset : offset + 4], "big")
    return None


def _boxes(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of the content, end) of each box between two places of a file."""
    while begin + 8 <= end:
        file.seek(begin)
        header = file.read(16)
        length, head = int.from_bytes(header[:4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(header[8:16], "big"), 16
        if length == 0:
            length = end - begin  # the box goes on to the end
        if length < head:
            return
        yield header[4:8], begin + head, min(begin + length, end)
        begin += length
