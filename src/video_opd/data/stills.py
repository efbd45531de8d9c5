"""Makes small JPEG pictures of a video's frames, as data URIs for HTML pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from video_opd.config import VideoConfig
from video_opd.data.video import load_clip

QUALITY = 80  # the JPEG encoder's setting, from 1 to 95


def stills(video: str | Path, count: int, frame_tokens: int = 60) -> list[tuple[float, str]]:
    """Returns (time in seconds, ``data:image/jpeg;base64,…``) for at most ``count`` evenly spread frames.

    A picture has at most ``frame_tokens`` cells of 32×32 px: 60 cells make about 330×185 px. Raises
    :class:`VideoError` if the video cannot be decoded.
    """
    budget = VideoConfig(
        min_frames=count,
        max_frames=count,
        min_frame_tokens=1,
        max_frame_tokens=frame_tokens,
        max_video_tokens=count * frame_tokens,
    )
    clip = load_clip(video, budget)
    # A clip with an odd number of frames repeats its last frame.
    _, first = np.unique(clip.frame_indices, return_index=True)
    return [(float(clip.times_s[i]), jpeg_uri(clip.frames[i])) for i in first]


def jpeg_uri(rgb: np.ndarray) -> str:
    """Encodes a picture (uint8 [H, W, 3]) as the data URI of a JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
