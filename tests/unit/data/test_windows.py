"""A long video in windows: which stretches, which frames, and that each is a clip like any other."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_cases import read_number, write_video

from video_opd.config import VideoConfig
from video_opd.data import decode
from video_opd.data.video import VideoError, load_clip, load_windows, plan_windows
from video_opd.errors import UserError

NATIVE = VideoConfig(min_frame_tokens=1)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(
        tmp_path_factory.mktemp("windows") / "v.mp4", 250, fps=10.0, codec_options={"g": "12"}
    )  # 25 s


def test_windows_by_hand(video: Path) -> None:
    """25 s in windows of 10 s that overlap by 4 s: every 6 s, the last one shifted to the end."""
    windows = list(load_windows(video, NATIVE, 10.0, 4.0))
    assert [(w.start_s, w.end_s) for w in windows] == [
        pytest.approx(span, abs=1e-6) for span in ((0, 10), (6, 16), (12, 22), (15, 25))
    ]
    assert [(w.number, w.count) for w in windows] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_a_window_is_the_clip_of_a_video_that_was_cut_there(video: Path, tmp_path: Path) -> None:
    """Frames 60 to 159 alone in a file: the same frame choice and times, and numbers 60 less."""
    alone = write_video(tmp_path / "alone.mp4", 100, fps=10.0)
    window = list(load_windows(video, NATIVE, 10.0, 4.0))[1]
    expected = load_clip(alone, NATIVE)
    assert window.clip.duration_s == pytest.approx(expected.duration_s)
    assert window.clip.frame_indices.tolist() == (60 + expected.frame_indices).tolist()
    np.testing.assert_allclose(window.clip.times_s, expected.times_s, atol=1e-9)
    assert [read_number(frame) for frame in window.clip.frames] == window.clip.frame_indices.tolist()
    assert window.clip.source_fps == expected.source_fps and len(window.clip.times_s) == 20


@pytest.mark.parametrize("window_s", [None, 25.0, 100.0])
def test_one_window_is_the_whole_video(video: Path, window_s: float | None) -> None:
    (window,) = load_windows(video, NATIVE, window_s)
    clip = load_clip(video, NATIVE)
    assert (window.start_s, window.end_s, window.count) == (0.0, clip.duration_s, 1)
    assert window.clip.digest == clip.digest
    assert window.clip.frame_indices.tolist() == clip.frame_indices.tolist()


def test_frames_that_windows_share_are_decoded_once(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []
    plain = decode.decode_packet

    def counted(stream: av.VideoStream, packet: av.Packet | None) -> list[av.VideoFrame]:
        fed.append(packet is not None)
        return plain(stream, packet)

    monkeypatch.setattr(decode, "decode_packet", counted)
    assert len(list(load_windows(video, NATIVE, 10.0, 9.0))) == 16
    assert sum(fed) <= 250


def test_memory_is_that_of_the_windows_that_are_open(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 600, codec_options={"g": "10", "preset": "ultrafast"})
    dense = VideoConfig(fps=10.0, min_frame_tokens=1)
    tracemalloc.start()
    for window in load_windows(path, dense, 3.0):
        assert len(window.clip.frames) == 30
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * 64 * 192 * 3 / 4


def test_a_variable_rate_is_sampled_at_the_times_of_each_window(tmp_path: Path) -> None:
    """Ten frames in the first five seconds, a hundred in the next: each window gets two a second."""
    times_s = np.concatenate([np.arange(10) / 2, 5 + np.arange(100) / 20])
    path = write_video(tmp_path / "v.mkv", 110, times_s=times_s)
    first, second, *_ = load_windows(path, NATIVE, 5.0)
    assert first.clip.frame_indices.tolist() == list(range(10))
    assert second.start_s == pytest.approx(5.0, abs=1e-3) and second.clip.times_s[0] == 0.0
    assert len(second.clip.times_s) == 10
    assert np.diff(second.clip.times_s) == pytest.approx(np.full(9, 4.95 / 9), abs=0.06)


def test_a_still_longer_than_a_window_is_skipped() -> None:
    times_s = np.array([0.0, 0.5, 1.0, 9.0, 9.5])  # nothing new for eight seconds
    assert plan_windows(times_s, 10.0, 2.0, 0.0) == [(0, 3), (3, 5)]


@given(
    count=st.integers(1, 400),
    fps=st.sampled_from([0.5, 1.0, 3.0, 10000 / 1049, 24.0, 30000 / 1001]),
    window_s=st.floats(0.5, 60),
    share=st.floats(0, 0.9),
)
def test_windows_cover_every_frame_and_overlap_as_asked(
    count: int, fps: float, window_s: float, share: float
) -> None:
    times_s = np.arange(count) / fps
    duration_s = count / fps
    ranges = plan_windows(times_s, duration_s, window_s, share * window_s)
    assert set().union(*(range(a, b) for a, b in ranges)) == set(range(count))
    assert ranges == sorted(ranges) and len(set(ranges)) == len(ranges)
    ends_s = np.append(times_s, duration_s)
    assert all(ends_s[b] - ends_s[a] < max(window_s, 1 / fps) + 1 / fps for a, b in ranges)
    for (_, stop), (start, _) in pairwise(ranges):
        assert ends_s[stop] - ends_s[start] > share * window_s - 2 / fps - 1e-6


@pytest.mark.parametrize(
    "window", [(5.0, 5.0), (5.0, 6.0), (0.0, 0.0), (-1.0, 0.0), (5.0, -1.0), (np.inf, 0.0)]
)
def test_impossible_windows_are_user_errors(video: Path, window: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="longer than the overlap"):
        next(load_windows(video, NATIVE, *window))


def test_too_many_windows_are_refused() -> None:
    """They would fill the memory before the first one is decoded."""
    times_s = np.arange(1000) / 10
    assert len(plan_windows(times_s, 100.0, 10.0, 9.9)) == 901
    with pytest.raises(UserError, match=r"overlap of 9\.9999999 s: .* has more than 100,000"):
        plan_windows(times_s, 100.0, 10.0, 9.9999999)


def test_a_broken_video_is_an_error_in_windows_too(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"not a video")
    with pytest.raises(VideoError):
        next(load_windows(tmp_path / "v.mp4", NATIVE, 5.0))
