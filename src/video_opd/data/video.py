"""Turns a video file into a :class:`Clip`, or into windows of it.

At a constant rate, evenly spread frame *numbers* are chosen, as qwen-vl-utils does. At a variable rate, the
frames nearest to evenly spread *times* are chosen. A rate counts as variable as soon as frame number ÷ mean
rate is more than half a frame off for any frame. Times are presentation times, counted from the first frame.

Frames are decoded one by one and resized at once, so memory holds the chosen frames, resized, and one more.
Only the packets from a keyframe to a chosen frame are decoded.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from video_opd.config import VideoConfig
from video_opd.data.budget import PAIR, nearest_indices, plan, plan_frames, uniform_indices
from video_opd.data.decode import IndexMismatch, as_shown, decode_frames
from video_opd.data.demux import VideoError
from video_opd.data.index import PacketIndex, read_index
from video_opd.data.torchcodec import check_torchcodec, torchcodec_frames
from video_opd.errors import UserError
from video_opd.types import Clip

__all__ = [
    "BACKENDS",
    "VideoError",
    "VideoInfo",
    "Window",
    "check_windows",
    "clip_digest",
    "load_clip",
    "load_windows",
    "plan_windows",
    "probe",
]

BACKENDS = ("pyav", "torchcodec")
# A video counts as corrupt when more of its chosen frames than this cannot be decoded.
MAX_LOST_SHARE = 0.05
# A claimed rate this close to the measured one is used in its place, because other readers report it.
RATE_TOLERANCE = 0.005
TIME_ROUNDING = 1e-6  # seconds; sums of floats are not exact
MAX_WINDOWS = 100_000  # of a video: more are a slip of the overlap


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Frame times, rate and size of a video. ``T``: all its frames, in display order."""

    path: Path
    times_s: np.ndarray  # float64 [T], presentation times from the first frame
    duration_s: float  # until the last frame stops being shown
    fps: float  # mean rate
    variable_rate: bool
    size_px: tuple[int, int]  # (height, width) as shown: turned as the file says
    codec: str
    late_s: float  # how much later than the file, or its sound, its pictures begin

    @property
    def frame_count(self) -> int:
        return len(self.times_s)


def probe(path: str | Path) -> VideoInfo:
    """Reads frame times, rate and size of a video. Raises VideoError.

    Few frames are decoded, except in files that hold no presentation times: these are decoded as a whole.
    """
    path = Path(path)
    return _info(path, read_index(path))


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window of a video, as a clip of its own whose times count from ``start_s``.

    A window begins with its first frame, so its clip equals that of a video that was cut there. Example:
    ``Window(number=1, count=9, start_s=30.0, end_s=90.0, clip=…, thinned=False)``, whose clip lasts 60 s.
    """

    number: int  # position in time, from 0
    count: int  # number of windows of the video
    start_s: float  # presentation times in the video
    end_s: float
    clip: Clip
    thinned: bool  # whether the budget's bound on frames or tokens left fewer than its ``fps`` asks for


def load_clip(path: str | Path, budget: VideoConfig, backend: str = "pyav") -> Clip:
    """Decodes the frames that ``budget`` allows. Their number is even: the last is repeated if need be.

    Raises VideoError for a video that cannot be used: missing, empty, truncated, corrupt, without a video
    stream, frames or times. Raises UserError for a backend that is unknown or cannot be loaded.
    """
    return next(load_windows(path, budget, backend=backend)).clip


def load_windows(
    path: str | Path,
    budget: VideoConfig,
    window_s: float | None = None,
    overlap_s: float = 0.0,
    backend: str = "pyav",
) -> Iterator[Window]:
    """Yields windows of ``window_s`` seconds (None: the whole video), each with the frames ``budget`` allows.

    Neighbours overlap by ``overlap_s``; the last two overlap more where the duration is no multiple. A video
    that is not longer than ``window_s`` is one window. The file is decoded once, while the caller takes
    windows. Raises as :func:`load_clip` and :func:`check_windows` do.
    """
    check_windows(window_s, overlap_s)
    if backend not in BACKENDS:
        raise UserError(f"unknown video backend {backend!r}; choose one of: {', '.join(BACKENDS)}")
    if backend == "torchcodec":
        check_torchcodec()
    path = Path(path)
    index = read_index(path)
    count, done = None, 0
    while count != done:
        info = _info(path, index)
        ranges = plan_windows(info.times_s, info.duration_s, window_s, overlap_s)
        if count not in (None, len(ranges)):
            raise VideoError(path, "corrupt: its packets are not its frames; try it in shorter pieces")
        count = len(ranges)
        fillers = [
            _WindowFiller(info, budget, number, count, *ranges[number]) for number in range(done, count)
        ]
        wanted = np.unique(np.concatenate([filler.wanted for filler in fillers]))
        read = torchcodec_frames if backend == "torchcodec" else _pyav_frames
        try:
            for window in _fill_windows(fillers, read(path, index, wanted)):
                yield window
                done += 1
        except IndexMismatch:
            index = read_index(path, decode=True)


def check_windows(window_s: float | None, overlap_s: float, duration_s: float = 0.0) -> None:
    """Raises UserError for a window that is not longer than its overlap, and for more than ``MAX_WINDOWS``.

    ``window_s`` None is the whole video. Without its ``duration_s`` windows are not counted.
    """
    if window_s is None:
        return
    if not (math.isfinite(window_s) and 0 <= overlap_s < window_s):
        raise UserError(
            f"a window of {window_s:g} s with an overlap of {overlap_s:g} s: the window must be longer than "
            "the overlap, and the overlap 0 or more"
        )
    if duration_s - window_s > MAX_WINDOWS * (window_s - overlap_s):
        raise UserError(
            f"windows of {window_s} s with an overlap of {overlap_s} s: a video of {duration_s:.1f} s has "
            f"more than {MAX_WINDOWS:,} of them; choose longer windows or a smaller overlap"
        )


def _fill_windows(
    fillers: list[_WindowFiller], decoded: Iterator[tuple[int, np.ndarray]]
) -> Iterator[Window]:
    waiting = deque(fillers)
    for number, rgb in decoded:
        for filler in itertools.takewhile(lambda filler: filler.wanted[0] <= number, waiting):  # noqa: B023
            filler.take(number, rgb)
        while waiting and waiting[0].wanted[-1] <= number:
            yield waiting.popleft().window()
    for filler in waiting:  # their last frames are lost
        yield filler.window()


def plan_windows(
    times_s: np.ndarray, duration_s: float, window_s: float | None, overlap_s: float
) -> list[tuple[int, int]]:
    """Returns (first frame, first frame after) of each window. ``times_s`` [frame_count]: their times.

    Windows begin every ``window_s − overlap_s`` seconds. The last one begins so early that it is as long as
    the others. A window in which no frame begins is left out. Raises as :func:`check_windows` does.
    """
    check_windows(window_s, overlap_s, duration_s)
    if window_s is None or duration_s <= window_s:
        return [(0, len(times_s))]
    step_s = window_s - overlap_s
    last_s = duration_s - window_s
    starts_s = np.append(np.arange(math.ceil(last_s / step_s - TIME_ROUNDING)) * step_s, last_s)
    first = np.searchsorted(times_s, starts_s - TIME_ROUNDING)
    stop = np.searchsorted(times_s, starts_s + window_s - TIME_ROUNDING)
    found = [(int(a), int(b)) for a, b in zip(first, stop, strict=True) if a < b]
    return list(dict.fromkeys(found))


def clip_digest(frames: np.ndarray, times_s: np.ndarray) -> str:
    """Returns 32 hex digits (blake2b) of the frames' shape, bytes and times."""
    digest = hashlib.blake2b(repr(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(times_s, dtype="<f8").data)
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def _info(path: Path, index: PacketIndex) -> VideoInfo:
    times_s = index.frame_times_s_T
    assert (np.diff(times_s) > 0).all(), "an index holds increasing times"
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
        late_s=index.late_s,
    )


class _WindowFiller:
    """Collects the frames of a window, which spans the frame numbers from ``first`` to before ``stop``."""

    def __init__(
        self, info: VideoInfo, budget: VideoConfig, number: int, count: int, first: int, stop: int
    ) -> None:
        self.info, self.number, self.count = info, number, count
        whole = stop - first == info.frame_count
        self.start_s = float(info.times_s[first])
        self.end_s = float(info.times_s[stop]) if stop < info.frame_count else info.duration_s
        local = info.variable_rate and not whole  # the mean rate of the file says little about a window of it
        source_frames = stop - first
        fps = source_frames / (self.end_s - self.start_s) if local else info.fps
        self.plan = plan(source_frames, fps, *info.size_px, budget)
        unbounded = budget.changed(max_frames=max(source_frames, budget.min_frames))
        self.thinned = self.plan.n_frames < plan_frames(source_frames, fps, unbounded)
        self.wanted = first + _choose(info, info.times_s[first:stop], self.plan.n_frames)
        self.frames: np.ndarray | None = None
        self.kept: list[int] = []

    def take(self, number: int, rgb: np.ndarray) -> None:
        """Keeps the frame if the window wants it. Frames come in display order."""
        place = np.searchsorted(self.wanted, number)
        if place == len(self.wanted) or self.wanted[place] != number:
            return
        if self.frames is None:
            size = (len(self.wanted), self.plan.height_px, self.plan.width_px, 3)
            self.frames = np.empty(size, dtype=np.uint8)
        self.frames[len(self.kept)] = _resize(rgb, self.plan.height_px, self.plan.width_px)
        self.kept.append(number)

    def window(self) -> Window:
        """Returns the window. Raises VideoError if too many of its frames did not come."""
        path, lost = self.info.path, len(self.wanted) - len(self.kept)
        if self.frames is None:
            raise VideoError(path, "corrupt: none of its frames can be decoded")
        if lost > MAX_LOST_SHARE * len(self.wanted):
            raise VideoError(path, f"corrupt: {lost} of {len(self.wanted)} chosen frames cannot be decoded")
        frames, kept = self.frames[: len(self.kept)], np.array(self.kept, dtype=np.int64)
        self.frames = None
        if len(kept) % PAIR:
            frames, kept = np.concatenate([frames, frames[-1:]]), np.append(kept, kept[-1])
        times_s = self.info.times_s[kept] - self.start_s
        clip = Clip(
            path=path,
            frames=frames,
            times_s=times_s,
            frame_indices=kept,
            source_fps=self.info.fps,
            duration_s=self.end_s - self.start_s,
            source_size_px=self.info.size_px,
            digest=clip_digest(frames, times_s),
        )
        return Window(
            number=self.number,
            count=self.count,
            start_s=self.start_s,
            end_s=self.end_s,
            clip=clip,
            thinned=self.thinned,
        )


def _choose(info: VideoInfo, times_s: np.ndarray, n_frames: int) -> np.ndarray:
    if info.variable_rate:
        return nearest_indices(times_s, n_frames)
    return np.unique(uniform_indices(len(times_s), n_frames))


def _pyav_frames(path: Path, index: PacketIndex, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for number, frame in decode_frames(path, index, wanted):
        yield number, as_shown(frame, path)


def _resize(rgb: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Resizes uint8 [h, w, 3] to uint8 [height_px, width_px, 3], as qwen-vl-utils does."""
    if rgb.shape[:2] == (height_px, width_px):
        return rgb
    import torch
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1).contiguous()
    image = resize(image, [height_px, width_px], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return image.permute(1, 2, 0).numpy()
