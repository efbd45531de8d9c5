"""A clip holds exactly the frames and the sound that were asked for."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from places import REAL
from video_cases import numbered_frame, numbers_and_times, write_sound, write_video

from video_opd.data.video import VideoError, probe
from video_opd.errors import UserError
from video_opd.grounding.cut import cut_clip

HZ = 44_100


def write_film(
    path: Path,
    seconds: int,
    *,
    fps: int = 10,
    delay_s: float = 0.0,
    begins_s: float = 0.0,
    layout: str = "stereo",
    hz: int = HZ,
    b_frames: int = 2,
) -> Path:
    """Numbered frames, and a tone that is 200 Hz higher every second; the sound begins ``delay_s`` late.

    The file's clock shows ``begins_s`` where the sound would begin without delay, and at the first frame.
    ``hz`` is the sample rate.
    """
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=fps, options={"g": "50", "bf": str(b_frames)})
        sound = container.add_stream("aac", rate=hz, layout=layout)
        assert isinstance(picture, av.VideoStream)
        picture.height, picture.width, picture.pix_fmt = 64, 192, "yuv420p"
        for number in range(seconds * fps):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 64, 192), format="rgb24")
            frame.pts, frame.time_base = number + round(begins_s * fps), Fraction(1, fps)
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        t = np.arange(seconds * hz) / hz
        frequency = 200.0 * (1 + np.floor(t))
        wave = (0.5 * np.sin(2 * np.pi * np.cumsum(frequency) / hz)).astype(np.float32)
        for start in range(0, len(wave), 1024):
            chunk = np.stack([wave[start : start + 1024]] * (1 if layout == "mono" else 2))
            heard = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk), format="fltp", layout=layout)
            heard.sample_rate, heard.time_base = hz, Fraction(1, hz)
            heard.pts = start + round((begins_s + delay_s) * hz)
            container.mux(sound.encode(heard))
        container.mux(sound.encode(None))
    return path


def sound_of(path: Path) -> tuple[np.ndarray, int]:
    """float32 [N] of the left channel from time 0 on, and the rate."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        pieces = [(f.pts or 0, f.to_ndarray()[0]) for f in container.decode(audio=0)]
    wave = np.zeros(max(pts + len(x) for pts, x in pieces), dtype=np.float32)
    for pts, x in pieces:
        wave[max(pts, 0) : pts + len(x)] = x[max(-pts, 0) :]
    return wave, rate


def pitch(wave: np.ndarray, rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax()) * rate / len(wave)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("cut") / "film.mp4", 8)


def test_a_clip_begins_and_ends_at_the_frame_that_was_asked_for(film: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "clip.mp4"
    assert cut_clip(film, (2.3, 5.7), out) == pytest.approx((2.3, 5.7))
    numbers, times_s = numbers_and_times(out)
    assert numbers == list(range(23, 57))
    assert times_s == pytest.approx(np.arange(34) / 10, abs=1e-4)
    info = probe(out)
    assert (info.codec, info.size_px, info.duration_s) == ("h264", (64, 192), pytest.approx(3.4, abs=1e-4))
    assert [p.name for p in out.parent.iterdir()] == ["clip.mp4"]  # no half file is left


def test_the_sound_of_a_clip_is_that_of_its_pictures(film: Path, tmp_path: Path) -> None:
    cut_clip(film, (2.5, 5.5), tmp_path / "clip.mp4")
    wave, rate = sound_of(tmp_path / "clip.mp4")
    assert rate == HZ and len(wave) / rate == pytest.approx(3.0, abs=1024 / HZ)
    # 600 Hz until second 3 of the film, 800 and 1000 for a second each, then 1200
    for start_s, end_s, hz in ((0.05, 0.45, 600), (0.55, 1.45, 800), (1.55, 2.45, 1000), (2.55, 2.95, 1200)):
        assert pitch(wave[round(start_s * rate) : round(end_s * rate)], rate) == pytest.approx(hz, abs=4)


@pytest.mark.parametrize("suffix", [".avi", ".ts", ".flv", ".mov"])
def test_sound_stays_with_its_pictures_in_other_containers(tmp_path: Path, suffix: str) -> None:
    """An AVI holds no presentation times: its pictures are decoded two frames before they are shown."""
    film = write_film(tmp_path / f"film{suffix}", 4)
    cut_clip(film, (1.0, 3.0), tmp_path / "clip.mp4")
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == list(range(10, 30))
    wave, rate = sound_of(tmp_path / "clip.mp4")
    changes = np.arange(round(0.5 * rate), round(1.5 * rate), 64)
    levels = [pitch(wave[at : at + 2048], rate) for at in changes]  # 400 Hz, then 600 Hz from second 1 on
    change_s = (changes[int(np.argmax(np.array(levels) > 500))] + 1024) / rate
    assert change_s == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_sound_is_cut(tmp_path: Path, default: int) -> None:
    video = tmp_path / "two.mkv"
    with av.open(str(video), "w") as container:
        picture = container.add_stream("libx264", rate=10)
        assert isinstance(picture, av.VideoStream)
        picture.height, picture.width, picture.pix_fmt = 64, 192, "yuv420p"
        sounds = [container.add_stream("aac", rate=HZ, layout="mono") for _ in range(2)]
        for place, sound in enumerate(sounds):
            marks = av.stream.Disposition
            sound.disposition = marks.default if place == default else marks(0)
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 64, 192), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        for hz, sound in zip((300, 700), sounds, strict=True):
            wave = (0.5 * np.sin(2 * np.pi * hz * np.arange(3 * HZ) / HZ)).astype(np.float32)
            for start in range(0, len(wave), 1024):
                heard = av.AudioFrame.from_ndarray(
                    wave[None, start : start + 1024], format="fltp", layout="mono"
                )
                heard.sample_rate, heard.pts, heard.time_base = HZ, start, Fraction(1, HZ)
                container.mux(sound.encode(heard))
            container.mux(sound.encode(None))
    cut_clip(video, (1.0, 2.0), tmp_path / "clip.mp4")
    wave, rate = sound_of(tmp_path / "clip.mp4")
    assert pitch(wave, rate) == pytest.approx((300, 700)[default], abs=4)


def test_a_clip_of_joined_recordings_is_silent_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = write_film(tmp_path / "film.ts", 2)
    film.write_bytes(film.read_bytes() * 2)
    cut_clip(film, (1.5, 2.5), tmp_path / "clip.mp4")
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == [*range(15, 20), *range(5)]
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert not container.streams.audio
    assert "its clock starts again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"layout": "stereo"}, {"layout": "mono"}),
        ({"layout": "mono"}, {"layout": "stereo"}),
        ({"hz": 48_000}, {"hz": 32_000}),
        ({"hz": 24_000}, {"hz": 48_000}),
    ],
)
def test_sound_whose_layout_or_rate_changes_is_cut_whole(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """As between a film and the advertisements of a broadcast."""
    film = write_film(tmp_path / "film.ts", 3, b_frames=0, **before)
    more = write_film(tmp_path / "more.ts", 3, b_frames=0, begins_s=3.0, **after)
    film.write_bytes(film.read_bytes() + more.read_bytes())
    cut_clip(film, (1.0, 5.0), tmp_path / "clip.mp4")
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == [*range(10, 30), *range(20)]
    wave, rate = sound_of(tmp_path / "clip.mp4")
    assert len(wave) / rate == pytest.approx(4.0, abs=1024 / rate)
    for second, hz in enumerate((400, 600, 200, 400)):
        part = wave[round((second + 0.1) * rate) : round((second + 0.9) * rate)]
        assert pitch(part, rate) == pytest.approx(hz, abs=4)


def test_sound_that_begins_later_than_the_clip_stays_where_it_was(tmp_path: Path) -> None:
    film = write_film(tmp_path / "late.mkv", 4, delay_s=1.5)
    cut_clip(film, (1.0, 3.0), tmp_path / "clip.mp4")
    wave, rate = sound_of(tmp_path / "clip.mp4")
    assert np.abs(wave[: round(0.45 * rate)]).max() < 0.02
    assert pitch(wave[round(0.55 * rate) : round(1.45 * rate)], rate) == pytest.approx(200, abs=4)
    assert pitch(wave[round(1.55 * rate) : round(1.95 * rate)], rate) == pytest.approx(400, abs=6)


@pytest.mark.parametrize("delay_s", [-2.0, 0.0])
def test_a_film_whose_clock_does_not_begin_at_zero(tmp_path: Path, delay_s: float) -> None:
    """As recordings of broadcasts have it; and sound that begins before the first picture."""
    film = write_film(tmp_path / "late.mkv", 6, begins_s=3.0, delay_s=delay_s)
    cut_clip(film, (1.0, 3.0), tmp_path / "clip.mp4")
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == list(range(10, 30))
    wave, rate = sound_of(tmp_path / "clip.mp4")
    first_hz = 200 * (2 - delay_s)  # a second after the first picture
    assert pitch(wave[round(0.05 * rate) : round(0.95 * rate)], rate) == pytest.approx(first_hz, abs=4)
    assert pitch(wave[round(1.05 * rate) : round(1.95 * rate)], rate) == pytest.approx(first_hz + 200, abs=4)


def test_a_silent_video_has_a_silent_clip(tmp_path: Path) -> None:
    cut_clip(write_video(tmp_path / "v.mp4", 30), (1.0, 2.0), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert not container.streams.audio
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == list(range(10, 20))


@pytest.mark.parametrize(
    ("span", "numbers"),
    [
        ((1.04, 1.96), range(10, 20)),  # to the nearest border, either way
        ((1.06, 2.04), range(11, 20)),
        ((0.0, 99.0), range(0, 30)),
        ((2.99, 3.0), range(29, 30)),
        ((1.01, 1.02), range(10, 11)),  # one frame at least
        ((3.0, 3.0), range(29, 30)),
    ],
)
def test_ends_go_to_the_nearest_border_between_frames(
    tmp_path: Path, span: tuple[float, float], numbers: range
) -> None:
    video = write_video(tmp_path / "v.mp4", 30)
    written = cut_clip(video, span, tmp_path / "clip.mp4")
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == list(numbers)
    assert written == pytest.approx((numbers.start / 10, numbers.stop / 10))
    assert probe(tmp_path / "clip.mp4").duration_s == pytest.approx(len(numbers) / 10, abs=1e-4)


def test_a_variable_rate_keeps_its_times(tmp_path: Path) -> None:
    times_s = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.2, size=60))
    times_s -= times_s[0]
    video = write_video(tmp_path / "v.mp4", 60, times_s=times_s)
    cut_clip(video, (float(times_s[17]), float(times_s[41])), tmp_path / "clip.mp4")
    numbers, clip_s = numbers_and_times(tmp_path / "clip.mp4")
    assert numbers == list(range(17, 41))
    assert clip_s == pytest.approx(times_s[17:41] - times_s[17], abs=1e-4)
    assert probe(tmp_path / "clip.mp4").duration_s == pytest.approx(times_s[41] - times_s[17], abs=1e-4)


@pytest.mark.parametrize(
    ("suffix", "codec", "size"),
    [
        (".avi", "mpeg4", (64, 192)),
        (".webm", "libvpx", (64, 192)),
        (".avi", "mjpeg", (64, 192)),
        (".mkv", "ffv1", (63, 191)),
    ],
)
def test_other_codecs_and_odd_sizes(tmp_path: Path, suffix: str, codec: str, size: tuple[int, int]) -> None:
    video = write_video(tmp_path / f"v{suffix}", 30, codec=codec, size=size)
    cut_clip(video, (0.5, 2.0), tmp_path / "clip.mp4")
    assert numbers_and_times(tmp_path / "clip.mp4")[0] == list(range(5, 20))
    assert probe(tmp_path / "clip.mp4").size_px == (size[0] // 2 * 2, size[1] // 2 * 2)
    with av.open(str(video)) as a, av.open(str(tmp_path / "clip.mp4")) as b:
        source = list(a.decode(video=0))[5].to_ndarray(format="rgb24")
        clip = next(b.decode(video=0)).to_ndarray(format="rgb24")
    height, width = clip.shape[:2]
    assert np.abs(source[:height, :width].mean((0, 1)) - clip.mean((0, 1))).max() < 3  # black is black


def test_a_turned_video_stays_turned(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", 20, rotation=90)
    cut_clip(video, (0.5, 1.5), tmp_path / "clip.mp4")
    assert probe(tmp_path / "clip.mp4").size_px == probe(video).size_px == (192, 64)
    with av.open(str(video)) as a, av.open(str(tmp_path / "clip.mp4")) as b:
        assert next(a.decode(video=0)).rotation == next(b.decode(video=0)).rotation != 0


def test_pixels_that_are_not_square_keep_their_shape(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", 20, pixel_aspect=Fraction(16, 11))
    cut_clip(video, (0.5, 1.5), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 11)


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_a_clip_of_a_video_in_rgb_is_not_marked_as_rgb(tmp_path: Path, suffix: str) -> None:
    """Its pictures are YUV, and a player would show these as RGB: green and violet."""
    video = write_video(tmp_path / f"v{suffix}", 20, codec="libx264rgb")
    cut_clip(video, (0.5, 1.5), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == Colorspace.ITU601


def test_what_cannot_be_cut(film: Path, tmp_path: Path) -> None:
    for out, message in ((tmp_path / "clip.webm", r"ends in \.mp4"), (film, "video itself")):
        with pytest.raises(UserError, match=message):
            cut_clip(film, (1.0, 2.0), out)
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(UserError, match="folder"):
        cut_clip(film, (1.0, 2.0), tmp_path / "d.mp4")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        cut_clip(film, (1.0, 2.0), tmp_path / "file" / "clip.mp4")
    with pytest.raises(VideoError, match="no video stream"):
        cut_clip(write_sound(tmp_path / "s.m4a"), (1.0, 2.0), tmp_path / "clip.mp4")
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.skipif(not (REAL / "OHOFG.mp4").exists(), reason="the real videos are not here")
def test_a_real_video(tmp_path: Path) -> None:
    """9.53 fps and sound: the first frame is nearest to the source's at that time."""
    source = REAL / "OHOFG.mp4"
    start_s, end_s = cut_clip(source, (22.3, 33.0), tmp_path / "clip.mp4")
    info = probe(source)
    assert abs(start_s - 22.3) <= 0.5 / info.fps and abs(end_s - 33.0) <= 0.5 / info.fps
    assert probe(tmp_path / "clip.mp4").duration_s == pytest.approx(end_s - start_s, abs=1e-3)
    number = int(np.abs(info.times_s - start_s).argmin())
    with av.open(str(source)) as a, av.open(str(tmp_path / "clip.mp4")) as b:
        near = [f.to_ndarray(format="rgb24").astype(int) for f in a.decode(video=0)][number - 1 : number + 2]
        first = next(b.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert np.argmin([np.abs(frame - first).mean() for frame in near]) == 1
    wave, rate = sound_of(tmp_path / "clip.mp4")
    assert len(wave) / rate == pytest.approx(end_s - start_s, abs=0.05)
