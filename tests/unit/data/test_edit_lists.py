"""Edit lists that FFmpeg follows, and those that it would show otherwise than players do."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from video_cases import check_frames as check
from video_cases import write_video

from video_opd.data.demux import VideoError
from video_opd.data.edit_lists import edit_list_fault, top_boxes
from video_opd.data.index import read_index

FPS, COUNT = 25, 60
Edit = tuple[int, int, float]  # frames, the first of them in the track (−1: a pause), speed
USUAL = 1.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"bf": "2", "g": "20", "b_strategy": "0"}
    return write_video(
        tmp_path_factory.mktemp("film") / "v.mp4", COUNT, fps=FPS, codec="libx264", codec_options=options
    )


def edited(whole: Path, out: Path, edits: list[Edit], version: int = 1) -> Path:
    """A copy with another edit list. The index lies behind the pictures, so these stay in place."""
    content = bytearray(whole.read_bytes())
    assert content.find(b"mdat") < content.find(b"moov")
    movie_scale, track_scale = (number(content, box, 12) for box in (b"mvhd", b"mdhd"))
    at = content.find(b"elst") - 4
    old = int.from_bytes(content[at : at + 4], "big")
    first = struct.unpack(">i", content[at + 20 : at + 24])[0]  # the media time of the first frame
    form = {0: ">IiI", 1: ">QqI"}[version]
    body = struct.pack(">B3xI", version, len(edits))
    for frames, begin, speed in edits:
        media_time = -1 if begin < 0 else first + begin * track_scale // FPS
        body += struct.pack(form, frames * movie_scale // FPS, media_time, round(speed * (1 << 16)))
    content[at : at + old] = struct.pack(">I", 8 + len(body)) + b"elst" + body
    for box in (b"moov", b"trak", b"edts"):
        place = content.find(box) - 4
        length = int.from_bytes(content[place : place + 4], "big") + 8 + len(body) - old
        content[place : place + 4] = length.to_bytes(4, "big")
    out.write_bytes(content)
    return out


def number(content: bytearray, box: bytes, offset: int) -> int:
    at = content.find(box) + 4 + offset
    return int.from_bytes(content[at : at + 4], "big")


@pytest.mark.parametrize("version", [0, 1])
def test_an_edit_list_is_read(whole: Path, tmp_path: Path, version: int) -> None:
    path = edited(whole, tmp_path / "v.mp4", [(25, -1, USUAL), (20, 0, USUAL), (10, 40, USUAL)], version)
    assert edit_list_fault(path, 1) is None and top_boxes(path).count(b"moov") == 1
    edited(whole, path, [(20, 0, USUAL), (10, 40, 2.0)], version)
    assert "another speed" in str(edit_list_fault(path, 1)) and edit_list_fault(path, 2) is None


@pytest.mark.parametrize(
    ("edits", "numbers"),
    [
        ([(25, -1, USUAL), (60, 0, USUAL)], [*range(60)]),  # the track begins later
        ([(20, 40, USUAL)], [*range(40, 60)]),
        ([(20, 0, USUAL), (20, 40, USUAL)], [*range(20), *range(40, 60)]),
        ([(20, 40, USUAL), (20, 0, USUAL)], [*range(40, 60), *range(20)]),
        ([(200, 0, USUAL)], [*range(60)]),  # longer than the track
        ([(60, 0, 0.0)], [*range(60)]),  # some writers leave the speed out
    ],
)
def test_parts_are_shown_in_the_order_of_the_list(
    whole: Path, tmp_path: Path, edits: list[Edit], numbers: list[int]
) -> None:
    check(edited(whole, tmp_path / "v.mp4", edits), numbers)


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([(20, 0, USUAL), (25, -1, USUAL), (20, 20, USUAL)], "pauses between two parts"),
        ([(30, 0, 2.0)], "plays a part at another speed"),
        ([(60, 0, 0.5)], "plays a part at another speed"),
        ([(20, 0, USUAL), (20, 20, 0.0), (20, 20, USUAL)], "plays a part at another speed"),  # a still
    ],
)
def test_what_would_be_shown_otherwise_is_refused(
    whole: Path, tmp_path: Path, edits: list[Edit], reason: str
) -> None:
    with pytest.raises(VideoError, match=reason):
        read_index(edited(whole, tmp_path / "v.mp4", edits))


def test_a_damaged_edit_list_is_none(whole: Path, tmp_path: Path) -> None:
    content = bytearray(edited(whole, tmp_path / "v.mp4", [(60, 0, 2.0)]).read_bytes())
    at = content.find(b"elst") + 4
    for version, count in ((7, 1), (1, 0), (1, 1 << 30)):
        content[at], content[at + 4 : at + 8] = version, count.to_bytes(4, "big")
        (tmp_path / "damaged.mp4").write_bytes(content)
        assert (edit_list_fault(tmp_path / "damaged.mp4", 1) is None) == (count != 1 << 30)
    for end in range(content.find(b"moov"), len(content), 97):
        (tmp_path / "damaged.mp4").write_bytes(content[:end])
        edit_list_fault(tmp_path / "damaged.mp4", 1)
