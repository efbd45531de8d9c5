"""Cuts a clip out of a video into a file of its own, exact to a frame.

A cut without encoding can begin only at a keyframe, which may be seconds away from the requested frame.
Therefore the frames are decoded and encoded again (as H.264, and the sound as AAC). Each frame keeps its own
time, so a variable frame rate stays variable.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace

from video_opd.data.decode import IndexMismatch, decode_frames, refusing_colours
from video_opd.data.demux import VideoError, describe, open_container
from video_opd.data.index import PacketIndex, read_index
from video_opd.data.orientation import Orientation, orientation_of
from video_opd.errors import UserError
from video_opd.files import replacing_file
from video_opd.progress import log
from video_opd.temporal import Interval

CRF = "18"  # x264's quality setting; the clip hardly differs visibly from its source
CLOCK_HZ = 90_000  # time base of the clip, fine enough for any frame rate
# Sample rates that are kept. Sound with another rate is resampled to the first of these.
AAC_HZ = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)
RGB_MATRIX = 0  # matrix_coefficients of ITU-T H.273 that says: no matrix, the planes are G, B and R
PREROLL_S = 1.0  # a sound decoder needs the packets shortly before the first wanted sample, too
JITTER_S = (
    0.005  # a smaller gap between sound frames is rounding: a container's clock is coarser than a sample
)


def cut_clip(video: str | Path, span: Interval, out: str | Path) -> Interval:
    """Writes the part of ``video`` in ``span`` (seconds from its first frame) to the MP4 file ``out``.

    Each end of the span is moved to the nearest border between two frames, and at least one frame is kept.
    The sound is cut at the same borders, exact to a sample. ``out`` appears only when it is complete.

    Returns the span that was written. Raises :class:`VideoError` if the video cannot be used, and
    :class:`UserError` if ``out`` cannot be written.
    """
    video, out = Path(video), Path(out)
    check_target(video, out)
    try:
        return _cut(video, read_index(video), span, out)
    except IndexMismatch:
        return _cut(video, read_index(video, decode=True), span, out)


def _cut(video: Path, index: PacketIndex, span: Interval, out: Path) -> Interval:
    first, stop = nearest_frames(index, span)
    borders_s = _borders_s(index)
    with replacing_file(out) as temporary:  # PyAV, too, raises an OSError if the disk fails
        _write(video, index, first, stop, temporary)
    return float(borders_s[first]), float(borders_s[stop])


def check_target(video: Path, out: Path) -> None:
    """Raises :class:`UserError` if ``out`` cannot hold a clip, or if PyAV is too old to write one."""
    if not hasattr(av.VideoStream, "set_display_matrix"):
        raise UserError(
            f"cutting a clip needs PyAV 17.1 or newer, and {av.__version__} is installed: update av"
        )
    if out.suffix.lower() != ".mp4":
        raise UserError(f"{out}: a clip is written as MP4; name a file that ends in .mp4")
    if out.is_dir():
        raise UserError(f"{out}: this is a folder; name a file that ends in .mp4")
    if os.path.exists(out) and os.path.exists(video) and out.samefile(video):
        raise UserError(f"{out}: this is the video itself; name another file for the clip")


def nearest_frames(index: PacketIndex, span: Interval) -> tuple[int, int]:
    """Returns the half-open range of frames whose borders are nearest to ``span``; it has a frame or more."""
    borders_s = _borders_s(index)
    first = min(int(np.abs(borders_s - span[0]).argmin()), len(borders_s) - 2)
    stop = max(int(np.abs(borders_s - span[1]).argmin()), first + 1)
    return first, stop


def _borders_s(index: PacketIndex) -> np.ndarray:
    return np.append(index.frame_times_s_T, index.end_s)


def _write(video: Path, index: PacketIndex, first: int, stop: int, out: Path) -> None:
    borders_s = _borders_s(index)
    start_s, end_s = float(borders_s[first]), float(borders_s[stop])
    ticks = np.round((borders_s[first : stop + 1] - start_s) * CLOCK_HZ).astype(np.int64)
    decoded = decode_frames(video, index, np.arange(first, stop))
    _, frame = next(decoded, (first, None))
    if frame is None:
        raise VideoError(video, "corrupt: none of the frames of the clip can be decoded")
    with av.open(str(out), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        with refusing_colours(video):
            picture = _picture_stream(container, frame, index.pixel_aspect)
        sound = _Sound(container, video, origin_s=index.origin_s, span=(start_s, end_s))
        # A frame that cannot be decoded is left out, and the frame before it is shown for longer.
        number = first
        for following, after in itertools.chain(decoded, [(stop, None)]):
            with refusing_colours(video):
                shown = frame.reformat(picture.width, picture.height, "yuv420p")
            shown.pts, shown.time_base = int(ticks[number - first]), Fraction(1, CLOCK_HZ)
            shown.pict_type = av.video.frame.PictureType.NONE  # x264 chooses the keyframes
            container.mux(_lasting(picture.encode(shown), int(ticks[-1])))
            sound.write_until(float(borders_s[number]))
            if after is not None:
                number, frame = following, after
        container.mux(_lasting(picture.encode(None), int(ticks[-1])))
        sound.write_until(end_s)


def _lasting(packets: list[av.Packet], end: int) -> list[av.Packet]:
    """Lets each packet last until ``end``. The muxer then ends all but the last at the start of the next."""
    for packet in packets:
        assert packet.pts is not None
        packet.duration = end - packet.pts
    return packets


def _picture_stream(
    container: av.container.OutputContainer, like: av.VideoFrame, pixel_aspect: Fraction | None
) -> av.VideoStream:
    """Adds a stream with the rotation, colours and size of ``like``, and pixels of the given shape.

    An odd height or width loses one row or column, because 4:2:0 subsampling needs even sides.
    """
    # Without B-frames the packets are in presentation order, so that the file ends exactly at the span's end.
    stream = container.add_stream("libx264", options={"crf": CRF, "bf": "0"})
    assert isinstance(stream, av.VideoStream)
    stream.width, stream.height = max(2, like.width // 2 * 2), max(2, like.height // 2 * 2)
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    stream.time_base = context.time_base = Fraction(1, CLOCK_HZ)
    shown = like.reformat(format="yuv420p")
    # Pictures in RGB become YUV by FFmpeg's usual matrix; a player would take a stream marked as RGB for RGB.
    matrix = Colorspace.ITU601 if shown.colorspace == RGB_MATRIX else shown.colorspace
    context.color_range, context.colorspace = shown.color_range, int(matrix)
    if pixel_aspect is not None:
        context.sample_aspect_ratio = pixel_aspect
    context.color_primaries, context.color_trc = shown.color_primaries, shown.color_trc
    if (orientation := orientation_of(like)) != Orientation():
        stream.set_display_matrix(orientation.matrix(stream.height, stream.width))
    return stream


class _Sound:
    """Writes the sound of a span piece by piece, so that the file holds each piece near its pictures."""

    def __init__(
        self, container: av.container.OutputContainer, video: Path, *, origin_s: float | None, span: Interval
    ) -> None:
        """``origin_s`` is the first frame's time on the clock that sound and pictures share, or None if the
        file has no such clock; the clip is then silent."""
        self.container, self.span = container, span
        self.pieces = _sound_pieces(video, origin_s, span)
        self.next = next(self.pieces, None)
        self.written = 0  # samples of sound so far
        self.rate = 1
        self.stream: av.AudioStream | None = None
        if self.next is not None:  # some players fail on a track without samples
            samples_CN, self.rate = self.next
            layout = "mono" if len(samples_CN) == 1 else "stereo"
            self.stream = container.add_stream("aac", rate=self.rate, layout=layout)

    def write_until(self, time_s: float) -> None:
        """Writes the sound up to ``time_s`` of the video, and all of the rest once that is the span's end."""
        if self.stream is None:
            return
        while self.next is not None and self.span[0] + self.written / self.rate <= time_s:
            samples_CN, _ = self.next
            layout = "mono" if len(samples_CN) == 1 else "stereo"
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples_CN), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = self.rate, self.written, Fraction(1, self.rate)
            self.container.mux(self.stream.encode(frame))
            self.written += samples_CN.shape[1]
            self.next = next(self.pieces, None)
        if time_s >= self.span[1]:
            self.container.mux(self.stream.encode(None))
            self.stream = None


def _sound_pieces(video: Path, origin_s: float | None, span: Interval) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (float32 [C, N], rate in Hz) from the start of ``span`` on, without a gap; C is 1 or 2.

    Gaps in the file become silence, and more than two channels are mixed down to two. A file without a sound
    stream yields nothing.
    """
    with open_container(video) as container:
        if not container.streams.audio:
            return
        if origin_s is None:
            log(
                f"{video}: its clock starts again, so sound cannot be matched to pictures; the clip is silent"
            )
            return
        stream = max(container.streams.audio, key=_preference)  # the first of equals
        rate = stream.rate if stream.rate in AAC_HZ else AAC_HZ[0]
        layout = "mono" if stream.channels == 1 else "stereo"
        total = round((span[1] - span[0]) * rate)
        position = 0
        assert stream.time_base is not None
        with contextlib.suppress(av.FFmpegError):  # a container that cannot seek is decoded from its start
            earlier_s = max(0.0, origin_s + span[0] - PREROLL_S)
            container.seek(int(earlier_s / stream.time_base), stream=stream)
        for frame in _resampled(_audio_frames(container, stream, video), layout, rate):
            if frame.pts is None or frame.time_base is None:
                continue
            samples_CN = frame.to_ndarray()
            at = round((float(frame.pts * frame.time_base) - origin_s - span[0]) * rate)
            if position and abs(at - position) <= JITTER_S * rate:
                at = position
            if at + samples_CN.shape[1] <= position:
                continue
            if at > position:
                silence = np.zeros((len(samples_CN), min(at, total) - position), dtype=np.float32)
                samples_CN, at = np.concatenate([silence, samples_CN], axis=1), position
            samples_CN = samples_CN[:, position - at :][:, : total - position]
            if samples_CN.shape[1]:
                position += samples_CN.shape[1]
                yield samples_CN.astype(np.float32, copy=False), rate
            if position >= total:
                return


def _resampled(frames: Iterator[av.AudioFrame], layout: str, rate: int) -> Iterator[av.AudioFrame]:
    """The frames as float32 in one layout and at one rate.

    A broadcast may change both between two frames, and a resampler takes one kind of frame only.
    """
    for _, alike in itertools.groupby(frames, lambda f: (f.format.name, f.layout.name, f.sample_rate)):
        resampler = av.AudioResampler("fltp", layout, rate)
        for frame in itertools.chain(alike, [None]):  # None asks for the samples that it still holds
            yield from (resampled for resampled in resampler.resample(frame) if resampled is not None)


def _preference(stream: av.AudioStream) -> tuple[bool, int]:
    """Players play the default stream, else the one with most channels."""
    return bool(stream.disposition & av.stream.Disposition.default), stream.channels


def _audio_frames(
    container: av.container.InputContainer, stream: av.AudioStream, video: Path
) -> Iterator[av.AudioFrame]:
    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        log(f"{video}: its sound cannot be read to the end ({describe(error)}); the rest is silent")
