"""Small videos for tests, whose frames carry their own number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 12  # of the number, as black and white columns over the upper half of a frame
CLOCK = 90_000  # time base: fine enough for any rate


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: the number in columns above, a picture with texture below."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([x * 255 // width, y * 255 // height, (x + y + 7 * number) % 256], axis=-1)
    bits = (number >> (np.arange(width) * BITS // width)) & 1
    picture[: height // 2] = bits[None, :, None] * 255
    return picture.astype(np.uint8)


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


def write_video(
    path: Path,
    count: int,
    *,
    fps: float = 10.0,
    size: tuple[int, int] = (64, 192),
    times_s: Sequence[float] | np.ndarray | None = None,
    codec: str = "libx264",
    rotation: int = 0,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes ``count`` numbered frames at a constant rate, or at ``times_s``."""
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if times_s is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[number] * CLOCK), Fraction(1, CLOCK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
