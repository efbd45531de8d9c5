"""What a video file holds, read from its packets: no frame but the first is decoded.

Times are presentation times. The pass is cheap (microseconds a packet) and its memory is a few bytes a
packet, so that a video of hours can be planned before it is decoded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from video_opd.errors import UserError

MAX_PACKETS = 5_000_000  # eleven hours at 120 fps: a file with more is broken, or not a video
READ_TIMEOUT_S = 60.0  # of one read, so that a dead network disk is an error and not a hang
# A file that ends this much before its header says is truncated. Headers are off by a frame or two.
MISSING_SHARE, MISSING_S = 0.05, 0.5


class VideoError(UserError):
    """A video that cannot be used: ``path`` and ``reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # so that it crosses processes whole
        return type(self), (self.path, self.reason)


@dataclass(frozen=True, kw_only=True)
class PacketIndex:
    """The video packets of a file, in decode order (``N``), and its frames, in display order (``T``)."""

    packet_pts_N: np.ndarray  # int64, in time-base units
    packet_key_N: np.ndarray  # bool: decoding can start here
    frame_packet_T: np.ndarray  # int64: the packet of each frame
    frame_times_s_T: np.ndarray  # float64, from the first frame; strictly increasing
    timed: bool  # False: the file carries no presentation times; they are frame number / nominal rate
    skippable: bool  # whether its keyframe marks can be trusted to begin decoding in the middle
    end_s: float  # when the last frame stops being shown
    nominal_fps: Fraction | None  # the rate that the container claims
    size_px: tuple[int, int]  # (height, width) as shown
    codec: str


def open_container(path: Path) -> av.container.InputContainer:
    """Opens a local file, never a URL that a playlist inside it might name. Raises VideoError."""
    if not path.exists():
        raise VideoError(path, "no such file")
    if not path.is_file():
        raise VideoError(path, "not a file")
    if path.stat().st_size == 0:
        raise VideoError(path, "empty file")
    try:
        return av.open(
            f"file:{path.absolute()}",
            container_options={"protocol_whitelist": "file"},
            metadata_errors="replace",
            timeout=(READ_TIMEOUT_S, READ_TIMEOUT_S),
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(path, f"cannot be opened as a video ({describe(error)})") from None


def video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The video stream, with one decoding thread: videos are decoded in parallel, not their frames."""
    attached = av.stream.Disposition.attached_pic  # a cover picture of a piece of music is no video
    streams = [s for s in container.streams.video if not s.disposition & attached]
    if not streams:
        raise VideoError(path, "no video stream")
    stream = streams[0]
    try:
        stream.codec_context.thread_count = 1
    except (AttributeError, RuntimeError):
        raise VideoError(path, "its video codec is not known to this FFmpeg") from None
    return stream


def read_index(path: Path) -> PacketIndex:
    """One pass over the packets. Raises VideoError if no frame can be shown, or the file is truncated."""
    with open_container(path) as container:
        stream = video_stream(container, path)
        pts: list[int | None] = []
        keys: list[bool] = []
        shown: list[bool] = []
        durations: list[int] = []
        first: av.VideoFrame | None = None
        furthest_s = 0.0  # over all streams, for containers that know only their total duration
        for packet in _packets(container, path):
            if packet.pts is not None:
                furthest_s = max(furthest_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index:
                continue
            pts.append(packet.pts)
            keys.append(packet.is_keyframe)
            shown.append(not packet.is_discard)  # discarded: cut away by an edit list
            durations.append(packet.duration or 0)
            if first is None:
                first = next(iter(decode_packet(stream, packet)), None)
        if first is None:
            first = next(iter(decode_packet(stream, None)), None)
        if not pts:
            raise VideoError(path, "its video stream holds no frames")
        if first is None:
            raise VideoError(path, f"no frame can be decoded ({stream.codec_context.name})")
        _check_whole(container, stream, pts, durations, furthest_s, path)
        turned = first.rotation % 180 == 90
        return _index(
            pts,
            np.array(keys),
            np.array(shown),
            durations,
            stream,
            (first.width, first.height) if turned else (first.height, first.width),
            path,
        )


def decode_packet(stream: av.VideoStream, packet: av.Packet | None) -> list[av.VideoFrame]:
    """The frames that a packet completes; none if it is damaged. ``None`` drains the decoder."""
    try:
        return stream.codec_context.decode(packet)
    except (av.FFmpegError, ValueError):
        return []


def describe(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _packets(container: av.container.InputContainer, path: Path) -> Iterator[av.Packet]:
    count = 0
    # A file that breaks off raises here; whether enough was read is judged from what was.
    with contextlib.suppress(av.FFmpegError, EOFError):
        for packet in container.demux():
            if packet.size == 0:
                continue  # the marker at the end of each stream
            count += 1
            if count > MAX_PACKETS:
                raise VideoError(path, f"more than {MAX_PACKETS:,} packets")
            yield packet


def _index(
    pts: list[int | None],
    keys_N: np.ndarray,
    shown_N: np.ndarray,
    durations: list[int],
    stream: av.VideoStream,
    size_px: tuple[int, int],
    path: Path,
) -> PacketIndex:
    nominal = stream.average_rate or stream.guessed_rate or None
    timed = all(p is not None for p, show in zip(pts, shown_N, strict=True) if show)
    if timed:
        missing = np.iinfo(np.int64).min
        pts_N = np.array([missing if p is None else p for p in pts], dtype=np.int64)
        packets = np.flatnonzero(shown_N)
        values, first_of = np.unique(pts_N[packets], return_index=True)  # sorted; a repeated time once
        frames = packets[first_of]
        base = _time_base(stream)
    else:
        if not nominal:
            raise VideoError(path, "neither frame times nor a frame rate")
        pts_N = frames = values = np.arange(len(pts), dtype=np.int64)
        base = Fraction(nominal.denominator, nominal.numerator)
    if len(frames) == 0:
        raise VideoError(path, "zero length: no frame is shown")
    times_s = (values - values[0]) * base.numerator / base.denominator
    last_s = float(durations[int(frames[-1])] * base) if timed else float(base)
    if last_s <= 0:
        last_s = float(times_s[-1]) / (len(times_s) - 1) if len(times_s) > 1 else float(1 / (nominal or 25))
    # Some writers mark every packet as a keyframe, of codecs where that cannot be meant.
    skippable = timed and bool(keys_N[0]) and (stream.codec_context.codec.intra_only or not keys_N.all())
    return PacketIndex(
        packet_pts_N=pts_N,
        packet_key_N=keys_N,
        frame_packet_T=frames.astype(np.int64),
        frame_times_s_T=times_s.astype(np.float64),
        timed=timed,
        skippable=skippable,
        end_s=float(times_s[-1]) + last_s,
        nominal_fps=nominal,
        size_px=size_px,
        codec=stream.codec_context.name,
    )


def _check_whole(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    pts: list[int | None],
    durations: list[int],
    furthest_s: float,
    path: Path,
) -> None:
    """Raises VideoError if the packets end well before the header says."""
    known = [(p, p + d) for p, d in zip(pts, durations, strict=True) if p is not None]
    if not known:
        return
    base = _time_base(stream)
    first_s, end_s = (
        float(min(start for start, _ in known) * base),
        float(max(end for _, end in known) * base),
    )
    if stream.duration:
        promised_s, read_s = float(stream.duration * base), end_s - first_s
    elif (promised := _tagged_duration_s(stream)) is not None:
        promised_s, read_s = promised, max(end_s, end_s - first_s)  # counted from 0, not from the first frame
    elif container.duration:
        promised_s, read_s = container.duration / av.time_base, max(furthest_s, furthest_s - first_s)
    else:
        return
    if promised_s - read_s > max(MISSING_S, MISSING_SHARE * promised_s):
        raise VideoError(path, f"truncated: {max(read_s, 0.0):.1f} of {promised_s:.1f} s can be read")


def _time_base(stream: av.VideoStream) -> Fraction:
    assert stream.time_base is not None, "every stream of an open file has one"
    return stream.time_base


def _tagged_duration_s(stream: av.VideoStream) -> float | None:
    """Matroska keeps a stream's duration as a tag: "00:01:02.345000000"."""
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip())
    return None if tag is None else int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
