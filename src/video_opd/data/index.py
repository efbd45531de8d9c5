"""The frames of a video and when each is shown, from its packets.

A container that holds presentation times is believed: the frames are its packets, sorted by time. The times
of other files (AVI, MPEG program streams, raw streams, broken writers) only say when packets are decoded,
and FFmpeg's guesses from them can be wrong. Those files are decoded once, as a whole: their frames are what
the decoder puts out, in its order, and decoding times or the rate of the codec's headers say when.

A clock that starts again (recordings that were joined or restarted) is continued where it stopped.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from video_opd.data.demux import (
    PacketTable,
    VideoError,
    decode_packet,
    numbered_packets,
    open_container,
    read_packets,
    video_stream,
)
from video_opd.data.orientation import Orientation, orientation_of

# A file that ends this much before its header says is truncated. Headers are off by a frame or two.
MISSING_SHARE, MISSING_S = 0.05, 0.5
MAX_DURATION_S = 30 * 86400.0
# A picture can be decoded before at most this many that are shown earlier (16 frames, or their 32 fields).
MAX_REORDERED = 32
MAX_REORDERED_KEYS = 4  # the same for a keyframe: none, if the mark is true
JUMP_S = 1.0  # decoding times that go back by less, and not at a keyframe, are rounded, not started again
MAX_REPEATED_SHARE = 0.05  # frames that carry the time of another and are left out
MAX_DAMAGED_SHARE = 0.05  # packets that cannot be decoded, in a file whose frames are counted by decoding
NEIGHBOURS = 2  # on either side, that a time of a program stream is compared with
MAX_GAP_FRAMES = 1.5  # a longer gap that lies somewhere among untimed frames cannot be placed
RAW_RATE_TOLERANCE, RAW_FRAMES = 0.01, 12  # durations must agree with the headers' rate on the first frames
SLOW_FRAMES = 100  # frames: a file with a frame every minute makes no jumps
DISCONTINUITY_S = 10.0  # a longer jump ahead of an MPEG clock is no pause (ffmpeg's -dts_delta_threshold)


@dataclass(frozen=True, kw_only=True)
class PacketIndex:
    """The packets of a video stream, in the order of the file (``N``), and its frames, as shown (``T``)."""

    packet_key_N: np.ndarray  # bool: the container calls it a keyframe
    packet_frame_N: np.ndarray  # int64: the frame of a packet, or −1
    header_packets: np.ndarray  # int64: packets with new codec headers, which later ones need
    frame_packet_T: np.ndarray  # int64: the packet of each frame
    frame_times_s_T: np.ndarray  # float64, from the first frame; strictly increasing
    decoded: bool  # whether the frames were counted by decoding the whole file
    skippable: bool  # whether keyframes are marked so that decoding may begin in the middle
    end_s: float  # when the last frame stops being shown
    origin_s: float | None  # the first frame on the clock of all streams; None where that clock starts again
    late_s: float  # how much later than the file its pictures begin; 0 where nobody can tell
    nominal_fps: Fraction | None  # the rate that container or codec claim
    size_px: tuple[int, int]  # (height, width) as shown
    orientation: Orientation  # orientation of the first frame
    pixel_aspect: Fraction | None  # width ÷ height of a stored pixel, as players show it; None: not said
    stream_index: int
    codec: str


def read_index(path: Path, *, decode: bool = False) -> PacketIndex:
    """Finds the frames of a file and their times. Raises VideoError for a file that cannot be used or timed.

    With ``decode`` the file is decoded as a whole even if it holds presentation times. This is for files
    whose packets turned out not to be frames.
    """
    table = read_packets(path)
    assert table.first is not None
    segment_N = _segments(table)
    if segment_N[-1] > 0 and not table.continues:
        raise VideoError(path, "its clock starts again, which this format does not allow for")
    _check_whole(table, segment_N, path)
    timed = not table.raw and all(
        p is not None for p, show in zip(table.pts, table.shown, strict=True) if show
    )
    if decode or table.disordered or not (timed or (table.raw and not table.reorders)):
        return _index(table, path, *_decoded_frames(table, segment_N, path), decoded=True)
    return _index(table, path, *_packet_frames(table, segment_N, timed, path), decoded=False)


def _index(
    table: PacketTable,
    path: Path,
    frames_T: np.ndarray,
    clock_T: np.ndarray,
    last_s: float,
    origin_s: float | None,
    *,
    decoded: bool,
) -> PacketIndex:
    """``clock_T``: when each frame is shown, float64 seconds."""
    if len(frames_T) == 0:
        raise VideoError(path, "zero length: no frame is shown")
    if clock_T[-1] - clock_T[0] > MAX_DURATION_S:
        raise VideoError(
            path, f"its times span {(clock_T[-1] - clock_T[0]) / 86400:,.0f} days; they are broken"
        )
    if not (np.diff(clock_T) > 0).all():
        raise VideoError(path, "the times of its frames contradict each other")
    keys_N = np.array(table.keys)
    packet_frame_N = np.full(len(keys_N), -1, dtype=np.int64)
    packet_frame_N[frames_T] = np.arange(len(frames_T))
    assert table.first is not None
    orientation = orientation_of(table.first)
    times_s = clock_T - clock_T[0]
    if last_s <= 0:
        last_s = _usual_interval_s(times_s) if len(times_s) > 1 else float(1 / (table.rate or 25))
    return PacketIndex(
        packet_key_N=keys_N,
        packet_frame_N=packet_frame_N,
        header_packets=np.array(table.headers, dtype=np.int64),
        frame_packet_T=frames_T,
        frame_times_s_T=times_s,
        decoded=decoded,
        # Some writers mark every packet as a keyframe, of codecs where that cannot be meant.
        skippable=(table.intra_only or not keys_N.all()) and not table.packed,
        end_s=float(times_s[-1]) + last_s,
        origin_s=origin_s,
        late_s=0.0 if origin_s is None or table.starts_s is None else max(0.0, origin_s - table.starts_s),
        nominal_fps=table.rate,
        size_px=orientation.size_px(table.first.height, table.first.width),
        orientation=orientation,
        pixel_aspect=table.pixel_aspect,
        stream_index=table.stream_index,
        codec=table.codec,
    )


def _usual_interval_s(times_s: np.ndarray) -> float:
    """The mean interval between frames, or the median one where gaps make the mean useless."""
    mean_s = float(times_s[-1] - times_s[0]) / (len(times_s) - 1)
    median_s = float(np.median(np.diff(times_s)))
    return mean_s if abs(mean_s - median_s) <= 0.1 * mean_s else median_s


class _Clock:
    """Follows the times of packets, in the order of the file, and notices where they start again."""

    def __init__(self, table: PacketTable) -> None:
        base_s = float(table.time_base)
        known = [dts for dts in table.dts if dts is not None]
        usual = float(np.median(np.abs(np.diff(known)))) if len(known) > 1 else 0.0
        self.jump_back = JUMP_S / base_s
        self.jump_ahead = (
            max(DISCONTINUITY_S / base_s, SLOW_FRAMES * usual) if table.discontinuous else np.inf
        )
        self.dts: int | None = None
        self.largest: list[int] = []  # a heap of the largest presentation times of this segment
        self.least = self.latest = 0  # presentation times of this segment

    def restarts(self, pts: int | None, dts: int | None, key: bool) -> bool:
        """Takes the times of the next packet. Returns whether a new segment begins with it."""
        earlier = pts is not None and bool(self.largest) and pts < self.latest
        if dts is not None and self.dts is not None:
            back = self.dts - dts if earlier or pts is None else 0
            again = (back > 0 and key) or back > self.jump_back or dts - self.dts > self.jump_ahead
        elif earlier and pts is not None:
            later = sum(other > pts for other in self.largest)  # packets before it that are shown after it
            again = later > (MAX_REORDERED_KEYS if key else MAX_REORDERED) or (key and pts <= self.least)
        else:
            again = False
        if dts is not None:
            self.dts = dts
        if again:
            self.largest = []
        if pts is not None:
            self.least = min(self.least, pts) if self.largest else pts
            self.latest = max(self.latest, pts) if self.largest else pts
            push = heapq.heappush if len(self.largest) <= MAX_REORDERED else heapq.heappushpop
            push(self.largest, pts)
        return again


def _segments(table: PacketTable) -> np.ndarray:
    """Numbers the segments of the file between restarts of its clock: int64 [N], increasing.

    In a segment, decoding times never go back, and an MPEG clock does not jump far ahead. Where a file holds
    only presentation times, a new segment begins with a packet that comes after many that are shown later.
    Few are enough for a keyframe, because pictures that are decoded before it are shown before it.
    """
    segment_N = np.zeros(len(table.pts), dtype=np.int64)
    if table.raw:
        return segment_N
    keys_tell = table.intra_only or not all(table.keys)
    clock, segment = _Clock(table), 0
    for number, (pts, dts, shown) in enumerate(zip(table.pts, table.dts, table.shown, strict=True)):
        if shown and (pts is not None or dts is not None):
            segment += clock.restarts(pts, dts, table.keys[number] and keys_tell)
        segment_N[number] = segment
    if keys_tell:
        _hide_headless(table, segment_N)
    return segment_N


def _hide_headless(table: PacketTable, segment_N: np.ndarray) -> None:
    """Hides pictures before the first keyframe of a later segment: they refer to pictures that are not there.

    The decoder would build them from pictures of the segment before.
    """
    keys = np.flatnonzero(table.keys)
    begins = np.flatnonzero(np.diff(segment_N)) + 1
    for begin, end in pairwise([*begins, len(segment_N)]):
        place = np.searchsorted(keys, begin)
        if place == len(keys) or not begin < keys[place] < end:
            continue
        key_pts = table.pts[keys[place]]
        for number in range(begin, end):
            pts = table.pts[number]
            if number < keys[place] or (pts is not None and key_pts is not None and pts < key_pts):
                table.shown[number] = False


Frames = tuple[np.ndarray, np.ndarray, float, "float | None"]  # packets_T, clock_T, last_s, origin_s


def _packet_frames(table: PacketTable, segment_N: np.ndarray, timed: bool, path: Path) -> Frames:
    """Each packet is a frame. Frames before the first one that can be decoded are left out."""
    packets = np.flatnonzero(table.shown)
    if not timed:
        packets = packets[packets >= table.first_packet]
        return packets, *_raw_times(table, packets, path)
    pts = np.array([table.pts[n] for n in packets], dtype=np.int64)
    order = np.lexsort((pts, segment_N[packets]))
    packets, pts = packets[order], pts[order]
    if table.shown[table.first_packet]:
        first = int(np.flatnonzero(packets == table.first_packet)[0])
        packets, pts = packets[first:], pts[first:]
    fresh = _fresh(pts, segment_N[packets])
    if len(fresh) - fresh.sum() > MAX_REPEATED_SHARE * len(fresh):
        return _decoded_frames(table, segment_N, path)  # fields, or frames without a time of their own
    packets, pts = packets[fresh], pts[fresh]
    clock = pts * table.time_base.numerator / table.time_base.denominator
    return packets, *_join(table, packets, clock, segment_N[packets])


def _fresh(pts: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Which of the sorted times are not those of the frame before. bool, as ``pts``."""
    return np.append(True, (np.diff(pts) != 0) | (np.diff(segments) != 0))[: len(pts)]


def _join(
    table: PacketTable, packets: np.ndarray, clock: np.ndarray, segments: np.ndarray
) -> tuple[np.ndarray, float, float | None]:
    """Puts the segments behind each other. Returns (clock, duration of the last frame, origin)."""

    def last_s(end: int, begin: int) -> float:
        known_s = float(table.durations[int(packets[end - 1])] * table.time_base)
        if known_s <= 0 and end - begin > 1:
            known_s = float(np.median(np.diff(clock[begin:end])))
        return known_s if known_s > 0 else float(1 / (table.rate or 25))

    borders = [*np.flatnonzero(np.diff(segments)) + 1, len(packets)]
    if len(borders) == 1:
        last = float(table.durations[int(packets[-1])] * table.time_base) if len(packets) else 0.0
        return clock, last, float(clock[0]) if len(packets) else None
    joined = clock.copy()
    for begin, end, before in zip(borders[:-1], borders[1:], [0, *borders[:-2]], strict=True):
        joined[begin:end] += joined[begin - 1] + last_s(begin, before) - clock[begin]
    return joined, last_s(borders[-1], borders[-2]), None


def _raw_times(table: PacketTable, packets: np.ndarray, path: Path) -> tuple[np.ndarray, float, float]:
    """Times of a raw stream's frames, by the durations that its parser reads off the codec's headers."""
    if not table.rate:
        raise VideoError(
            path,
            "a raw stream that does not state its frame rate; put it into a container that does, "
            "as ffmpeg -r RATE -i FILE -c copy out.mp4",
        )
    frame_s = float(1 / table.rate)
    # A picture lasts until the next one begins, and a second field belongs to the first.
    durations = np.add.reduceat(np.array(table.durations), np.sort(packets)) * float(table.time_base)
    durations = durations[np.argsort(np.argsort(packets))]
    if (
        abs(float(np.median(durations[:RAW_FRAMES])) / frame_s - 1) > RAW_RATE_TOLERANCE
        or durations.min() <= 0
    ):
        durations = np.full(len(packets), frame_s)
    clock = np.concatenate([[0.0], np.cumsum(durations)])
    return clock[:-1], float(durations[-1]), 0.0


def _decoded_frames(table: PacketTable, segment_N: np.ndarray, path: Path) -> Frames:
    """The frames that the decoder puts out, in its order, and when each is shown."""
    output, damaged, delay = _decode_all(path)
    packets = np.array([n for n in output if table.shown[n]], dtype=np.int64)
    if len(packets) == 0:
        raise VideoError(path, f"no frame can be decoded ({table.codec})")
    if table.raw:
        _check_damage(damaged, table, path)
        return packets, *_raw_times(table, packets, path)
    segments = np.maximum.accumulate(segment_N[packets])
    known = np.array([table.pts[n] is not None for n in packets])
    pts = np.array([table.pts[n] or 0 for n in packets], dtype=np.float64) * float(table.time_base)
    decoding_order = np.argsort(packets)
    reorders = not _increases(pts[decoding_order], segments[decoding_order])
    if known.all() and (reorders or _increases(pts, segments)):
        # Damaged packets were meant to be frames: they are missed if one of them is chosen.
        lost = [n for n in damaged if table.shown[n] and table.pts[n] is not None and n > packets[0]]
        packets = np.array([*packets, *lost], dtype=np.int64)
        pts_N = np.array([0 if p is None else p for p in table.pts], dtype=np.int64)
        order = np.lexsort((pts_N[packets], segment_N[packets]))
        packets = packets[order]
        fresh = _fresh(pts_N[packets], segment_N[packets])
        if len(fresh) - fresh.sum() > MAX_REPEATED_SHARE * len(fresh):
            raise VideoError(path, "many of its frames carry the same time")
        packets = packets[fresh]
        clock = pts_N[packets] * table.time_base.numerator / table.time_base.denominator
        return packets, *_join(table, packets, clock, segment_N[packets])
    _check_damage(damaged, table, path)
    clock = np.empty(len(packets))
    for segment in np.unique(segments):
        inside = segments == segment
        times = None if known.all() else _between_anchors(table, pts[inside], known[inside], path)
        if times is None:
            times = _by_decoding_times(table, packets[inside], delay)
        if times is None and table.rate and not any(time is not None for time in (*table.pts, *table.dts)):
            times = np.arange(inside.sum()) / float(table.rate)  # a program stream without any times
        if times is None:
            raise VideoError(path, "its frames carry no times that could be used")
        clock[inside] = times
    interval_s = float(np.median(np.diff(clock))) if len(clock) > 1 else 0.0
    joined, _, origin_s = _join(table, packets, clock, segments)
    last_s = interval_s if interval_s > 0 or not table.rate else float(1 / table.rate)
    return packets, joined, last_s, origin_s


def _increases(values: np.ndarray, segments: np.ndarray) -> bool:
    return bool(((np.diff(values) > 0) | (np.diff(segments) > 0)).all())


def _between_anchors(
    table: PacketTable, pts_s: np.ndarray, known: np.ndarray, path: Path
) -> np.ndarray | None:
    """Spreads frames evenly between those whose times the file holds: MPEG program streams time only some."""
    anchors = np.flatnonzero(known)
    anchors = anchors[_plausible(anchors, pts_s[anchors])]
    if len(anchors) == 0 or not (np.diff(pts_s[anchors]) > 0).all():
        return None
    if len(anchors) > 1:
        steps, spans_s = np.diff(anchors), np.diff(pts_s[anchors])
        interval_s = float(np.median(spans_s / steps))
        if (np.abs(spans_s - steps * interval_s)[steps > 1] > MAX_GAP_FRAMES * interval_s).any():
            raise VideoError(
                path, "a gap between frames that are not timed one by one: nobody can tell where"
            )
    elif table.rate:
        interval_s = float(1 / table.rate)
    else:
        return None
    first, last = int(anchors[0]), int(anchors[-1])
    numbers = np.arange(len(pts_s))
    times = np.interp(numbers, anchors, pts_s[anchors])
    times[:first] = pts_s[first] + (numbers[:first] - first) * interval_s
    times[last:] = pts_s[last] + (numbers[last:] - last) * interval_s
    return times


def _plausible(anchors: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Which times agree with most of their neighbours about when frame 0 was shown. bool, as ``anchors``.

    A time belongs to the first picture that begins in its packet of the program stream. If the start code
    itself lies across two of these, FFmpeg hands the time to the picture before.
    """
    if len(anchors) < 3:
        return np.ones(len(anchors), dtype=bool)
    interval_s = float(np.median(np.diff(times_s) / np.diff(anchors)))
    starts_s = times_s - anchors * interval_s
    reach = min(NEIGHBOURS, (len(anchors) - 1) // 2)
    padded = np.concatenate(
        [starts_s[: reach + 1][::-1][:reach], starts_s, starts_s[-reach - 1 :][::-1][-reach:]]
    )
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    return np.abs(starts_s - np.median(around, axis=1)) < 0.75 * interval_s


def _by_decoding_times(table: PacketTable, packets: np.ndarray, delay: int) -> np.ndarray | None:
    """The k-th frame is shown at the (k + R)-th decoding time; R is how far frames are decoded ahead.

    An encoder that reorders frames decodes each R frames before it is shown, and so its decoding times are
    the sorted presentation times, R places later. Gaps between the times stay where they are. If any
    frame is reordered, R is at least ``delay``, the number of frames that the decoder holds back.
    """
    found = [table.dts[n] if table.dts[n] is not None else table.pts[n] for n in np.sort(packets)]
    if any(time is None for time in found):
        return None
    dts = np.array(found, dtype=np.float64) * float(table.time_base)
    ahead = 0
    if (np.diff(dts) > 0).all():
        place = np.argsort(np.argsort(packets))  # the place of each frame in the order of decoding
        ahead = int((place - np.arange(len(packets))).max())
        ahead = min(max(ahead, delay), len(packets) - 1) if ahead > 0 else 0
    dts = np.sort(dts)
    interval_s = float(np.median(np.diff(dts))) if len(dts) > 1 else 0.0
    times = np.concatenate([dts[ahead:], dts[-1] + interval_s * np.arange(1, ahead + 1)])
    return times - times[0] + dts[0]  # sound that begins with the first packet begins with the first frame


def _check_damage(damaged: list[int], table: PacketTable, path: Path) -> None:
    if len(damaged) > MAX_DAMAGED_SHARE * len(table.pts):
        raise VideoError(path, f"corrupt: {len(damaged)} of {len(table.pts)} packets cannot be decoded")


def _decode_all(path: Path) -> tuple[list[int], list[int], int]:
    """Returns the packet of each frame, in the order of output; the packets that the decoder refuses; and how
    many frames it holds back to put them in order.
    """
    output: dict[int, None] = {}
    damaged: list[int] = []
    with open_container(path) as container:
        stream = video_stream(container, path)
        stream.codec_context.options = {"skip_loop_filter": "all"}  # only the order is looked at
        packets = numbered_packets(container.demux(stream), stream)
        try:
            for number, packet in packets:
                try:
                    frames = decode_packet(stream, packet)
                except (av.FFmpegError, ValueError):
                    damaged.append(number)
                    continue
                output.update((int(frame.pts), None) for frame in frames if frame.pts is not None)
        except av.FFmpegError:
            pass  # a file that breaks off: the packets before that were compared with its header
        try:
            frames = decode_packet(stream, None)
        except (av.FFmpegError, ValueError):
            frames = []
        output.update((int(frame.pts), None) for frame in frames if frame.pts is not None)
    return list(output), damaged, len(frames)


def _check_whole(table: PacketTable, segment_N: np.ndarray, path: Path) -> None:
    """Raises VideoError if the packets end well before the header says."""
    known = [
        (pts if pts is not None else dts, duration)
        for pts, dts, duration in zip(table.pts, table.dts, table.durations, strict=True)
    ]
    times = [(time, time + duration) for time, duration in known if time is not None]
    if table.promised_s is None or not times or segment_N[-1] > 0:
        return
    base, frame_s = table.time_base, float(1 / table.rate) if table.rate else 0.0
    first_s = float(min(start for start, _ in times) * base)
    end_s = max(
        float(max(end for _, end in times) * base), float(max(start for start, _ in times) * base) + frame_s
    )
    if table.promise_of_all:
        read_s = max(table.furthest_s, table.furthest_s - first_s)
    elif table.promise_from_zero:
        read_s = max(end_s, end_s - first_s)
    else:
        read_s = end_s - first_s
    if table.promised_s - read_s > max(MISSING_S, MISSING_SHARE * table.promised_s):
        raise VideoError(path, f"truncated: {max(read_s, 0.0):.1f} of {table.promised_s:.1f} s can be read")
