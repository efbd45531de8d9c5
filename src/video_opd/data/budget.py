"""Plans how many frames of a video a model sees, and how large they are.

A video token is 32×32 px of a *pair* of frames (patch 16 × merge 2; temporal patch 2). Frames and sizes are
those of qwen-vl-utils 0.0.14 (``smart_nframes``, ``smart_resize``) wherever these keep the bound of tokens a
video. On long or elongated videos, the library's floor of tokens a pair breaks that bound. The bound is hard
here (unless ``keep`` is ``min_frame_tokens``: then the size is the library's for any video), and the first of
these that keeps it is taken:

1. the library's size;
2. the same shape without the floor, at least one cell (32×32 px) a side;
3. the smallest size of that shape (short side one cell) and fewer frames, evenly spread.

Defaults are the paper's (sec. 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from video_opd.config import VideoConfig
from video_opd.config.largest_video import FLOOR_SLACK

VideoBudget = VideoConfig  # the former name of the settings; scripts import it from here
CELL_PX = 32  # side of a video token
PAIR = 2  # frames that a temporal patch merges


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """The frames that are taken of a video: ``n_frames`` (even), each ``height_px`` × ``width_px``."""

    n_frames: int
    height_px: int
    width_px: int

    @property
    def video_tokens(self) -> int:
        return count_tokens(self.n_frames, self.height_px, self.width_px)


def count_tokens(n_frames: int, height_px: int, width_px: int) -> int:
    """Video tokens of ``n_frames`` frames; an odd last frame is a pair with itself."""
    return -(-n_frames // PAIR) * (height_px // CELL_PX) * (width_px // CELL_PX)


def plan(frame_count: int, source_fps: float, height_px: int, width_px: int, budget: VideoConfig) -> ClipPlan:
    """Plans frames and size for a video of ``frame_count`` frames at a mean rate of ``source_fps``.

    ``video_tokens`` of the plan is at most ``budget.max_video_tokens``, for any input, unless the budget
    keeps ``min_frame_tokens`` instead.
    """
    n_frames = plan_frames(frame_count, source_fps, budget)
    if not _fits(n_frames, _library_cells(n_frames, height_px, width_px, budget), budget):
        most_pairs = max(1, budget.max_video_tokens // _smallest_cells(height_px, width_px))
        n_frames = min(n_frames, most_pairs * PAIR)
    height, width = plan_size(n_frames, height_px, width_px, budget)
    return ClipPlan(n_frames=n_frames, height_px=height, width_px=width)


def plan_frames(frame_count: int, source_fps: float, budget: VideoConfig) -> int:
    """Returns how many frames to take before the bound of tokens a video is applied: an even number.

    This is qwen-vl-utils' ``smart_nframes``. It refuses a video of one frame; here that frame is taken twice.
    """
    assert frame_count >= 1 and source_fps > 0
    if frame_count < PAIR:
        return PAIR
    least = math.ceil(budget.min_frames / PAIR) * PAIR
    most = budget.max_frames // PAIR * PAIR
    wanted = frame_count / source_fps * budget.fps
    return math.floor(min(max(wanted, least), most, frame_count) / PAIR) * PAIR


def plan_size(n_frames: int, height_px: int, width_px: int, budget: VideoConfig) -> tuple[int, int]:
    """Returns (height, width) in px, multiples of 32, of each of ``n_frames`` frames.

    The size keeps the bound of tokens a video for as many frames as :func:`plan` allows. The aspect ratio is
    given up only where nothing else is left.
    """
    assert n_frames >= 1 and height_px >= 1 and width_px >= 1
    height, width = _library_cells(n_frames, height_px, width_px, budget)
    if not _fits(n_frames, (height, width), budget):
        pairs = -(-n_frames // PAIR)
        cap = max(1, min(budget.max_frame_tokens, budget.max_video_tokens // pairs))
        height, width = _fit_cells(height_px, width_px, cap)
    return max(1, height) * CELL_PX, max(1, width) * CELL_PX


def uniform_indices(frame_count: int, n_frames: int) -> np.ndarray:
    """Returns evenly spread frame numbers, first and last included: int64 [n_frames].

    This is ``torch.linspace(0, frame_count − 1, n_frames).round()`` in float32, exactly as qwen-vl-utils
    computes it. A video of one frame gives that frame ``n_frames`` times.
    """
    if frame_count == 1:
        return np.zeros(n_frames, dtype=np.int64)
    import torch  # imported here because planning alone needs no torch

    return torch.linspace(0, frame_count - 1, n_frames).round().long().numpy()


def nearest_indices(times_s: np.ndarray, n_frames: int) -> np.ndarray:
    """Returns the frames nearest to evenly spread times, none twice: int64 [≤ n_frames].

    This is the choice for variable frame rates. ``times_s`` [frame_count] is increasing. Where the source
    stands still, fewer frames are taken; the same frame is not taken again under another time.
    """
    targets_s = np.linspace(times_s[0], times_s[-1], n_frames)
    right = np.clip(np.searchsorted(times_s, targets_s), 1, max(1, len(times_s) - 1))
    right = np.minimum(right, len(times_s) - 1)
    left = np.maximum(right - 1, 0)
    nearer_left = targets_s - times_s[left] <= times_s[right] - targets_s
    return np.unique(np.where(nearer_left, left, right)).astype(np.int64)


def _library_cells(n_frames: int, height_px: int, width_px: int, budget: VideoConfig) -> tuple[int, int]:
    """The size in cells that qwen-vl-utils' ``fetch_video`` and ``smart_resize`` compute; a side may be 0."""
    area_px = CELL_PX * CELL_PX
    min_px = budget.min_frame_tokens * area_px
    share_px = budget.max_video_tokens * area_px / n_frames * PAIR
    max_px = max(min(budget.max_frame_tokens * area_px, share_px), int(min_px * FLOOR_SLACK))
    height = max(1, round(height_px / CELL_PX))
    width = max(1, round(width_px / CELL_PX))
    if height * width * area_px > max_px:
        shrink = math.sqrt(height_px * width_px / max_px)
        return math.floor(height_px / shrink / CELL_PX), math.floor(width_px / shrink / CELL_PX)
    if height * width * area_px < min_px:
        grow = math.sqrt(min_px / (height_px * width_px))
        return math.ceil(height_px * grow / CELL_PX), math.ceil(width_px * grow / CELL_PX)
    return height, width


def _fits(n_frames: int, cells: tuple[int, int], budget: VideoConfig) -> bool:
    height, width = cells
    if budget.keep == "min_frame_tokens":
        return True
    return min(cells) >= 1 and -(-n_frames // PAIR) * height * width <= budget.max_video_tokens


def _fit_cells(height_px: int, width_px: int, cap: int) -> tuple[int, int]:
    """The largest size of about this shape that has at most ``cap`` cells, and at least one cell a side."""
    height, width = max(1, round(height_px / CELL_PX)), max(1, round(width_px / CELL_PX))
    if height * width > cap:
        shrink = math.sqrt(height_px * width_px / (cap * CELL_PX * CELL_PX))
        height = math.floor(height_px / shrink / CELL_PX)
        width = math.floor(width_px / shrink / CELL_PX)
    if height < 1:
        return 1, min(cap, max(1, round(width_px / height_px)))
    if width < 1:
        return min(cap, max(1, round(height_px / width_px))), 1
    return height, width


def _smallest_cells(height_px: int, width_px: int) -> int:
    """Cells of the smallest frame of this shape: the short side is one cell."""
    return max(1, round(max(height_px, width_px) / min(height_px, width_px)))
