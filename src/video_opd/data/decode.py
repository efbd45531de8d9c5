"""Decodes chosen frames of a file, and only the packets that they need."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from video_opd.data.demux import (
    VideoError,
    decode_packet,
    describe,
    numbered_packets,
    open_container,
    video_stream,
)
from video_opd.data.index import PacketIndex
from video_opd.data.orientation import orientation_of

# A frame that does not come is looked for from earlier packets, at most about this many, and so many times in
# vain: frames of a damaged file never come.
MAX_SEARCH_PACKETS = 3000
MAX_SEARCHES = 3


class IndexMismatch(VideoError):
    """The decoder contradicts an index that was made from packets: decode the file to make a right one."""


@dataclass
class _Report:
    """The findings of a pass over the file besides its frames."""

    errors: int = 0  # packets that the decoder refused


def decode_frames(path: Path, index: PacketIndex, wanted: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (number, frame as it is stored) of each wanted frame that decodes, in display order, each once.

    ``wanted``: frame numbers. A keyframe may be one only in name: where a frame does not come, or begins with
    a picture that needs others, decoding starts at earlier keyframes.

    Raises IndexMismatch if frames come in another order than the index says, or if packets that it counts as
    frames give none although nothing is damaged. Raises VideoError for a file that breaks off before the last
    wanted frame.
    """
    pending = deque(int(n) for n in np.unique(wanted))
    lead = settled = searches = 0  # groups of pictures to feed before the marked one; how many were enough
    report = _Report()
    while pending:
        missed = False
        for event in _decode_pass(path, index, np.array(pending), lead, report):
            if event.mistaken_key:
                lead, missed = len(index.packet_key_N), True
                settled = lead
                break
            if event.disordered and not index.decoded:
                raise IndexMismatch(path, "its frames come in another order than their times say")
            while pending and event.passed > pending[0] and not missed:
                begin = int(_begins(index, np.array([pending[0]]), lead)[0])
                far = lead > 1 and int(index.frame_packet_T[pending[0]]) - begin > MAX_SEARCH_PACKETS
                if begin == 0 or far or searches >= MAX_SEARCHES:
                    searches += lead > settled
                    if not index.decoded and not report.errors:
                        raise IndexMismatch(path, "packets without a picture")
                    pending.popleft()
                    missed = lead != settled  # the search is over: go on as before
                    lead = settled
                else:
                    lead, missed = max(1, 2 * lead), True
            if missed or not pending:
                break
            if event.frame is not None and event.number == pending[0]:
                settled = lead
                yield pending.popleft(), event.frame
                if not pending:
                    break
        else:
            break


@dataclass(frozen=True, kw_only=True)
class _Event:
    """A frame that the decoder gave, or the end of a stretch. Frames before ``passed`` come no more."""

    passed: int
    number: int = -1
    frame: av.VideoFrame | None = None  # None if it is damaged
    mistaken_key: bool = False  # decoding began here, and this is no picture to begin with
    disordered: bool = False


def _decode_pass(
    path: Path, index: PacketIndex, wanted: np.ndarray, lead: int, report: _Report
) -> Iterator[_Event]:
    feed_N, drain_N = _stretches(index, wanted, lead)
    last = int(np.flatnonzero(feed_N)[-1])
    report.errors = 0
    wanted_packets = index.frame_packet_T[wanted]
    newest = -1
    with open_container(path) as container:
        stream = video_stream(container, path)
        begin = 0

        def decode(packet: av.Packet | None) -> Iterator[_Event]:
            nonlocal newest
            try:
                frames = decode_packet(stream, packet)
            except (av.FFmpegError, ValueError):
                report.errors += 1
                return
            for frame in frames:
                number = -1 if frame.pts is None else int(index.packet_frame_N[frame.pts])
                if number < 0:
                    continue
                mistaken = begin > 0 and frame.pts == begin and not _begins_alone(frame)
                yield _Event(
                    passed=number + frame.is_corrupt,
                    number=number,
                    frame=None if frame.is_corrupt else frame,
                    mistaken_key=mistaken,
                    disordered=number < newest,
                )
                newest = max(newest, number)

        def drained(position: int) -> _Event:
            waiting = wanted[wanted_packets > position]
            return _Event(passed=int(waiting.min()) if len(waiting) else len(index.frame_packet_T))

        try:
            for position, packet in numbered_packets(container.demux(stream), stream):
                if position > last:
                    break
                if not feed_N[position]:
                    continue
                if position == 0 or not feed_N[position - 1]:
                    begin = position
                yield from decode(packet)
                if drain_N[position]:
                    yield from decode(None)
                    stream.codec_context.flush_buffers()
                    yield drained(position)
                    if position == last:
                        return
        except av.FFmpegError as error:
            raise VideoError(path, f"cannot be read to its end ({describe(error)})") from None
        yield from decode(None)
        yield _Event(passed=len(index.frame_packet_T))


def _begins_alone(frame: av.VideoFrame) -> bool:
    return bool(frame.key_frame) or frame.pict_type == av.video.frame.PictureType.I


def as_shown(frame: av.VideoFrame, path: Path) -> np.ndarray:
    """uint8 [H, W, 3], RGB, turned and mirrored as the file says. Raises VideoError for unknown colours."""
    with refusing_colours(path):
        return orientation_of(frame).apply(frame.to_ndarray(format="rgb24"))


@contextlib.contextmanager
def refusing_colours(path: Path) -> Iterator[None]:
    """Inside, a conversion of colours that FFmpeg cannot compute raises VideoError."""
    try:
        yield
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(path, f"its colours cannot be converted ({describe(error)})") from None


def _stretches(index: PacketIndex, wanted: np.ndarray, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """Which packets to feed to the decoder, and after which of them to drain it before a gap. bool [N] each.

    A frame needs the packets from its keyframe on. One that is shown before its keyframe (a leading picture
    of an open group) needs the group before as well. ``lead`` groups more are fed. Files whose marks say
    nothing are fed from their beginning.
    """
    count = len(index.packet_key_N)
    packets = index.frame_packet_T[wanted]
    begins = _begins(index, wanted, lead)
    change = np.zeros(count + 1, dtype=np.int64)
    np.add.at(change, begins, 1)
    np.add.at(change, packets + 1, -1)
    feed = np.cumsum(change[:-1]) > 0
    feed[index.header_packets[index.header_packets < packets.max()]] = True
    drain = feed & ~np.append(feed[1:], True)
    return feed, drain


def _begins(index: PacketIndex, wanted: np.ndarray, lead: int) -> np.ndarray:
    """The packet that decoding begins at for each wanted frame."""
    if not index.skippable:
        return np.zeros(len(wanted), dtype=np.int64)
    starts = np.unique(np.append(0, np.flatnonzero(index.packet_key_N)))
    groups = np.searchsorted(starts, index.frame_packet_T[wanted], side="right") - 1
    first_shown = index.packet_frame_N[starts]  # −1 where the keyframe itself is not shown
    while (leading := (groups > 0) & ((first_shown[groups] < 0) | (wanted < first_shown[groups]))).any():
        groups = groups - leading
    return starts[np.maximum(groups - lead, 0)]
