"""The bound for the largest video: no video within the budget exceeds it, and some come near."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import paper

from video_opd.config import PromptConfig, VideoConfig
from video_opd.config.largest_video import MOST_ELONGATED, largest_video
from video_opd.data.budget import ClipPlan, plan
from video_opd.data.encode import PromptEncoder
from video_opd.models.inference import TEXT_AND_RESPONSE_TOKENS, longest_tokens
from video_opd.planning.setup import TEXT_TOKENS, Work
from video_opd.types import Clip
from video_opd.world.tiny import build_processor

# Frames from 16 px to those of a large screen, upright and lying: small ones grow to the floor of tokens, and
# only these exceed it by much.
SHAPES = [
    shape
    for short in (16, 24, 33, 48, 64, 100, 144, 180, 240, 360, 720, 1080)
    for ratio in (1, 1.2, 4 / 3, 1.5, 1.6, 16 / 9, 2, 2.4, 3, 32 / 9, MOST_ELONGATED)
    for shape in ((short, math.floor(short * ratio)), (math.floor(short * ratio), short))
]
KEPT: tuple[Literal["max_video_tokens", "min_frame_tokens"], ...] = ("max_video_tokens", "min_frame_tokens")
RATE = 25.0


def planned(seconds: float, shape: tuple[int, int], budget: VideoConfig) -> ClipPlan:
    return plan(max(1, round(seconds * RATE)), RATE, *shape, budget)


BUDGETS = st.builds(
    lambda fps, frames, more, least, wider, tokens, keep: VideoConfig(
        fps=fps,
        min_frames=frames,
        max_frames=frames + more,
        min_frame_tokens=least,
        max_frame_tokens=least + wider,
        max_video_tokens=tokens,
        keep=keep,
    ),
    st.floats(0.25, 8),
    st.integers(2, 16),
    st.integers(0, 768),
    st.integers(1, 300),
    st.integers(0, 800),
    st.integers(8, 20_000),
    st.sampled_from(KEPT),
)
SIDES = st.tuples(st.integers(8, 2160), st.floats(1, MOST_ELONGATED), st.booleans()).map(
    lambda side: (side[0], math.floor(side[0] * side[1]))[:: -1 if side[2] else 1]
)


@settings(max_examples=1000)
@given(budget=BUDGETS, shape=SIDES, longest_s=st.floats(0.1, 4000), share=st.floats(0.01, 1))
def test_no_video_exceeds_the_bound(budget, shape, longest_s, share) -> None:
    made = planned(share * longest_s, shape, budget)
    for bound in (largest_video(budget, longest_s), largest_video(budget)):
        assert made.video_tokens <= bound.tokens and made.n_frames <= 2 * bound.pairs


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"min_frame_tokens": 4, "max_frame_tokens": 8}, {"min_frame_tokens": 16}, {"max_frames": 64},
        {"min_frame_tokens": 64, "max_video_tokens": 14_336}, {"max_frames": 7200}, {"max_frame_tokens": 128},
        {"max_video_tokens": 115_200},
    ],
)  # fmt: skip
@pytest.mark.parametrize("longest_s", [4.0, 30.0, 240.0, 3600.0])
def test_the_bound_is_not_wasteful(changes, longest_s) -> None:
    """Some video comes within 7% of it, or within 13% where a frame pair has no more than 20 tokens."""
    for keep in KEPT:
        budget = VideoConfig(keep=keep, **changes)
        bound = largest_video(budget, longest_s)
        found = [planned(longest_s, shape, budget) for shape in SHAPES]
        most = max(made.video_tokens for made in found)
        total = budget.max_video_tokens
        if keep == "min_frame_tokens" or bound.tokens < total:  # else the total is the bound
            assert most <= bound.tokens <= most * (1.07 if budget.min_frame_tokens > 20 else 1.13)
        assert max(made.n_frames for made in found) == 2 * bound.pairs


def test_the_bounds_of_the_papers_budget() -> None:
    bound = largest_video(VideoConfig())
    assert (bound.tokens, bound.pairs, bound.prompt_tokens) == (8192, 384, 8192 + 384 * 12)
    floor = largest_video(VideoConfig(keep="min_frame_tokens"))
    # Small frames of 4:3 take 10 × 14 tokens a pair, and those of 3:1 take 7 × 22.
    assert planned(3600.0, (240, 320), VideoConfig(keep="min_frame_tokens")).video_tokens == 384 * 140
    assert floor.tokens == 384 * 154


@pytest.mark.parametrize("form", ["release", "nested"])
@pytest.mark.parametrize("longest_s", [9.8, 99.8, 999.8, 9999.8, 99_999.8])
def test_a_stamp_takes_the_tokens_of_the_longest_time(form, longest_s) -> None:
    encoder = PromptEncoder(build_processor(), PromptConfig(video_form=form))

    def length(pairs: int) -> int:
        """The tokens of a prompt with so many pairs at the end of the video, without those of the frames."""
        clip = Clip(
            path=Path("v.mp4"),
            frames=np.zeros((2 * pairs, 32, 32, 3), dtype=np.uint8),
            times_s=np.full(2 * pairs, longest_s),
            frame_indices=np.arange(2 * pairs),
            source_fps=2.0,
            source_size_px=(32, 32),
            duration_s=longest_s,
            digest="0" * 16,
        )
        prompt = encoder.encode(clip, "q", "a")
        return prompt.length - prompt.video_tokens

    stamp = length(2) - length(1)
    bound, unknown = largest_video(VideoConfig(), longest_s), largest_video(VideoConfig())
    assert bound.stamp_tokens == stamp * bound.pairs
    assert unknown.stamp_tokens >= stamp * unknown.pairs


def test_vllm_and_the_plan_make_room_for_the_same_video() -> None:
    video = VideoConfig(keep="min_frame_tokens")
    work = Work.of(paper(video={"keep": "min_frame_tokens"}), None)
    # The plan assumes a video that fills the frames, 384 s, and vLLM one of any length.
    assert work.prompt_tokens == 384 * (154 + 10) + TEXT_TOKENS
    assert longest_tokens(video) == 384 * (154 + 12) + TEXT_AND_RESPONSE_TOKENS
