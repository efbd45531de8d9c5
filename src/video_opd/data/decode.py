"""From a file's packets to chosen frames: only what has to be decoded for them is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from video_opd.data.demux import (
    PacketIndex,
    VideoError,
    decode_packet,
    describe,
    open_container,
    video_stream,
)


def decode_frames(path: Path, index: PacketIndex, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame as it is stored) of each wanted frame that decodes, in display order, each once.

    ``wanted``: frame numbers. Raises VideoError for a file that breaks off before the last of them.
    """
    feed_N, drain_N = _stretches(index, wanted)
    number_of = {int(index.packet_pts_N[index.frame_packet_T[n]]): int(n) for n in wanted}
    output = 0
    with open_container(path) as container:
        stream = video_stream(container, path)

        def pick(frames: list[av.VideoFrame]) -> Iterator[tuple[int, av.VideoFrame]]:
            nonlocal output
            for frame in frames:
                key = frame.pts if index.timed else output
                output += 1
                number = None if key is None else number_of.pop(key, None)
                if number is not None and not frame.is_corrupt:
                    yield number, frame

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


def as_shown(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H, W, 3], RGB, rotation applied."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)


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
