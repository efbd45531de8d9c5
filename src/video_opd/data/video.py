"""A video file becomes a :class:`Clip`: decoded, sampled and resized exactly once.

Frame choice at a constant rate is qwen-vl-utils' (evenly spread frame *numbers*); at a variable rate it is
the frames nearest to evenly spread *times*. The rate counts as variable as soon as frame number ÷ mean
rate is more than half a frame off for any frame. Times are always presentation times, from the first frame.

Frames are decoded one by one and resized as they come: memory is the chosen frames, after resizing, plus
one. Only stretches from a keyframe to a chosen frame are decoded.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from video_opd.data.budget import PAIR, ClipPlan, VideoBudget, nearest_indices, plan, uniform_indices
from video_opd.data.demux import (
    PacketIndex,
    VideoError,
    decode_packet,
    describe,
    open_container,
    read_index,
    video_stream,
)
from video_opd.errors import UserError
from video_opd.types import Clip

__all__ = ["BACKENDS", "VideoError", "VideoInfo", "clip_digest", "load_clip", "probe"]

BACKENDS = ("pyav", "torchcodec")
# So many of the chosen frames may be damaged (a lost packet, a cut at the start) before the video is.
MAX_LOST_SHARE = 0.05
# A claimed rate within this of the measured one is taken: it is what other readers report.
RATE_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video holds, without decoding it. ``T``: all its frames, in display order."""

    path: Path
    times_s: np.ndarray  # float64 [T], presentation times from the first frame
    duration_s: float  # until the last frame stops being shown
    fps: float  # mean rate
    variable_rate: bool
    size_px: tuple[int, int]  # (height, width) as shown, rotation applied
    codec: str

    @property
    def frame_count(self) -> int:
        return len(self.times_s)


def probe(path: str | Path) -> VideoInfo:
    """Frame times, rate and size of a video. Raises VideoError."""
    path = Path(path)
    return _info(path, read_index(path))


def load_clip(path: str | Path, budget: VideoBudget, backend: str = "pyav") -> Clip:
    """Decodes the frames that ``budget`` allows; always an even number (the last one repeated if need be).

    Raises VideoError for a video that cannot be used: missing, empty, truncated, corrupt, without a video
    stream, without frames. Raises UserError for a backend that is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown video backend {backend!r}; choose one of: {', '.join(BACKENDS)}")
    if backend == "torchcodec" and importlib.util.find_spec("torchcodec") is None:
        raise UserError("the video backend torchcodec is not installed; install torchcodec, or choose pyav")
    path = Path(path)
    index = read_index(path)
    info = _info(path, index)
    chosen = plan(info.frame_count, info.fps, *info.size_px, budget)
    wanted = _choose(info, chosen.n_frames)
    if backend == "torchcodec":
        decoded = _torchcodec_frames(path, wanted)
    else:
        decoded = _pyav_frames(path, index, wanted)
    frames, kept = _collect(decoded, wanted, chosen, path)
    if len(kept) % PAIR:
        frames, kept = np.concatenate([frames, frames[-1:]]), np.append(kept, kept[-1])
    times_s = info.times_s[kept]
    return Clip(
        path=path,
        frames=frames,
        times_s=times_s,
        frame_indices=kept,
        source_fps=info.fps,
        duration_s=info.duration_s,
        source_size_px=info.size_px,
        digest=clip_digest(frames, times_s),
    )


def clip_digest(frames: np.ndarray, times_s: np.ndarray) -> str:
    """32 hex digits of the frames' shape and bytes and of their times (blake2b)."""
    digest = hashlib.blake2b(repr(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(times_s, dtype="<f8").data)
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def _info(path: Path, index: PacketIndex) -> VideoInfo:
    times_s = index.frame_times_s_T
    count = len(times_s)
    interval_s = index.end_s if count == 1 else float(times_s[-1]) / (count - 1)
    off_s = np.abs(times_s - np.arange(count) * interval_s).max()
    variable = bool(off_s > interval_s / 2)
    fps = count / index.end_s if variable else 1 / interval_s
    if index.nominal_fps and not variable and abs(float(index.nominal_fps) / fps - 1) <= RATE_TOLERANCE:
        fps = float(index.nominal_fps)
    return VideoInfo(
        path=path,
        times_s=times_s,
        duration_s=index.end_s,
        fps=fps,
        variable_rate=variable,
        size_px=index.size_px,
        codec=index.codec,
    )


def _choose(info: VideoInfo, n_frames: int) -> np.ndarray:
    if info.variable_rate:
        return nearest_indices(info.times_s, n_frames)
    return np.unique(uniform_indices(info.frame_count, n_frames))


def _collect(
    decoded: Iterator[tuple[int, np.ndarray]], wanted: np.ndarray, chosen: ClipPlan, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Resized frames [T, H, W, 3] and their numbers [T], in display order."""
    frames = np.empty((len(wanted), chosen.height_px, chosen.width_px, 3), dtype=np.uint8)
    kept = np.empty(len(wanted), dtype=np.int64)
    count = 0
    for number, rgb in decoded:
        frames[count] = _resize(rgb, chosen.height_px, chosen.width_px)
        kept[count] = number
        count += 1
    lost = len(wanted) - count
    if count == 0:
        raise VideoError(path, "corrupt: none of its frames can be decoded")
    if lost > MAX_LOST_SHARE * len(wanted):
        raise VideoError(path, f"corrupt: {lost} of {len(wanted)} chosen frames cannot be decoded")
    return frames[:count], kept[:count]


def _resize(rgb: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """uint8 [h, w, 3] → uint8 [height_px, width_px, 3], as qwen-vl-utils resizes."""
    if rgb.shape[:2] == (height_px, width_px):
        return rgb
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1).contiguous()
    image = resize(image, [height_px, width_px], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return image.permute(1, 2, 0).numpy()


def _pyav_frames(path: Path, index: PacketIndex, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number, RGB as shown) of each wanted frame that decodes, in display order, each once."""
    feed_N, drain_N = _stretches(index, wanted)
    number_of = {int(index.packet_pts_N[index.frame_packet_T[n]]): int(n) for n in wanted}
    output = 0
    with open_container(path) as container:
        stream = video_stream(container, path)

        def pick(frames: list[av.VideoFrame]) -> Iterator[tuple[int, np.ndarray]]:
            nonlocal output
            for frame in frames:
                key = frame.pts if index.timed else output
                output += 1
                number = None if key is None else number_of.pop(key, None)
                if number is not None and not frame.is_corrupt:
                    rgb = frame.to_ndarray(format="rgb24")
                    yield number, np.rot90(rgb, round(frame.rotation / 90) % 4)

        position = 0
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if feed_N[position]:
                    yield from pick(decode_packet(stream, packet))
                    if drain_N[position]:
                        yield from pick(decode_packet(stream, None))
                        stream.codec_context.flush_buffers()
                position += 1
                if not number_of or position == len(feed_N):
                    break
        except av.FFmpegError as error:
            if number_of:
                raise VideoError(path, f"cannot be read to its end ({describe(error)})") from None
        if number_of:
            yield from pick(decode_packet(stream, None))


def _stretches(index: PacketIndex, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which packets to feed to the decoder, and after which of them to drain it before a gap. bool [N] each.

    A frame needs the packets from its keyframe on. One that is shown before its keyframe (a leading picture
    of an open group) needs the group before as well. Files whose marks say nothing are fed whole.
    """
    count = len(index.packet_pts_N)
    everything = np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    if not index.skippable:
        return everything
    starts = np.flatnonzero(index.packet_key_N)
    packets = index.frame_packet_T[wanted]
    groups = np.searchsorted(starts, packets, side="right") - 1
    leading = index.packet_pts_N[packets] < index.packet_pts_N[starts[groups]]
    begins = starts[np.maximum(groups - leading, 0)]
    change = np.zeros(count + 1, dtype=np.int64)
    np.add.at(change, begins, 1)
    np.add.at(change, packets + 1, -1)
    feed = np.cumsum(change[:-1]) > 0
    drain = feed & ~np.append(feed[1:], True)
    return feed, drain


def _torchcodec_frames(path: Path, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC")
        for number in wanted:
            yield int(number), decoder.get_frame_at(int(number)).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise VideoError(path, f"torchcodec cannot decode it ({str(error).splitlines()[0]})") from None
