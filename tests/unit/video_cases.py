"""Small videos for tests, whose frames carry their own number."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from video_opd.config import VideoConfig
from video_opd.data.video import load_clip, probe

BITS = 12  # of the number, as black and white columns over the upper half of a frame
CLOCK = 90_000  # time base: fine enough for any rate


@functools.lru_cache(maxsize=512)
def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3], read-only: the number in columns above, a picture with texture below."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 255 // width, y * 255 // height, (x + y + 7 * number) % 256], axis=-1)
    bits = (number >> (np.arange(width) * BITS // width)) & 1
    picture[: height // 2] = bits[None, :, None] * 255
    made = picture.astype(np.uint8)
    made.flags.writeable = False
    return made


def read_number(frame: np.ndarray) -> int:
    """The number of a frame, whatever its size."""
    height, width = frame.shape[:2]
    centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    levels = frame[height // 4, centres].mean(axis=-1)
    return int(((levels > 127).astype(int) << np.arange(BITS)).sum())


def numbers_and_times(path: Path) -> tuple[list[int], list[float]]:
    """The number that every frame of a file carries, and its time in seconds."""
    with av.open(str(path)) as container:
        found = [
            (read_number(f.to_ndarray(format="rgb24")), float(f.time)) for f in container.decode(video=0)
        ]
    return [number for number, _ in found], [time_s for _, time_s in found]


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame [T, H, W, 3] and its time [T], the plain way."""
    with av.open(str(path)) as container:
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    times_s = np.array([t for t, _ in frames])
    return np.stack([f for _, f in frames]), times_s - times_s[0]


def write_video(
    path: Path,
    count: int,
    *,
    fps: float = 10.0,
    size: tuple[int, int] = (64, 192),
    times_s: Sequence[float] | np.ndarray | None = None,
    ticks: Sequence[int] | None = None,
    codec: str = "libx264",
    rotation: int = 0,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    first_number: int = 0,
    matrix: tuple[int, int, int, int] | None = None,
    streams: int = 1,
    default: int | None = None,
    pixel_aspect: Fraction | None = None,
    change: Callable[[int, av.Packet], av.Packet | None] | None = None,
) -> Path:
    """Writes ``count`` numbered frames at a constant rate, at ``times_s``, or at ``ticks`` of 1 / ``fps``.

    Numbers begin at ``first_number``, in each further stream 1000 higher. ``matrix`` (a, b, c, d) is a
    display matrix that shows the stored point (x, y) at (ax + cy, bx + dy). ``default`` is the stream that is
    marked so. ``change`` may replace each packet, by its place in the file, or leave it out.
    """
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=container_options or {}) as container:
        written: list[av.VideoStream] = []
        for number in range(streams):
            stream = container.add_stream(codec, rate=rate, options=codec_options or {})
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width = size
            stream.pix_fmt = pixel_format(codec)
            if pixel_aspect is not None:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
            if times_s is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK)
            if rotation:
                stream.set_display_rotation(rotation)
            if matrix is not None:
                stream.set_display_matrix(display_matrix(matrix, *size))
            if default is not None:
                marks = av.stream.Disposition
                stream.disposition = marks.default if number == default else marks(0)
            written.append(stream)
        places = itertools.count()

        def mux(packets: list[av.Packet]) -> None:
            for packet in packets:
                changed = packet if change is None else change(next(places), packet)
                if changed is not None:
                    container.mux(changed)

        for number in range(count):
            for place, stream in enumerate(written):
                picture = numbered_frame(first_number + number + 1000 * place, *size)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if times_s is not None:
                    frame.pts, frame.time_base = round(times_s[number] * CLOCK), Fraction(1, CLOCK)
                elif ticks is not None:
                    frame.pts, frame.time_base = ticks[number], 1 / rate
                mux(stream.encode(frame))
        for stream in written:
            mux(stream.encode(None))
    return path


def native_budget(max_frames: int = 768) -> VideoConfig:
    """As many frames as the video has, at most ``max_frames``; they are not resized."""
    return VideoConfig(fps=1000.0, min_frames=2, max_frames=max_frames, min_frame_tokens=1)


def check_frames(
    path: Path,
    numbers: Sequence[int],
    ticks: Sequence[int] | None = None,
    *,
    fps: float = 25,
    tolerance_s: float = 1.1e-3,
) -> None:
    """Frame k shows number ``numbers[k]``, ``ticks[k] / fps`` seconds after the first."""
    times_s = np.array(range(len(numbers)) if ticks is None else ticks) / fps
    times_s -= times_s[0]
    info = probe(path)
    assert info.frame_count == len(numbers)
    assert_near(info.times_s, times_s, tolerance_s)
    assert info.duration_s == pytest.approx(times_s[-1] + 1 / fps, abs=tolerance_s)
    for max_frames in (768, 12, 4):
        clip = load_clip(path, native_budget(max_frames))
        assert [read_number(frame) for frame in clip.frames] == [numbers[k] for k in clip.frame_indices]
        assert_near(clip.times_s, times_s[clip.frame_indices], tolerance_s)


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """As ``pytest.approx`` with ``abs``, which compares the numbers of an array one at a time in Python."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=False)


def write_with_picture(path: Path, count: int, *, place: int, fps: int = 25) -> Path:
    """A video of ``count`` frames, and a larger stream of one picture at this place. Both are default."""
    with av.open(str(path), "w") as container:
        streams = []
        for number in range(2):
            stream = container.add_stream("libx264", rate=fps)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width = (128, 384) if number == place else (64, 192)
            stream.pix_fmt, stream.disposition = "yuv420p", av.stream.Disposition.default
            streams.append(stream)
        for number in range(count):
            for stream in streams[:: 1 if place else -1][: 2 if number == 0 else 1]:
                picture = numbered_frame(number, stream.height, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def write_sizes(path: Path, count: int, heights: Sequence[int], fps: int = 25) -> Path:
    """A stream of each height, none the default one. Numbers in a stream begin at its height."""
    with av.open(str(path), "w") as container:
        streams = []
        for height in heights:
            stream = container.add_stream("libx264", rate=fps)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = height, 3 * height, "yuv420p"
            stream.disposition = av.stream.Disposition(0)
            streams.append(stream)
        for number in range(count):
            for stream in streams:
                picture = numbered_frame(number + stream.height, stream.height, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def display_matrix(abcd: tuple[int, int, int, int], height: int, width: int) -> list[int]:
    """Nine integers, as ISO/IEC 14496-12 stores them, that also move the picture to where it is seen."""
    a, b, c, d = abcd
    corners = [(a * x + c * y, b * x + d * y) for x in (0, width) for y in (0, height)]
    left, top = min(x for x, _ in corners), min(y for _, y in corners)
    one = 1 << 16
    return [a * one, b * one, 0, c * one, d * one, 0, -left * one, -top * one, 1 << 30]


def pixel_format(codec: str) -> str:
    """The pixel format that an encoder likes best."""
    return (av.codec.Codec(codec, "w").video_formats or [])[0].name


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=16000), 1.0)
    return path


def write_with_sound(path: Path, count: int, *, late_s: float, fps: int = 10) -> Path:
    """Writes ``count`` frames that begin ``late_s`` seconds after sound that lasts as long as they do."""
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=fps), container.add_stream("aac", rate=16000)
        assert isinstance(pictures, av.VideoStream)
        pictures.height, pictures.width, pictures.pix_fmt = 64, 192, "yuv420p"
        pictures.codec_context.time_base = Fraction(1, CLOCK)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 64, 192), format="rgb24")
            frame.pts, frame.time_base = round((late_s + number / fps) * CLOCK), Fraction(1, CLOCK)
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        _write_silence(container, sound, late_s + count / fps)
    return path


def _write_silence(
    container: av.container.OutputContainer, stream: av.AudioStream, duration_s: float
) -> None:
    silence = np.zeros((1, 1024), dtype=np.float32)
    for start in range(0, round(duration_s * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
