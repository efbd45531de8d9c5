"""Makes a few small JPEG pictures of a video, as data URIs for HTML pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from video_opd.config import VideoConfig
from video_opd.data.video import load_clip

QUALITY = 80  # of the JPEG encoder, 1 to 95


def stills(video: str | Path, count: int, frame_tokens: int = 60) -> list[tuple[float, str]]:
    """Returns (time in seconds, ``data:image/jpeg;base64,…``) of at most ``count`` frames, evenly spread.

    A picture has at most ``frame_tokens`` cells of 32×32 px: 60 cells are about 330×185 px. Raises VideoError
    for a video that cannot be decoded.
    """
    budget = VideoConfig(
        min_frames=count,
        max_frames=count,
        min_frame_tokens=1,
        max_frame_tokens=frame_tokens,
        max_video_tokens=count * frame_tokens,
    )
    clip = load_clip(video, budget)
    _, first = np.unique(
        clip.frame_indices, return_index=True
    )  # a clip of an odd number of frames repeats the last
    return [(float(clip.times_s[i]), jpeg_uri(clip.frames[i])) for i in first]


def jpeg_uri(rgb: np.ndarray) -> str:
    """Encodes a picture, uint8 [H, W, 3], as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
