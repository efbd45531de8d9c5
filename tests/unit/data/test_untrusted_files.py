"""Files that reach for other files, for endless bytes, or for more memory than a picture needs."""

from __future__ import annotations

import resource
import struct
import zlib
from pathlib import Path

import pytest
from video_cases import write_video

from video_opd.data import containers
from video_opd.data.video import VideoError, probe

PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="0" '
    'bandwidth="1"><BaseURL>neighbour.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>'
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="neighbour.png"/></svg>'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "neighbour.mp4", 10)
    write_video(tmp_path / "neighbour.ts", 10)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.m3u8", PLAYLIST.format("v.m3u8")),  # it names itself
        ("v.m3u8", PLAYLIST.format("neighbour.ts")),
        ("v.mp4", PLAYLIST.format("neighbour.ts")),
        ("v.mp4", "ffconcat version 1.0\nfile neighbour.mp4\n"),
        ("v.ffconcat", "ffconcat version 1.0\nfile v.ffconcat\n"),
        ("v.mpd", DASH),
        ("v.sdp", SDP),
        ("v.mp4", SDP),
        ("v.svg", SVG),
        ("v.webm", "[playlist]\nFile1=neighbour.mp4\n"),
        ("%02d.png", "a pattern of names"),
        ("v.txt", "plain words " * 500),  # FFmpeg draws such a file on a terminal
        ("v.nfo", "plain words " * 500),
    ],
)
def test_a_text_file_is_no_video(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(VideoError, match=r"not a video in a container|cannot be opened as a video"):
        probe(folder / name)


def test_a_picture_is_no_video(tmp_path: Path) -> None:
    from PIL import Image

    for suffix in ("png", "jpg", "bmp", "webp", "tiff"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"v.{suffix}")
        (tmp_path / f"v.{suffix}").rename(tmp_path / f"{suffix}.mp4")
        with pytest.raises(VideoError, match=r"not a video in a container|cannot be opened as a video"):
            probe(tmp_path / f"{suffix}.mp4")


def test_a_listed_format_opens_no_second_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a format that names files come onto the list one day, its files stay closed."""
    monkeypatch.setattr(containers, "FORMATS", (*containers.FORMATS, "concat", "hls"))
    (folder / "v.mp4").write_text("ffconcat version 1.0\nfile neighbour.mp4\n")
    (folder / "v.m3u8").write_text(PLAYLIST.format("neighbour.ts"))
    for name in ("v.mp4", "v.m3u8"):
        with pytest.raises(VideoError):
            probe(folder / name)
    assert probe(folder / "neighbour.ts").frame_count == 10


@pytest.mark.parametrize(
    "suffix", ["h264", "hevc", "m4v", "mjpeg", "gif", "nut", "dv", "mp4", "mkv", "ts", "y4m"]
)
def test_endless_zeros_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """FFmpeg's parsers would keep 10 GB of them and wait for the end of a picture."""
    monkeypatch.setattr(containers, "MAX_GAP_BYTES", 1 << 23)
    path = tmp_path / f"v.{suffix}"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError):
        probe(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 300_000


def test_zeros_after_the_first_pictures_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_GAP_BYTES", 1 << 23)
    path = write_video(tmp_path / "v.h264", 20)
    with path.open("r+b") as file:
        file.truncate(10 << 30)
    with pytest.raises(VideoError, match="8 MiB of it hold no picture"):
        probe(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_gif() -> bytes:
    head = b"GIF89a\xff\xff\xff\xff\x80\0\0\0\0\0\xff\xff\xff"
    return head + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"


def huge_apng() -> bytes:
    size = struct.pack(">II", 65535, 65535)
    frame = struct.pack(">I", 0) + size + struct.pack(">IIHHBB", 0, 0, 1, 1, 0, 0)
    picture = chunk(b"IDAT", zlib.compress(bytes(1000)))
    head = chunk(b"IHDR", size + b"\x08\x02\0\0\0") + chunk(b"acTL", struct.pack(">II", 1, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"fcTL", frame) + picture + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("gif", huge_gif()),
        ("apng", huge_apng()),
        ("y4m", b"YUV4MPEG2 W65535 H65535 F25:1\nFRAME\n" + bytes(1000)),
        ("y4m", b"YUV4MPEG2 W16384 H16384 F25:1\nFRAME\n" + bytes(1000)),
    ],
)
def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(content)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(VideoError):
        probe(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 100_000


def test_the_size_that_a_container_claims_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", 4)
    assert probe(path).size_px == (64, 192)
    monkeypatch.setattr("video_opd.data.demux.MAX_FRAME_PX", 64 * 192 - 1)
    with pytest.raises(VideoError, match="frames of 192 × 64 pixels"):
        probe(path)


def test_a_decoder_refuses_a_picture_that_is_larger_than_the_container_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "v.mp4", 4)
    content = path.read_bytes()
    at = content.index(b"avc1", content.index(b"stsd")) + 28
    assert content[at : at + 4] == struct.pack(">HH", 192, 64)
    path.write_bytes(content[:at] + struct.pack(">HH", 16, 16) + content[at + 4 :])
    monkeypatch.setattr("video_opd.data.demux.MAX_FRAME_PX", 64 * 192 - 1)
    with pytest.raises(VideoError):
        probe(path)
