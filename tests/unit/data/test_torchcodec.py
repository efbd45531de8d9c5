"""The backend torchcodec shows the frames that PyAV shows, or refuses the file.

The tests with the real library run where it is installed and finds FFmpeg's shared libraries.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from video_cases import decode_all, read_number, write_sizes, write_video

from video_opd.config import VideoConfig
from video_opd.data import torchcodec as backend
from video_opd.data.video import VideoError, load_clip, load_windows
from video_opd.errors import UserError

NATIVE = VideoConfig(min_frame_tokens=1)


def why_not() -> str:
    """Why the real library cannot be used here, or an empty string."""
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return ""


real = pytest.mark.skipif(bool(why_not()), reason=f"torchcodec cannot be loaded: {why_not()}")


@real
@pytest.mark.parametrize(
    ("suffix", "codec", "options", "more"),
    [
        (".mp4", "libx264", {"bf": "3", "g": "12"}, {}),
        (".mkv", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"}, {}),
        (".mp4", "libx264", {"bf": "2"}, {"times_s": np.cumsum(1 + np.arange(61) % 5) / 20}),
        (".webm", "libvpx-vp9", {"g": "9"}, {}),
        (".mp4", "libx264", {}, {"rotation": 90}),
        (".mp4", "libx264", {}, {"rotation": 180}),
    ],
)
def test_the_real_library_shows_the_same_frames(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], more: dict
) -> None:
    path = write_video(tmp_path / f"v{suffix}", 61, codec=codec, codec_options=options, **more)
    ours, theirs = load_clip(path, NATIVE), load_clip(path, NATIVE, backend="torchcodec")
    assert theirs.frame_indices.tolist() == ours.frame_indices.tolist()
    assert np.array_equal(theirs.times_s, ours.times_s)
    assert theirs.frames.shape == ours.frames.shape
    if "rotation" not in more:
        assert [read_number(frame) for frame in theirs.frames] == ours.frame_indices.tolist()
    assert np.abs(theirs.frames.astype(int) - ours.frames).mean() < 3  # another version of swscale


@real
def test_the_real_library_takes_the_same_stream_and_windows(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", 60, streams=2, default=1)
    ours = list(load_windows(path, NATIVE, 2.0, 1.0))
    theirs = list(load_windows(path, NATIVE, 2.0, 1.0, backend="torchcodec"))
    assert [read_number(w.clip.frames[0]) for w in theirs] == [read_number(w.clip.frames[0]) for w in ours]
    assert read_number(theirs[0].clip.frames[0]) == 1000  # the second stream counts from there
    path = write_sizes(tmp_path / "sizes.mkv", 20, (32, 64, 96))
    assert read_number(load_clip(path, NATIVE, backend="torchcodec").frames[0]) == 96  # and the third


@real
@pytest.mark.parametrize(
    ("suffix", "codec", "more"),
    [
        (".mp4", "libx264", {"matrix": (-1, 0, 0, 1)}),
        (".avi", "libx264", {"codec_options": {"bf": "2"}}),
        (".mpg", "mpeg2video", {"codec_options": {"bf": "2"}}),
        (".ts", "libx264", {"codec_options": {"g": "10", "bf": "2"}}),
        (".h264", "libx264", {}),
    ],
)
def test_the_real_library_is_never_trusted_with_other_times(
    tmp_path: Path, suffix: str, codec: str, more: dict
) -> None:
    """Either the file is refused, or each frame is that of its time."""
    path = write_video(tmp_path / f"v{suffix}", 61, codec=codec, **more)
    try:
        clip = load_clip(path, NATIVE, backend="torchcodec")
    except VideoError as error:
        assert "torchcodec" in error.reason
    else:
        assert [read_number(frame) for frame in clip.frames] == np.round(clip.times_s * 10).tolist()


class Stand:
    """torchcodec's interface on frames that are given to it."""

    def __init__(self, frames: np.ndarray, times_s: np.ndarray) -> None:
        self.frames, self.times_s = frames, times_s

    def __len__(self) -> int:
        return len(self.frames)

    def get_frame_at(self, index: int) -> types.SimpleNamespace:
        data = torch.from_numpy(self.frames[index])
        return types.SimpleNamespace(data=data, pts_seconds=float(self.times_s[index]))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stand], None]:
    def install(decoder: Stand) -> None:
        decoders = types.ModuleType("torchcodec.decoders")
        decoders.VideoDecoder = lambda source, **options: decoder  # type: ignore[attr-defined]
        package = types.ModuleType("torchcodec")
        package.__spec__ = types.SimpleNamespace(name="torchcodec")  # type: ignore[assignment]
        package.decoders = decoders  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchcodec", package)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)

    return install


def test_torchcodec_is_asked_for_the_same_frames(tmp_path: Path, stand_in: Callable[[Stand], None]) -> None:
    path = write_video(tmp_path / "v.mp4", 30)
    stand_in(Stand(*decode_all(path)))
    assert load_clip(path, NATIVE, backend="torchcodec").digest == load_clip(path, NATIVE).digest


def test_a_file_that_torchcodec_counts_or_times_otherwise_is_refused(
    tmp_path: Path, stand_in: Callable[[Stand], None]
) -> None:
    path = write_video(tmp_path / "v.mp4", 30)
    frames, times_s = decode_all(path)
    stand_in(Stand(frames[1:], times_s[1:]))
    with pytest.raises(VideoError, match="counts 29 frames, not 30; choose pyav"):
        load_clip(path, NATIVE, backend="torchcodec")
    late_s = times_s.copy()
    late_s[-1] += 0.1
    stand_in(Stand(frames, late_s))
    with pytest.raises(VideoError, match=r"frame 29 at 3\.000 s, not at 2\.900 s; choose pyav"):
        load_clip(path, NATIVE, backend="torchcodec")


def test_torchcodec_that_is_missing_or_broken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "v.mp4", 8)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        load_clip(path, NATIVE, backend="torchcodec")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    broken = tmp_path / "packages" / "torchcodec"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec.\\nmore')")
    monkeypatch.syspath_prepend(str(broken.parent))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        UserError, match=r"cannot be loaded \(Could not load libtorchcodec\.\); install FFmpeg"
    ):
        load_clip(path, NATIVE, backend="torchcodec")
