"""Frames and sizes: the library's where its floor keeps the total bound, the bound everywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.config import VideoConfig, read_settings
from video_opd.data.budget import (
    count_tokens,
    nearest_indices,
    plan,
    plan_frames,
    plan_size,
    uniform_indices,
)
from video_opd.errors import UserError

library = pytest.importorskip("qwen_vl_utils.vision_process")
library.logger.disabled = True  # it warns of every short video
PAPER = VideoConfig()


def library_frames(count: int, fps: float, budget: VideoConfig) -> int:
    settings = {"fps": budget.fps, "min_frames": budget.min_frames, "max_frames": budget.max_frames}
    return library.smart_nframes(settings, total_frames=count, video_fps=fps)


def library_size(n_frames: int, height: int, width: int, budget: VideoConfig) -> tuple[int, int]:
    """``fetch_video``'s own size for such frames, watched at the moment it resizes."""
    area = 32 * 32
    min_px = budget.min_frame_tokens * area
    share = budget.max_video_tokens * area / n_frames * 2
    max_px = max(min(budget.max_frame_tokens * area, share), int(min_px * 1.05))
    return library.smart_resize(height, width, factor=32, min_pixels=min_px, max_pixels=max_px)


def fits(n_frames: int, size: tuple[int, int], budget: VideoConfig) -> bool:
    return min(size) >= 32 and count_tokens(n_frames, *size) <= budget.max_video_tokens


def test_the_formula_of_this_file_is_what_the_library_does(monkeypatch):
    """``fetch_video`` itself, through a reader that hands it frames."""
    import torch

    for n_frames, height, width in [(4, 48, 64), (20, 90, 160), (60, 36, 64)]:
        video = torch.zeros(n_frames, 3, height, width, dtype=torch.uint8)
        monkeypatch.setitem(library.VIDEO_READER_BACKENDS, "torchvision", lambda ele, v=video: (v, {}, 2.0))
        monkeypatch.setattr(library, "get_video_reader_backend", lambda: "torchvision")
        ele = {"video": "x", "total_pixels": PAPER.max_video_tokens * 32 * 32}
        out = library.fetch_video(ele, image_patch_size=16)
        assert tuple(out.shape[-2:]) == library_size(n_frames, height, width, PAPER)


def test_frame_counts_equal_the_librarys_over_a_grid():
    for count, fps in itertools.product(
        [2, 3, 4, 5, 9, 50, 335, 1000, 9999, 324_000], [1, 9.53, 23.976, 30, 120]
    ):
        assert plan_frames(count, fps, PAPER) == library_frames(count, fps, PAPER), (count, fps)


@given(
    count=st.integers(2, 400_000),
    fps=st.floats(0.5, 240),
    least=st.integers(2, 16),
    most=st.integers(16, 1024),
    rate=st.floats(0.25, 8),
)
def test_frame_counts_equal_the_librarys(count, fps, least, most, rate):
    budget = VideoConfig(fps=rate, min_frames=least, max_frames=most)
    assert plan_frames(count, fps, budget) == library_frames(count, fps, budget)


def test_one_frame_becomes_a_pair():
    assert plan_frames(1, 25.0, PAPER) == 2
    assert uniform_indices(1, 2).tolist() == [0, 0]


def test_sizes_equal_the_librarys_wherever_they_fit_over_a_grid():
    equal = other = 0
    sizes = [(360, 640), (240, 320), (1080, 1920), (1920, 1080), (224, 398), (64, 64), (100, 1000), (31, 33)]
    for n_frames, (height, width) in itertools.product([2, 4, 16, 70, 128, 150, 300, 500, 768], sizes):
        theirs = library_size(n_frames, height, width, PAPER)
        ours = plan_size(n_frames, height, width, PAPER)
        if fits(n_frames, theirs, PAPER):
            assert ours == theirs, (n_frames, height, width)
            equal += 1
        else:
            other += 1
            assert fits(n_frames, ours, PAPER), (n_frames, height, width)
    assert equal > 20 and other > 20  # the grid has both


SIDES = st.tuples(st.integers(16, 4320), st.floats(0.1, 10)).map(
    lambda p: (p[0], max(1, round(p[0] * p[1])))
)  # 1:10 to 10:1
BUDGETS = st.builds(
    lambda least, more, total: VideoConfig(
        min_frames=2, min_frame_tokens=least, max_frame_tokens=least + more, max_video_tokens=total
    ),
    st.integers(1, 256),
    st.integers(0, 800),
    st.integers(1, 16_384),
)


@settings(max_examples=300)
@given(size=SIDES, duration_s=st.floats(2, 3 * 3600), fps=st.floats(1, 120), budget=BUDGETS | st.just(PAPER))
def test_the_total_is_a_hard_bound_and_the_library_is_followed_below_it(size, duration_s, fps, budget):
    count = max(1, int(duration_s * fps))
    made = plan(count, fps, size[0], size[1], budget)
    assert 1 <= made.video_tokens <= budget.max_video_tokens
    assert made.n_frames % 2 == 0 and made.height_px % 32 == 0 and made.width_px % 32 == 0
    n_frames = library_frames(count, fps, budget)
    assert made.n_frames <= n_frames
    theirs = library_size(n_frames, size[0], size[1], budget)
    if fits(n_frames, theirs, budget):
        assert (made.n_frames, made.height_px, made.width_px) == (n_frames, *theirs)


@settings(max_examples=300)
@given(size=SIDES, duration_s=st.floats(2, 3 * 3600), fps=st.floats(1, 120), budget=BUDGETS | st.just(PAPER))
def test_the_library_is_followed_everywhere_where_its_floor_is_kept(size, duration_s, fps, budget):
    count = max(2, int(duration_s * fps))
    made = plan(count, fps, size[0], size[1], budget.changed(keep="min_frame_tokens"))
    n_frames = library_frames(count, fps, budget)
    height, width = library_size(n_frames, size[0], size[1], budget)
    # The library lets the short side of an elongated frame go to nothing.
    assert (made.n_frames, made.height_px, made.width_px) == (n_frames, max(32, height), max(32, width))


def test_the_librarys_floor_breaks_the_total_of_a_long_video():
    budget = VideoConfig(min_frame_tokens=64, max_video_tokens=14_336, keep="min_frame_tokens")
    # 1,200 frames are cut to 768: 384 pairs of 640 × 360 px, at most 1.05 · 64 tokens each.
    made = plan(600 * 30, 30.0, 360, 640, budget)
    assert (made.n_frames, made.height_px, made.width_px) == (768, *library_size(768, 360, 640, budget))
    assert made.video_tokens > 14_336
    assert plan(600 * 30, 30.0, 360, 640, budget.changed(keep="max_video_tokens")).video_tokens <= 14_336


@given(size=SIDES, n_frames=st.integers(2, 768))
def test_frames_are_thinned_only_when_the_smallest_size_is_too_much(size, n_frames):
    ratio = max(size) / min(size)
    made = plan(n_frames, 2.0, size[0], size[1], PAPER)
    if -(-n_frames // 2) * (ratio + 0.5) <= PAPER.max_video_tokens:
        assert made.n_frames == n_frames // 2 * 2


@given(size=SIDES, n_frames=st.integers(64, 768))
def test_a_frame_keeps_its_shape_when_the_floor_gives_way(size, n_frames):
    height, width = plan_size(n_frames, size[0], size[1], PAPER)
    cells = (height // 32, width // 32)
    # One cell is the grain: the exact shape lies within one cell of the chosen one on the longer side.
    true, long = size[1] / size[0], max(cells)
    if min(cells) > 2 and long > 2:
        assert (cells[1] - 1) / (cells[0] + 1) <= true <= (cells[1] + 1) / (cells[0] - 1)


def test_long_and_elongated_videos_are_thinned_evenly():
    budget = VideoConfig(max_video_tokens=1000)
    made = plan(3 * 3600 * 30, 30.0, 100, 1000, budget)  # 10:1 for three hours
    assert (made.height_px, made.width_px) == (32, 320) and made.n_frames == 200
    gaps = np.diff(uniform_indices(3 * 3600 * 30, made.n_frames))
    assert gaps.max() - gaps.min() <= 1


@given(count=st.integers(2, 400_000), n_frames=st.integers(2, 768))
def test_frame_numbers_are_the_librarys(count, n_frames):
    import torch

    n_frames = min(n_frames, count) // 2 * 2
    theirs = torch.linspace(0, count - 1, n_frames).round().long()
    assert uniform_indices(count, n_frames).tolist() == theirs.tolist()


@given(
    gaps=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=60),
    n_frames=st.integers(2, 40),
)
def test_nearest_frames_are_the_nearest(gaps, n_frames):
    times_s = np.concatenate([[0.0], np.cumsum(gaps)])
    chosen = nearest_indices(times_s, n_frames)
    targets = np.linspace(0, times_s[-1], n_frames)
    assert (np.diff(chosen) > 0).all()
    for target in targets:  # by brute force
        distance = np.abs(times_s - target)
        assert np.abs(times_s[chosen] - target).min() == pytest.approx(distance.min(), abs=1e-9)
    for frame in chosen:
        distances = np.abs(times_s[:, None] - targets)
        assert np.isclose(distances[frame], distances.min(axis=0)).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0}, {"fps": float("nan")}, {"fps": float("inf")}, {"max_frames": 1},
        {"min_frame_tokens": 0}, {"min_frame_tokens": 9, "max_frame_tokens": 8}, {"max_video_tokens": 0},
    ],
)  # fmt: skip
def test_an_impossible_budget_is_refused(wrong):
    with pytest.raises(UserError):
        read_settings(VideoConfig, wrong)


def test_the_former_name_of_the_settings_still_works() -> None:
    from video_opd.data.budget import VideoBudget

    assert VideoBudget is VideoConfig
