"""The largest video that a budget allows: a bound that is known before any video is opened.

The plan of a run reserves memory by it, and vLLM is started for prompts of this length. A test holds it to
``data.budget.plan``, which decides about a video.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from video_opd.config.sections import VideoConfig

# qwen-vl-utils: a frame pair may cost this much more than its floor before the total is looked at.
FLOOR_SLACK = 1.05
# The bound holds for frames whose long side is at most this many times the short one; the widest screens are
# 32:9. If the budget keeps min_frame_tokens, more elongated frames may take any number of tokens.
MOST_ELONGATED = 3.6
# "<12.3 seconds>" and the two markers around a pair: each digit of the whole seconds is a token more.
_STAMP_TOKENS_BESIDE_SECONDS = 7
_DIGITS_OF_ANY_VIDEO = 5  # 99,999 seconds are 27 hours


@dataclass(frozen=True, kw_only=True)
class LargestVideo:
    """What the largest video takes: ``LargestVideo(tokens=8192, pairs=384, stamp_tokens=4608)``."""

    tokens: int  # of all its frame pairs
    pairs: int
    stamp_tokens: int  # of the time stamps before the pairs, with the markers around these

    @property
    def prompt_tokens(self) -> int:
        """The tokens of the video and of its time stamps."""
        return self.tokens + self.stamp_tokens


def largest_video(video: VideoConfig, longest_s: float = math.inf) -> LargestVideo:
    """The bounds for videos of at most ``longest_s`` seconds (inf: of any length) within a budget.

    They hold for frames that are not more elongated than ``MOST_ELONGATED``.
    """
    least, most = math.ceil(video.min_frames / 2), video.max_frames // 2
    wanted = math.ceil(min(longest_s * video.fps, video.max_frames) / 2)
    pairs = min(max(wanted, least), most)
    usual = max(
        min(pairs * video.max_frame_tokens, video.max_video_tokens),
        FLOOR_SLACK * pairs * video.min_frame_tokens,
    )
    # A short side that shrinks to less than a token is one token: such a pair has at most MOST_ELONGATED,
    # fewer than any pair that grows.
    tokens = math.floor(max(usual, pairs * _grown_tokens(video.min_frame_tokens)))
    if video.keep == "max_video_tokens":
        tokens, pairs = min(tokens, video.max_video_tokens), min(pairs, video.max_video_tokens)
    digits = _DIGITS_OF_ANY_VIDEO if math.isinf(longest_s) else len(str(int(longest_s + 0.05)))
    stamp = _STAMP_TOKENS_BESIDE_SECONDS + digits
    return LargestVideo(tokens=tokens, pairs=pairs, stamp_tokens=pairs * stamp)


def _grown_tokens(floor: int) -> int:
    """The most tokens of a pair of small frames, which grow to ``floor`` tokens.

    Both sides are then rounded up, and floating-point errors may add one to a side that is whole. A short
    side that becomes ``short`` tokens was longer than ``short - 1``, so the long side was below
    ``floor / (short - 1)``.
    """
    widest = math.sqrt(floor * MOST_ELONGATED)
    return max(
        short * (math.floor(min(widest, floor / (short - 1))) + 1)
        for short in range(2, math.isqrt(floor) + 2)
    )
