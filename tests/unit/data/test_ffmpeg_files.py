"""Files that PyAV alone cannot make: other codecs, and files that were remuxed, trimmed or cut off.

The program ffmpeg makes them from numbered frames. Where it is not installed, the tests are skipped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from video_cases import check_frames as check
from video_cases import native_budget as native
from video_cases import numbered_frame, read_number

from video_opd.data.video import VideoError, load_clip, probe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed"),
]
FPS, COUNT = 25, 60
X264 = "-c:v libx264 -crf 10"


def ffmpeg(arguments: str, *, stdin: bytes | None = None) -> str:
    """Runs the program; a test that needs an encoder which it lacks is skipped."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *arguments.split()]
    if stdin is not None:
        command.remove("-nostdin")
    done = subprocess.run(command, input=stdin, capture_output=True)
    message = done.stderr.decode(errors="replace")
    if "Unknown encoder" in message:
        pytest.skip(message.strip().splitlines()[-1])
    assert done.returncode == 0, message
    return message


def make(
    path: Path, options: str, *, count: int = COUNT, first: int = 0, size: tuple[int, int] = (64, 192)
) -> Path:
    """``count`` numbered frames at 25 fps, encoded as ``options`` say."""
    raw = b"".join(numbered_frame(first + n, *size).tobytes() for n in range(count))
    height, width = size
    source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {FPS} -i pipe:0"
    ffmpeg(f"{source} {options} {path}", stdin=raw)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v.ogv", "-c:v libtheora -q:v 9"),
        ("v.mkv", "-c:v libaom-av1 -cpu-used 8 -crf 20 -lag-in-frames 20"),
        ("v.webm", "-c:v libvpx -b:v 500k -auto-alt-ref 1 -lag-in-frames 20 -arnr-maxframes 5"),
        ("v.mp4", f"{X264} -bf 2 -movflags frag_keyframe+empty_moov"),
        ("v.mp4", f"{X264} -bf 2 -movflags negative_cts_offsets"),
        ("v.mp4", f"{X264} -bf 2 -use_editlist 0"),
        ("v.ts", f"{X264} -bf 2 -output_ts_offset 95442 -muxdelay 0"),  # the clock of 33 bits runs over
        ("v.ts", f"{X264} -bf 2 -mpegts_m2ts_mode 1"),
        ("v.mkv", f"{X264} -bf 2 -vtag H264 -allow_raw_vfw 1"),
        ("v.wtv", "-c:v mpeg2video -q:v 2 -bf 2"),
        ("v.mpg", "-c:v mpeg2video -q:v 31 -bf 2 -flags +ildct+ilme -f svcd"),
        ("v.vob", "-c:v mpeg2video -b:v 3M -bf 2 -flags +ildct+ilme -f dvd"),
        ("v.apng", "-f apng"),
        ("v.y4m", "-pix_fmt yuv420p"),
        ("v.rm", "-c:v rv20 -q:v 2"),
        ("v.swf", "-c:v flv -q:v 2"),
    ],
)
def test_order_picture_time_and_duration(tmp_path: Path, name: str, options: str) -> None:
    size = (96, 192) if name.endswith(".rm") else (64, 192)
    check(make(tmp_path / name, options, size=size), range(COUNT))


def test_divx_packs_two_pictures_into_a_packet(tmp_path: Path) -> None:
    """Its decoder keeps the second picture, over a flush, until another packet is fed."""
    path = make(tmp_path / "v.avi", "-c:v libxvid -q:v 2 -bf 2 -g 15")
    with av.open(str(path)) as container:
        every = [read_number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert every == sorted(set(every)) and len(every) >= COUNT - 2  # the encoder loses the last ones
    for max_frames in (768, 12, 4):
        clip = load_clip(path, native(max_frames))
        assert [read_number(frame) for frame in clip.frames] == [every[k] for k in clip.frame_indices]
        # Two empty chunks stand where the encoder had no picture yet.
        assert clip.times_s * FPS == pytest.approx([every[k] for k in clip.frame_indices], abs=2)


@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.mkv", "v.flv", "v.nut"])
def test_a_file_remuxed_from_an_avi_with_b_frames(tmp_path: Path, name: str) -> None:
    avi = make(tmp_path / "v.avi", f"{X264} -bf 2")
    generate = "" if name in ("v.mp4", "v.mov") else "-fflags +genpts"
    ffmpeg(f"{generate} -i {avi} -c copy {tmp_path / name}")
    check(tmp_path / name, range(COUNT))


def test_an_edit_list_that_begins_inside_a_group_of_pictures(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.mp4", f"{X264} -bf 2 -g 40", count=100)
    ffmpeg(f"-ss 0.8 -i {whole} -c copy {tmp_path / 'v.mp4'}")
    check(tmp_path / "v.mp4", range(20, 100), tolerance_s=2e-3)


def test_an_edit_list_that_begins_later_than_the_sound(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.mp4", f"{X264} -bf 2")
    ffmpeg(f"-f lavfi -i sine=d=4 -itsoffset 1.5 -i {whole} -c:v copy -c:a aac {tmp_path / 'v.mp4'}")
    check(tmp_path / "v.mp4", range(COUNT))


@pytest.mark.parametrize(
    "options", [f"{X264} -bf 2 -g 20", "-c:v libx265 -x265-params log-level=none:keyint=20"]
)
def test_a_recording_that_begins_anywhere(tmp_path: Path, options: str) -> None:
    """Packets are cut away from the beginning of a transport stream, as by a receiver that is switched on."""
    data = make(tmp_path / "whole.ts", options).read_bytes()
    path = tmp_path / "v.ts"
    for share in (0.05, 0.2):
        path.write_bytes(data[round(share * len(data) / 188) * 188 :])
        check(path, range(20, COUNT))


def test_a_stream_that_refreshes_gradually_and_begins_anywhere(tmp_path: Path) -> None:
    options = f"{X264} -x264-params intra-refresh=1:keyint=10:bframes=0"
    data = make(tmp_path / "whole.ts", options).read_bytes()
    path = tmp_path / "v.ts"
    path.write_bytes(data[round(len(data) / 5 / 188) * 188 :])
    first = COUNT - probe(path).frame_count
    assert 5 < first < 35
    check(path, range(first, COUNT))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".ogv", "-c:v libtheora -q:v 9"),
        (".webm", "-c:v libvpx-vp9 -b:v 500k"),
        (".vob", "-c:v mpeg2video -q:v 2 -bf 2 -flags +ildct+ilme"),
        (".mpg", "-c:v libx264 -crf 10 -bf 2 -f mpeg"),
        (".mxf", "-c:v mpeg2video -q:v 2 -bf 2"),
        (".ts", f"{X264} -bf 2 -f lavfi -i sine=d=2.4 -map 0:v -map 1:a -c:a aac"),
    ],
)
def test_joined_files_are_whole_or_refused(tmp_path: Path, suffix: str, options: str) -> None:
    if "lavfi" in options:
        options = "-f lavfi -i sine=d=2.4 -map 0:v -map 1:a -c:a aac " + f"{X264} -bf 2"
    a = make(tmp_path / f"a{suffix}", options)
    b = make(tmp_path / f"b{suffix}", options, first=COUNT)
    path = tmp_path / f"v{suffix}"
    path.write_bytes(a.read_bytes() + b.read_bytes())
    try:
        load_clip(path, native())
    except VideoError as error:
        reasons = {".mpg": "no times that could be used", ".mxf": "the same time|cannot be opened"}
        assert re.search(reasons[suffix], error.reason)
    else:
        check(path, range(2 * COUNT))


def test_two_rates_one_after_the_other(tmp_path: Path) -> None:
    a = make(tmp_path / "a.ts", f"{X264} -bf 2")
    raw = b"".join(numbered_frame(COUNT + n, 64, 192).tobytes() for n in range(COUNT))
    b = tmp_path / "b.ts"
    ffmpeg(f"-f rawvideo -pix_fmt rgb24 -s 192x64 -r 10 -i pipe:0 {X264} -bf 2 {b}", stdin=raw)
    path = tmp_path / "v.ts"
    path.write_bytes(a.read_bytes() + b.read_bytes())
    info = probe(path)
    begins_s = COUNT / FPS
    expected = np.concatenate([np.arange(COUNT) / FPS, begins_s + np.arange(COUNT) / 10])
    assert info.times_s == pytest.approx(expected, abs=1e-3) and info.variable_rate


@pytest.mark.parametrize("options", ["-c:v libaom-av1 -cpu-used 8 -f obu", "-c:v mjpeg -f mjpeg"])
def test_raw_streams_without_a_rate_are_refused(tmp_path: Path, options: str) -> None:
    with pytest.raises(VideoError, match="does not state its frame rate"):
        probe(make(tmp_path / "v.raw", options, count=10))
