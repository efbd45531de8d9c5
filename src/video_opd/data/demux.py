"""Opens video files, chooses the stream that is shown, and reads its packets without decoding them.

The pass over the packets is cheap (microseconds a packet) and keeps a few bytes a packet, so that a video of
hours can be planned before it is decoded. ``index.py`` turns the packets into frames and times.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from video_opd.data.containers import MAX_FRAME_PX, WatchedFile, open_options
from video_opd.data.edit_lists import edit_list_fault, top_boxes
from video_opd.errors import UserError

MAX_PACKETS = 5_000_000  # eleven hours at 120 fps: a file with more is broken, or not a video
# Flags of FFmpeg's demuxers (AVFMT_… in avformat.h).
NO_TIMESTAMPS = 0x0080  # a raw stream: the file holds no times at all
DISCONTINUOUS = 0x0200  # the clock may jump: MPEG streams
# These demuxers take presentation times from the file. Others may leave them out, and FFmpeg then guesses.
_TIMED_FORMATS = ("mov", "flv")
_NOT_FILM = (av.stream.Disposition.attached_pic, av.stream.Disposition.timed_thumbnails)
_ORDER_PACKETS = 24
_CLOCK_CODECS = ("h261", "h263")  # their pictures are numbered by ticks of 30000/1001 Hz
_MOST_RAW_FPS = 300  # of a raw stream: more is the clock of a variable rate, 600 to 90,000 Hz
_PACKED = re.compile(rb"DivX\d+(?:Build|b)\d+p")
# How a file of these formats begins: so many bytes that occur nowhere else in it.
_SIGNATURE_BYTES = {"flv": 4, "asf": 16, "nut": 24, "mxf": 16, "wtv": 16, "apng": 8, "rm": 8, "swf": 8}
_TAIL_BYTES, _TAIL_MARGIN = 1 << 20, 64  # read after the last packet, and a little before it
# Without this argument, PyAV before version 19 refuses a video whose tags are not UTF-8. Later versions
# replace such characters by themselves and have no such argument.
TOLERATE_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


class VideoError(UserError):
    """A video that cannot be used: ``path`` and ``reason``."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # keeps both attributes when it is sent to another process
        return type(self), (self.path, self.reason)


@dataclass(kw_only=True)
class PacketTable:
    """The packets of a video stream, in the order of the file (``N``), and what the container says of it.

    ``pts`` and ``dts`` are those of the file, in units of ``time_base_s``; None where the file has none.
    """

    stream_index: int
    codec: str
    intra_only: bool  # every packet can be decoded alone
    reorders: bool  # the codec may show frames in another order than they are decoded in
    raw: bool  # the format holds no times
    discontinuous: bool  # its clock may jump, by the format's rules
    continues: bool  # the demuxer reads on where another file was joined to the first
    packed: bool = False  # DivX's two pictures in a packet: the decoder keeps the second when it is flushed
    time_base: Fraction
    pixel_aspect: Fraction | None  # width ÷ height of a stored pixel, as players show it; None: not said
    rate: Fraction | None  # the container's or the codec's claim, never a demuxer's default
    promised_s: float | None  # the duration that the header states
    promise_from_zero: bool = False  # whether it counts from 0 and not from the first frame
    promise_of_all: bool = False  # whether it is that of all streams together
    furthest_s: float = 0.0  # the latest end of a packet of any stream
    starts_s: float | None = None  # when the first of its streams begins, as players say
    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    durations: list[int] = field(default_factory=list)  # 0 where unknown
    keys: list[bool] = field(default_factory=list)
    shown: list[bool] = field(default_factory=list)  # False: a header, or cut away by an edit list
    headers: list[int] = field(default_factory=list)  # packets that bring new codec headers
    first: av.VideoFrame | None = None  # the first frame that the decoder gives
    first_packet: int = 0  # the packet that it was in
    disordered: bool = False  # whether the first frames came in another order than their times say


@contextlib.contextmanager
def open_container(path: Path, *, guess_times: bool = True) -> Iterator[av.container.InputContainer]:
    """Opens a local file of a known format, and no other that it may name. Raises VideoError.

    Without ``guess_times``, packets carry only the times that the file holds.
    """
    with _open_watched(path, guess_times) as (container, watched):
        watched.watching = False  # read_packets has read the whole file with the watch
        yield container


@contextlib.contextmanager
def _open_watched(
    path: Path, guess_times: bool = True
) -> Iterator[tuple[av.container.InputContainer, WatchedFile]]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise VideoError(path, "not a file")
        if found.st_size == 0:
            raise VideoError(path, "empty file")
        file = WatchedFile(path)
    except (FileNotFoundError, NotADirectoryError):
        raise VideoError(path, "no such file") from None
    except VideoError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a link to itself; a zero byte
        raise VideoError(path, f"cannot be opened ({describe(error)})") from None
    with file:
        try:
            container = av.open(file, **open_options(guess_times), **TOLERATE_METADATA)
        except av.ArgumentError:  # FFmpeg says so of a format that is not on the list
            raise VideoError(
                path,
                "not a video in a container that is opened (MP4, Matroska, AVI, MPEG and others; no "
                "playlists, lists of files or pictures)",
            ) from None
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = file.gap if file.gave_up else describe(error)
            raise VideoError(path, f"cannot be opened as a video ({reason})") from None
        with container:
            if file.gave_up:
                raise VideoError(path, f"cannot be opened as a video ({file.gap})")
            yield container, file


def video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """Returns the stream that players show: the default one, else the largest, else the first.

    It decodes with one thread, because videos are decoded in parallel, not their frames. Cover pictures and
    thumbnails do not count as video; a stream of a single picture counts only if there is no other.
    """
    streams = [s for s in container.streams.video if not any(s.disposition & flag for flag in _NOT_FILM)]
    if not streams:
        raise VideoError(path, "no video stream")
    stream = max(streams, key=_preference)  # the first of equals
    try:
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PX)}
    except (AttributeError, RuntimeError):
        raise VideoError(path, "its video codec is not known to this FFmpeg") from None
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PX:
        raise VideoError(
            path, f"frames of {width} × {height} pixels; more than {MAX_FRAME_PX:,} are not decoded"
        )
    return stream


def _preference(stream: av.VideoStream) -> tuple[bool, bool, int]:
    context: av.VideoCodecContext | None = stream.codec_context
    size_px = 0 if context is None else context.width * context.height
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.frames != 1, is_default, size_px  # 0 frames: nobody says how many


def read_packets(path: Path) -> PacketTable:
    """Passes over the packets once; decodes up to the first frame. Raises VideoError if there is none."""
    with _open_watched(path) as (container, file):
        stream = video_stream(container, path)
        table = _describe_stream(container, stream)
        if container.format.name.startswith("mov") and (fault := edit_list_fault(path, stream.id)):
            raise VideoError(path, f"{fault}; export it anew with the program that made it")
        sure = table.raw or not table.reorders or container.format.name.startswith(_TIMED_FORMATS)
        if sure:
            _fill(table, _packets(container, file, path), container.format.name, stream, path)
    if not sure:
        with _open_watched(path, guess_times=False) as (container, file):
            stream = video_stream(container, path)
            _fill(table, _packets(container, file, path), container.format.name, stream, path)
    if not table.pts:
        raise VideoError(path, "its video stream holds no frames")
    if table.first is None:
        raise VideoError(path, f"no frame can be decoded ({table.codec})")
    return table


def decode_packet(stream: av.VideoStream, packet: av.Packet | None) -> list[av.VideoFrame]:
    """Returns the frames that a packet completes. ``None`` drains the decoder. Raises av.FFmpegError."""
    return stream.codec_context.decode(packet)


def numbered_packets(packets: Iterator[av.Packet], stream: av.VideoStream) -> Iterator[tuple[int, av.Packet]]:
    """Yields (number, packet) of a stream's packets; the frames of a packet then carry its number as ``pts``.

    Decoders hand ``pts`` through to the frame, whatever order they put frames out in.
    """
    number = 0
    for packet in packets:
        if (
            packet.stream_index == stream.index and packet.size
        ):  # the mark at the end of a stream has no bytes
            packet.pts, packet.dts = number, None
            yield number, packet
            number += 1


def describe(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _describe_stream(container: av.container.InputContainer, stream: av.VideoStream) -> PacketTable:
    context = stream.codec_context
    raw = bool(container.format.flags & NO_TIMESTAMPS)
    rate = _raw_rate(context) if raw else stream.average_rate or stream.guessed_rate or None
    assert stream.time_base is not None, "every stream of an open file has one"
    table = PacketTable(
        stream_index=stream.index,
        codec=context.name,
        intra_only=bool(context.codec.intra_only),
        reorders=bool(context.codec.reorder),
        raw=raw,
        discontinuous=bool(container.format.flags & DISCONTINUOUS),
        continues=container.format.name == "flv" or container.format.name not in _SIGNATURE_BYTES,
        time_base=stream.time_base,
        pixel_aspect=stream.sample_aspect_ratio or None,
        rate=rate,
        promised_s=None,
    )
    if raw:
        return table
    if container.start_time is not None:
        table.starts_s = container.start_time / av.time_base
    if stream.duration:
        table.promised_s = float(stream.duration * stream.time_base)
    elif (tagged := _tagged_duration_s(stream)) is not None:
        table.promised_s, table.promise_from_zero = tagged, True
    elif container.duration:
        table.promised_s, table.promise_of_all = container.duration / av.time_base, True
    return table


def _raw_rate(context: av.VideoCodecContext) -> Fraction | None:
    """The rate in the headers of a raw stream. Its demuxer claims 25 fps, and nothing else knows better.

    Headers may state a clock in its place: H.261 and H.263 always do, and H.264 of a variable rate does.
    """
    rate = context.framerate or None
    is_clock = context.name in _CLOCK_CODECS or (rate is not None and rate > _MOST_RAW_FPS)
    return None if is_clock else rate


def _fill(
    table: PacketTable, packets: Iterator[av.Packet], format_name: str, stream: av.VideoStream, path: Path
) -> None:
    last = newest = 0
    for packet in packets:
        last = max(last, packet.pos or 0)
        clock = packet.pts if packet.pts is not None else packet.dts
        if clock is not None and packet.time_base:
            ends_s = float((clock + (packet.duration or 0)) * packet.time_base)
            table.furthest_s = max(table.furthest_s, ends_s)
        if packet.stream_index != stream.index:
            continue
        number = len(table.pts)
        table.pts.append(packet.pts)
        table.dts.append(packet.dts)
        table.durations.append(packet.duration or 0)
        table.keys.append(packet.is_keyframe)
        table.shown.append(not packet.is_discard and not _is_header(packet, table.codec))
        if number and packet.has_sidedata("new_extradata"):
            table.headers.append(number)
        if number == 0 and table.codec == "mpeg4":
            headers = (stream.codec_context.extradata or b"") + bytes(packet)
            table.packed = _PACKED.search(headers) is not None
        if table.first is None or _order_is_open(table, stream):
            packet.pts, packet.dts = number, None
            newest = _decode_start(table, stream, packet, newest)
    if table.first is None:
        _decode_start(table, stream, None, newest)
    _check_tail(path, format_name, last)


def _is_header(packet: av.Packet, codec: str) -> bool:
    """Whether a packet is a header of Theora: streams that were joined repeat theirs among the frames."""
    return codec == "theora" and bytes(packet)[1:7] == b"theora"


def _order_is_open(table: PacketTable, stream: av.VideoStream) -> bool:
    """Whether frames may come out of order although the times of their packets, so far, only increase.

    Some files hold decoding times in the place of presentation times. A few more frames are decoded then.
    """
    if len(table.pts) > _ORDER_PACKETS or not stream.codec_context.has_b_frames or table.disordered:
        return False
    known = [pts for pts in table.pts if pts is not None]
    return len(known) == len(table.pts) and all(a < b for a, b in pairwise(known))


def _decode_start(table: PacketTable, stream: av.VideoStream, packet: av.Packet | None, newest: int) -> int:
    with contextlib.suppress(av.FFmpegError, ValueError):  # damaged, or the middle of a group of pictures
        for frame in decode_packet(stream, packet):
            number = frame.pts or 0
            if table.first is None:
                table.first, table.first_packet = frame, number
            table.disordered |= number < newest
            newest = max(newest, number)
    return newest


def _packets(container: av.container.InputContainer, file: WatchedFile, path: Path) -> Iterator[av.Packet]:
    count = 0
    # A file that breaks off raises here. The caller decides whether the packets before that suffice.
    with contextlib.suppress(av.FFmpegError, EOFError):
        for packet in container.demux():
            file.found_packet()
            if packet.size == 0:
                continue  # the mark at the end of each stream
            count += 1
            if count > MAX_PACKETS:
                raise VideoError(path, f"more than {MAX_PACKETS:,} packets")
            yield packet
    if file.gave_up:
        raise VideoError(path, f"corrupt: {file.gap}")


def _tagged_duration_s(stream: av.VideoStream) -> float | None:
    """Matroska keeps the duration of a stream as a tag: "00:01:02.345000000"."""
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", "").strip())
    return None if tag is None else int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])


def _check_tail(path: Path, format_name: str, last: int) -> None:
    """Raises VideoError if a second file was appended that the demuxer does not read.

    The demuxers of MPEG, Matroska, Ogg and AVI read on when files were joined byte by byte. Those of MP4,
    FLV, ASF and others stop after the first file, and the rest would be lost in silence. ``last``: where the
    last packet begins.
    """
    with path.open("rb") as file:
        if format_name.startswith("mov"):
            joined = top_boxes(path).count(b"moov") > 1
        elif format_name in _SIGNATURE_BYTES:
            signature = file.read(_SIGNATURE_BYTES[format_name])
            # NUT's demuxer takes the second file for packets of the first.
            begin = len(signature) if format_name == "nut" else max(len(signature), last - _TAIL_MARGIN)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = len(content) if format_name == "nut" else begin + _TAIL_BYTES
                joined = last > 0 and content.find(signature, begin, end) >= 0
        else:
            return
    if joined:
        raise VideoError(
            path, "several files joined byte by byte, of which only the first can be read: join them anew"
        )
