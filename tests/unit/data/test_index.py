"""When frames are shown, where a file says so only in part: worked out from made-up packets."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_opd.data import index
from video_opd.data.demux import PacketTable, VideoError


def table(
    pts: list[int | None], dts: list[int | None], *, keys: list[bool] | None = None, mpeg: bool = False
) -> PacketTable:
    """Packets of a stream whose clock ticks 25 times a second."""
    count = len(pts)
    return PacketTable(
        stream_index=0,
        codec="h264",
        intra_only=False,
        reorders=True,
        raw=False,
        discontinuous=mpeg,
        continues=True,
        pixel_aspect=None,
        time_base=Fraction(1, 25),
        rate=Fraction(25),
        promised_s=None,
        pts=pts,
        dts=dts,
        durations=[1] * count,
        keys=keys or [True] + [False] * (count - 1),
        shown=[True] * count,
    )


@given(
    groups=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    gaps=st.lists(st.integers(1, 40), min_size=60, max_size=60),
)
def test_decoding_times_of_an_encoder_give_back_the_times_of_display(
    groups: list[int], gaps: list[int]
) -> None:
    """An encoder with 3 B-frames at most, the middle one a reference, writes its k-th packet at the time of
    the (k − 2)-th frame. ``groups``: the B-frames before each P-frame; ``gaps``: ticks between frames.
    """
    decoded = [0]
    for b_frames in groups:
        first = max(decoded) + 1
        middle = [first + b_frames // 2] if b_frames else []
        others = [n for n in range(first, first + b_frames) if n not in middle]
        decoded += [first + b_frames, *middle, *others]  # frame numbers in the order of decoding
    count = len(decoded)
    shown = np.cumsum([2, *gaps[: count - 1]])  # ticks
    dts = [shown[0] - 2, shown[0] - 1, *shown][:count]
    packets = np.argsort(decoded)  # the packet of each frame
    found = index._by_decoding_times(table([None] * count, [int(d) for d in dts]), packets, delay=2)
    assert found is not None
    if decoded == sorted(decoded):  # without B-frames nobody can tell, and frames keep the times of packets
        assert found * 25 == pytest.approx(np.array(dts, dtype=float))
    else:  # the file does not hold the times of the last two frames
        offset = found[0] * 25 - shown[0]
        assert found[: count - 2] * 25 - offset == pytest.approx(shown[: count - 2])
    assert (np.diff(found) > 0).all()


@given(
    step=st.integers(2, 12),
    count=st.integers(40, 120),
    late=st.integers(2, 4),
    gap=st.integers(0, 1),
)
def test_a_time_that_was_given_to_the_picture_before_is_found_out(
    step: int, count: int, late: int, gap: int
) -> None:
    """Every ``step``-th frame is timed, and the time of one belongs to the frame two places later."""
    known = np.arange(count) % step == 0
    times_s = np.arange(count) / 25
    wrong = times_s.copy()
    anchors = np.flatnonzero(known)
    if late < len(anchors) - 1:
        wrong[anchors[late]] += 2 / 25
    found = index._between_anchors(table([None] * count, [None] * count), wrong, known, Path("v.mpg"))
    assert found is not None and found == pytest.approx(times_s)


def test_a_gap_among_untimed_frames_is_refused_and_one_before_a_timed_frame_is_not() -> None:
    known = np.arange(60) % 6 == 0
    times_s = np.where(np.arange(60) < 33, 0.0, 1.0) + np.arange(60) / 25
    with pytest.raises(VideoError, match="a gap between frames that are not timed one by one"):
        index._between_anchors(table([None] * 60, [None] * 60), times_s, known, Path("v.mpg"))
    known[32:34] = True  # the frames on either side of the gap
    found = index._between_anchors(table([None] * 60, [None] * 60), times_s, known, Path("v.mpg"))
    assert found == pytest.approx(times_s)


@pytest.mark.parametrize(
    ("pts", "dts", "keys", "segments"),
    [
        ([0, 3, 1, 2, 6, 4, 5], None, [0], [7]),  # B-frames are no restart
        ([0, 3, 1, 2, 0, 3, 1, 2], None, [0, 4], [4, 4]),
        ([0, 3, 1, 2, 0, 3, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3], [0, 4], [4, 4]),
        ([0, 3, 1, 2, 6, 4, 5], None, [0, 2, 4], [7]),  # a B-frame that is marked as a keyframe
        ([0, 1, 2, 3], [0, 1, 1, 3], [0], [4]),
        ([0, 1, 2, 3], [0, 2, 1, 3], [0], [4]),  # times that are rounded
        ([*range(80), *range(40)], None, [0], [80, 40]),  # without a keyframe
        ([*range(40), *range(5000, 5040)], [*range(40), *range(5000, 5040)], [0], [80]),
    ],
)  # fmt: skip
def test_where_a_clock_starts_again(
    pts: list[int | None], dts: list[int | None] | None, keys: list[int], segments: list[int]
) -> None:
    marks = [n in keys for n in range(len(pts))]
    found = index._segments(table(pts, dts or [None] * len(pts), keys=marks))
    assert np.bincount(found).tolist() == segments


def test_an_mpeg_clock_that_jumps_ahead_goes_on() -> None:
    """Ten seconds, as ffmpeg has it; in a file of a frame every ten seconds, that is no jump."""
    jump: list[int | None] = [*range(40), *range(5000, 5040)]
    assert np.bincount(index._segments(table(jump, jump, mpeg=True))).tolist() == [40, 40]
    pause: list[int | None] = [*range(40), *range(200, 240)]
    assert np.bincount(index._segments(table(pause, pause, mpeg=True))).tolist() == [80]
    slides: list[int | None] = [*range(0, 10_000, 260)]
    assert np.bincount(index._segments(table(slides, slides, mpeg=True))).tolist() == [len(slides)]
