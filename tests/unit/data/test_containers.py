"""Containers × codecs × the ways in which frames can be out of order, untimed, hidden, mirrored or cut off.

Each frame carries its number, so a test knows which picture belongs to which time without another decoder.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_cases import check_frames as check
from video_cases import decode_all, read_number, write_sizes, write_video, write_with_picture
from video_cases import native_budget as native

from video_opd.data import decode
from video_opd.data.index import read_index
from video_opd.data.orientation import Orientation
from video_opd.data.video import VideoError, load_clip, load_windows, probe
from video_opd.grounding.cut import cut_clip

FPS = 25
COUNT = 60
X264 = "libx264"
B2 = {"bf": "2", "g": "20", "b_strategy": "0"}
OPEN = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=8:min-keyint=8:scenecut=0"}
# Low bit rates make small frames, many of which share a packet of a program stream.
MPEG2, INTERLACED = {"bf": "2", "g": "12"}, {"bf": "2", "g": "12", "flags": "+ildct+ilme"}


def write(path: Path, codec: str, options: dict[str, str] | None = None, **more: Any) -> Path:
    """A numbered video of two seconds; skips the test where this PyAV lacks the encoder."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    count = len(more["ticks"]) if "ticks" in more else more.pop("count", COUNT)
    return write_video(path, count, codec=codec, codec_options=options, **{"fps": FPS, **more})


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", X264, B2),
        (".mov", X264, OPEN),
        (".mkv", X264, OPEN),
        (".ts", X264, B2),
        (".flv", X264, B2),
        (".avi", X264, B2),
        (".avi", X264, {"bf": "0"}),
        (".h264", X264, B2),
        (".nut", X264, B2),
        (".mpg", X264, B2),
        (".mov", "mpeg4", {"bf": "2"}),
        (".avi", "mpeg4", {"bf": "2"}),
        (".asf", "mpeg4", {"bf": "2"}),
        (".ts", "mpeg2video", MPEG2),
        (".mpg", "mpeg2video", MPEG2),
        (".mpg", "mpeg2video", INTERLACED),
        (".mpg", "mpeg1video", MPEG2),
        (".m2v", "mpeg2video", INTERLACED),
        (".mxf", "mpeg2video", MPEG2),
        (".webm", "libvpx", {"g": "9"}),
        (".avi", "mjpeg", {}),
        (".wmv", "wmv2", {}),
        (".mov", "prores_ks", {}),
        (".mov", "qtrle", {}),
        (".mkv", "ffv1", {}),
        (".gif", "gif", {}),
    ],
)
def test_order_picture_time_and_duration(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    check(write(tmp_path / f"v{suffix}", codec, options), range(COUNT))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        *((suffix, X264, options) for suffix in (".mp4", ".mkv", ".ts", ".flv", ".avi", ".h264")
          for options in (B2, OPEN)),
        *((suffix, X264, {"x264-params": "bframes=4:b-pyramid=normal:b-adapt=0:keyint=30"})
          for suffix in (".mp4", ".mov", ".mkv", ".ts", ".flv", ".avi", ".h264", ".mpg")),
        *((suffix, X264, {"bf": "2", "flags": "+ildct+ilme"}) for suffix in (".ts", ".mkv", ".h264", ".avi")),
        *((suffix, "libx265", {"x265-params": f"log-level=none:bframes=3:keyint=20:open-gop={gop}"})
          for suffix in (".mp4", ".mkv", ".ts", ".hevc") for gop in (0, 1)),
        *((suffix, "libvpx-vp9", {"g": "20", "lag-in-frames": "20", "auto-alt-ref": "1", "b": "300k"})
          for suffix in (".webm", ".mp4", ".ivf")),
        *((suffix, "libsvtav1", {"g": "20", "preset": "12"}) for suffix in (".mp4", ".mkv", ".ivf")),
        *((suffix, "mpeg4", {"bf": "2", "g": "15"}) for suffix in (".mp4", ".3gp", ".mkv", ".nut", ".m4v")),
        *((suffix, "mpeg2video", MPEG2) for suffix in (".mkv", ".mp4", ".avi", ".vob", ".m2v", ".wtv")),
        (".mov", "dnxhd", {"profile": "dnxhr_lb"}),
        (".flv", "flv", {}),
        (".avi", "msmpeg4", {}),
        (".avi", "huffyuv", {}),
        (".avi", "libvpx", {}),
        (".mov", "mjpeg", {}),
    ],
)  # fmt: skip
def test_more_of_order_picture_time_and_duration(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    size = (256, 384) if codec == "dnxhd" else (64, 192)
    check(write(tmp_path / f"v{suffix}", codec, options, size=size), range(COUNT))


@pytest.mark.parametrize(
    ("suffix", "fps"), [(".h264", 50), (".h264", 30000 / 1001), (".m2v", 50), (".m2v", 24000 / 1001)]
)
def test_a_raw_stream_has_the_rate_of_its_headers(tmp_path: Path, suffix: str, fps: float) -> None:
    """FFmpeg's demuxers of raw streams claim 25 fps."""
    codec = X264 if suffix == ".h264" else "mpeg2video"
    check(write(tmp_path / f"v{suffix}", codec, {"bf": "2"}, fps=fps), range(COUNT), fps=fps)


def test_frames_of_the_same_time_are_refused(tmp_path: Path) -> None:
    """One such frame is left out; where every second one is, half of the video would be lost."""

    def repeat(place: int, packet: av.Packet) -> av.Packet:
        packet.pts, packet.dts = place // 2 * 2, place - 1
        return packet

    with pytest.raises(VideoError, match="many of its frames carry the same time"):
        probe(write(tmp_path / "v.mp4", X264, {"bf": "0"}, change=repeat))


def test_times_of_years_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mkv", X264, ticks=[0, 1, 25 * 86400 * 40])
    with pytest.raises(VideoError, match="its times span 40 days"):
        probe(path)


def test_a_raw_stream_without_a_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="does not state its frame rate; put it into a container"):
        probe(write(tmp_path / "v.mjpeg", "mjpeg"))


@pytest.mark.parametrize(
    ("suffix", "codec", "size"), [(".h264", X264, (64, 192)), (".h263", "h263", (96, 128))]
)
def test_the_clock_of_a_raw_stream_is_no_rate(
    tmp_path: Path, suffix: str, codec: str, size: tuple[int, int]
) -> None:
    """An encoder of a variable rate writes its time base; H.263 numbers pictures by ticks of 29.97 Hz."""
    times: dict[str, Any] = {} if codec == "h263" else {"times_s": np.arange(20) / FPS}
    with pytest.raises(VideoError, match="does not state its frame rate"):
        probe(write(tmp_path / f"v{suffix}", codec, count=20, size=size, **times))


def test_the_last_frame_of_an_avi_lasts_as_long_as_the_others(tmp_path: Path) -> None:
    """An AVI of 50 ticks a second whose frames come at every second tick."""
    path = write(tmp_path / "v.avi", X264, B2, fps=50, ticks=range(0, 2 * COUNT, 2))
    assert probe(path).duration_s == pytest.approx(COUNT / FPS, abs=1e-3)


GAP = [*range(20), *range(45, 85)]  # a second is missing


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", X264, B2),
        (".mkv", X264, B2),
        (".ts", X264, B2),
        (".flv", X264, B2),
        (".avi", X264, B2),
        (".avi", X264, {"bf": "0"}),
        (".avi", "mpeg4", {"bf": "2"}),
        (".avi", "mpeg4", {}),
        (".avi", "mjpeg", {}),
        (".wmv", "wmv2", {}),
        (".webm", "libvpx", {}),
    ],
)
def test_a_gap_between_frames_stays_where_it_is(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    check(write(tmp_path / f"v{suffix}", codec, options, ticks=GAP), range(len(GAP)), GAP)


def test_a_gap_that_cannot_be_placed_is_refused(tmp_path: Path) -> None:
    """A program stream times one in nine of these small frames: a gap lies anywhere between two of them."""
    path = write(tmp_path / "v.mpg", "mpeg2video", MPEG2 | {"qmin": "31"}, ticks=GAP)
    with pytest.raises(VideoError, match="a gap between frames that are not timed one by one"):
        probe(path)


@pytest.mark.parametrize("b_frames", [0, 3])
@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv"])
def test_intra_refresh(tmp_path: Path, suffix: str, b_frames: int) -> None:
    """Its keyframes are P-frames from which on a decoder recovers, many frames later."""
    options = {"x264-params": f"intra-refresh=1:keyint=15:bframes={b_frames}"}
    check(write(tmp_path / f"v{suffix}", X264, options), range(COUNT))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The passes over a file that decoding takes: how many groups earlier than marked each begins."""
    leads: list[int] = []
    plain = decode._decode_pass

    def counted(*arguments: Any) -> Any:
        leads.append(arguments[3])
        return plain(*arguments)

    monkeypatch.setattr(decode, "_decode_pass", counted)
    return leads


def test_frames_that_do_not_come_cost_a_few_searches_and_not_one_each(
    tmp_path: Path, passes: list[int]
) -> None:
    path = write(tmp_path / "v.mp4", X264, {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}, count=400)
    clip = load_clip(path, native(16))
    assert [read_number(frame) for frame in clip.frames] == clip.frame_indices.tolist()
    assert passes == sorted(passes) and len(passes) <= 4


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mkv", "mpeg4", {"g": "600", "sc_threshold": "1000000000"}),
        (".mkv", "msmpeg4", {"g": "600", "sc_threshold": "1000000000"}),
        (".avi", "wmv2", {"g": "600", "sc_threshold": "1000000000"}),
        (".mov", "qtrle", {"g": "600"}),
        (".mkv", "mpeg2video", {"g": "600", "bf": "2", "sc_threshold": "1000000000"}),
        (".mp4", X264, {"g": "600", "bf": "2"}),
        (".mkv", "libx265", {"x265-params": "log-level=none:keyint=600:bframes=2"}),
        (".webm", "libvpx-vp9", {"g": "600"}),
    ],
)
def test_a_keyframe_only_in_name_is_not_begun_with(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    """Every fifth packet is marked as a keyframe. Decoders then show grey pictures, some without an error."""

    def mark(place: int, packet: av.Packet) -> av.Packet:
        packet.is_keyframe = place % 5 == 0
        return packet

    path = write(tmp_path / f"v{suffix}", codec, options, change=mark)
    check(path, range(COUNT))
    every, _ = decode_all(path)
    clip = load_clip(path, native(6))
    assert np.array_equal(clip.frames, every[clip.frame_indices])  # all pixels, not the numbers alone


def test_an_open_group_is_decoded_in_one_pass(tmp_path: Path, passes: list[int]) -> None:
    path = write(tmp_path / "v.mkv", X264, OPEN)
    found = [number for number, _ in decode.decode_frames(path, read_index(path), np.array([6, 7, 14, 15]))]
    assert found == [6, 7, 14, 15] and passes == [0]


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".flv", ".mp4"])
@pytest.mark.parametrize("options", [B2, OPEN | {"g": "20"}])
def test_a_recording_that_begins_inside_a_group_of_pictures(
    tmp_path: Path, suffix: str, options: dict[str, str]
) -> None:
    def drop(place: int, packet: av.Packet) -> av.Packet | None:
        return packet if place >= 3 else None

    path = write(tmp_path / f"v{suffix}", X264, options, change=drop)
    first = 20 if options is B2 else 8
    check(path, range(first, COUNT))


@pytest.mark.parametrize("window_s", [None, 0.5])
def test_packets_that_never_give_a_picture_are_no_frames(tmp_path: Path, window_s: float | None) -> None:
    """VP8 has frames that are only referred to: here, bit 4 of the first byte is cleared (RFC 6386)."""
    hidden = []

    def hide(place: int, packet: av.Packet) -> av.Packet:
        data = bytearray(bytes(packet))
        if place % 4 == 3 and data[0] & 1:  # 1: not a keyframe
            hidden.append(place)
            data[0] &= ~0x10
        changed = av.Packet(bytes(data))
        changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
        changed.stream, changed.is_keyframe = packet.stream, packet.is_keyframe
        return changed

    path = write(tmp_path / "v.webm", "libvpx", {"g": "30", "lag-in-frames": "0"}, change=hide)
    assert len(hidden) > 10
    kept = [number for number in range(COUNT) if number not in hidden]
    for window in load_windows(path, native(), window_s):
        assert [read_number(frame) for frame in window.clip.frames] == np.round(
            (window.start_s + window.clip.times_s) * FPS
        ).tolist()
    if window_s is None:
        cut_clip(path, (0.0, 1.0), tmp_path / "clip.mp4")
        assert [read_number(frame) for frame in decode_all(tmp_path / "clip.mp4")[0]] == kept[
            : kept.index(25)
        ]
        assert read_index(path, decode=True).frame_times_s_T * FPS == pytest.approx(kept, abs=0.05)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".flv"])
def test_decoding_times_in_the_place_of_presentation_times(tmp_path: Path, suffix: str) -> None:
    """Remuxing an AVI with B-frames makes such a file: decoding order is written as display order."""

    def untimed(place: int, packet: av.Packet) -> av.Packet:
        packet.pts = packet.dts = place
        return packet

    check(write(tmp_path / f"v{suffix}", X264, B2, change=untimed), range(COUNT))


def joined(
    folder: Path, suffix: str, codec: str, options: dict[str, str], strip: int = 0, **second: Any
) -> Path:
    """Two files of 60 and 60 frames, numbered on, as ``cat`` joins them."""
    a = write(folder / f"a{suffix}", codec, options)
    b = write(folder / f"b{suffix}", codec, options, first_number=COUNT, **second)
    path = folder / f"joined{suffix}"
    path.write_bytes(a.read_bytes() + b.read_bytes()[strip:])
    return path


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "strip"),
    [
        (".ts", X264, B2, 0),
        (".ts", "mpeg2video", MPEG2, 0),
        (".flv", X264, B2, 13),  # without the second header
        (".webm", "libvpx", {"g": "20"}, 0),
        (".mkv", X264, B2, 0),
        (".mpg", "mpeg2video", MPEG2, 0),
        (".avi", "mpeg4", {"bf": "2"}, 0),
        (".h264", X264, B2, 0),
    ],
)
def test_a_clock_that_starts_again_goes_on(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], strip: int
) -> None:
    check(joined(tmp_path, suffix, codec, options, strip), range(2 * COUNT))


@pytest.mark.parametrize(("frames", "begins"), [(5, 0), (60, 0), (60, 30), (60, 100_000)])
def test_a_clock_that_starts_anywhere_goes_on(tmp_path: Path, frames: int, begins: int) -> None:
    """After few frames, before the end of what was shown, or hours later."""
    a = write(tmp_path / "a.ts", X264, B2, count=frames)
    b = write(tmp_path / "b.ts", X264, B2, ticks=range(begins, begins + COUNT), first_number=frames)
    path = tmp_path / "v.ts"
    path.write_bytes(a.read_bytes() + b.read_bytes())
    check(path, range(frames + COUNT))


def test_a_restart_inside_a_group_of_pictures(tmp_path: Path) -> None:
    """Frames before the first keyframe after the restart refer to pictures that are not there."""

    def drop(place: int, packet: av.Packet) -> av.Packet | None:
        return packet if place >= 3 else None

    check(joined(tmp_path, ".ts", X264, B2, change=drop), [*range(COUNT), *range(COUNT + 20, 2 * COUNT)])


def test_a_restart_with_other_headers(tmp_path: Path, passes: list[int]) -> None:
    """FLV keeps the decoder's headers apart from the frames: they are needed, whichever frames are chosen."""
    path = joined(tmp_path, ".flv", X264, B2, 13, size=(96, 288))
    for max_frames in (12, 2):
        clip = load_clip(path, native(max_frames))
        assert [read_number(frame) for frame in clip.frames] == clip.frame_indices.tolist()
    assert passes == [0, 0]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", X264), (".mov", X264), (".3gp", "mpeg4"), (".flv", X264), (".wmv", "wmv2")],
)
def test_joined_files_of_which_half_cannot_be_read_are_refused(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    with pytest.raises(VideoError, match="joined byte by byte, of which only the first can be read"):
        probe(joined(tmp_path, suffix, codec, {}))


@pytest.mark.parametrize(("suffix", "codec"), [(".nut", X264), (".mxf", "mpeg2video"), (".ivf", "libvpx")])
def test_other_joined_files_are_whole_or_refused(tmp_path: Path, suffix: str, codec: str) -> None:
    path = joined(tmp_path, suffix, codec, {"g": "20"})
    try:
        load_clip(path, native())
    except VideoError:
        return
    check(path, range(2 * COUNT))


MATRICES = [
    (1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
    (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0),
]  # fmt: skip


def as_iso_says(stored: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """ISO/IEC 14496-12: the stored point (x, y) is shown at (x, y) · [[a, b], [c, d]]."""
    a, b, c, d = matrix
    y, x = np.mgrid[0 : stored.shape[0], 0 : stored.shape[1]]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    shown = np.empty((shown_y.max() + 1, shown_x.max() + 1, 3), dtype=stored.dtype)
    shown[shown_y, shown_x] = stored
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
def test_turned_and_mirrored_pictures_are_shown_and_cut_as_the_format_says(
    tmp_path: Path, matrix: tuple[int, int, int, int]
) -> None:
    path = write_video(tmp_path / "v.mp4", 8, matrix=matrix, codec_options={"crf": "4"})
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    expected = as_iso_says(stored, matrix)
    clip = load_clip(path, native())
    assert clip.source_size_px == expected.shape[:2]
    assert np.array_equal(clip.frames[0], expected)
    cut_clip(path, (0.0, 0.5), tmp_path / "clip.mp4")
    again = load_clip(tmp_path / "clip.mp4", native()).frames[0]
    assert again.shape == expected.shape and np.abs(again.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("matrix", MATRICES)
def test_an_orientation_and_its_matrix(matrix: tuple[int, int, int, int]) -> None:
    picture = np.arange(3 * 5 * 3).reshape(3, 5, 3)
    found = [
        orientation
        for t, x, y in itertools.product((False, True), repeat=3)
        for orientation in [Orientation(transpose=t, flip_x=x, flip_y=y)]
        if np.array_equal(orientation.apply(picture), as_iso_says(picture, matrix))
    ]
    (orientation,) = found
    a, b, _, c, d, _, _, _, _ = orientation.matrix(3, 5)
    assert tuple(value >> 16 for value in (a, b, c, d)) == matrix
    determinant = matrix[0] * matrix[3] - matrix[1] * matrix[2]
    assert orientation.mirrored == (determinant < 0)
    assert orientation.size_px(3, 5) == as_iso_says(picture, matrix).shape[:2]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
@pytest.mark.parametrize("default", [0, 1, 2])
def test_the_default_stream_is_shown(tmp_path: Path, suffix: str, default: int) -> None:
    path = write_video(tmp_path / f"v{suffix}", 20, fps=FPS, streams=3, default=default)
    check(path, range(1000 * default, 1000 * default + 20))
    cut_clip(path, (0.2, 0.6), tmp_path / "clip.mp4")
    check(tmp_path / "clip.mp4", range(1000 * default + 5, 1000 * default + 15))


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".avi"])
def test_without_a_default_the_largest_stream_is_shown(tmp_path: Path, suffix: str) -> None:
    path = write_sizes(tmp_path / f"v{suffix}", 20, (32, 96, 64))
    assert probe(path).size_px == (96, 288)
    check(path, range(96, 116))


@pytest.mark.parametrize("place", [0, 1])
def test_a_single_picture_beside_a_video_is_not_shown(tmp_path: Path, place: int) -> None:
    check(write_with_picture(tmp_path / "v.mp4", 20, place=place), range(20))


def test_colours_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mp4", X264, {"x264-params": "colormatrix=YCgCo"})
    with pytest.raises(VideoError, match="its colours cannot be converted"):
        load_clip(path, native())


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [(".avi", X264, B2), (".mpg", "mpeg2video", INTERLACED), (".h264", X264, B2), (".mkv", X264, OPEN)],
)
def test_a_clip_is_cut_from_files_without_times(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    path = write(tmp_path / f"v{suffix}", codec, options)
    assert cut_clip(path, (0.4, 1.6), tmp_path / "clip.mp4") == pytest.approx((0.4, 1.6), abs=1e-3)
    check(tmp_path / "clip.mp4", range(10, 40))


def test_a_clip_is_cut_across_a_restart(tmp_path: Path) -> None:
    path = joined(tmp_path, ".ts", X264, B2)
    cut_clip(path, (2.0, 2.8), tmp_path / "clip.mp4")
    check(tmp_path / "clip.mp4", range(50, 70))
