"""Videos become clips: the right frames, at their true times, for files of every kind."""

import pickle
import struct
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from places import REAL
from video_cases import decode_all, numbered_frame, read_number, write_sound, write_video

from video_opd.config import VideoConfig
from video_opd.data import decode, demux, video
from video_opd.data.budget import count_tokens
from video_opd.data.clip_cache import ClipCache
from video_opd.data.video import VideoError, clip_digest, load_clip, probe
from video_opd.errors import UserError


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "a/" * 3000, "a\0b", "loop", "\udcff", "f/v.mp4"])
def test_a_path_that_no_file_can_have_is_a_video_error(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "f").write_text("")
    cache = ClipCache(tmp_path / "cache", max_bytes=1 << 20)
    for read in (probe, lambda path: load_clip(path, SMALL), lambda path: cache.load(path, SMALL, "pyav")):
        with pytest.raises(VideoError, match=r"no such file|cannot be opened"):
            read(tmp_path / name)


SMALL = VideoConfig(min_frame_tokens=8, max_frame_tokens=16)
NATIVE = VideoConfig(min_frame_tokens=1)  # frames of 64×192 stay as they are


def test_a_video_that_is_named_by_another_path_is_found_in_the_cache(tmp_path):
    """The rows of a selection name their videos from another folder than the rows of the pool."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    path = write_video(tmp_path / "a" / "v.mp4", 12)
    cache = ClipCache(tmp_path / "cache", max_bytes=1 << 24)
    clips = [
        cache.load(p, SMALL, "pyav")
        for p in (path, tmp_path / "a" / ".." / "a" / "v.mp4", tmp_path / "link" / "v.mp4")
    ]
    assert len({clip.digest for clip in clips}) == len(list((tmp_path / "cache").glob("*.npz"))) == 1


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", "libx264", {"bf": "3", "g": "12"}),
        (".mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=8:min-keyint=8:scenecut=0"}),
        (".mkv", "libx264", {"g": "250"}),
        (".ts", "libx264", {"g": "10"}),
        (".avi", "mpeg4", {"bf": "2", "g": "10"}),
        (".webm", "libvpx", {"g": "9"}),
        (".avi", "mjpeg", {}),
        (".h264", "libx264", {}),
    ],
)
def test_the_chosen_frames_are_those_of_a_full_decode(tmp_path, suffix, codec, options):
    path = write_video(tmp_path / f"v{suffix}", 61, codec=codec, codec_options=options)
    clip = load_clip(path, NATIVE)
    with av.open(str(path)) as container:
        every = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert len(every) == 61
    assert np.array_equal(clip.frames, every[clip.frame_indices])  # skipped stretches change no pixel
    assert [read_number(f) for f in clip.frames] == clip.frame_indices.tolist()


@pytest.mark.parametrize("fps", [1, 10, 30000 / 1001, 120])
def test_constant_rate_choice_is_the_librarys(tmp_path, fps):
    library = pytest.importorskip("qwen_vl_utils.vision_process")
    count = min(90, max(4, int(fps * 3)))
    path = write_video(tmp_path / "v.mp4", count, fps=fps)
    clip, info = load_clip(path, SMALL), probe(path)
    assert not info.variable_rate and info.fps == pytest.approx(fps, rel=1e-4)
    n_frames = library.smart_nframes({"fps": 2.0, "max_frames": 768}, total_frames=count, video_fps=fps)
    assert clip.frame_indices.tolist() == torch.linspace(0, count - 1, n_frames).round().long().tolist()
    assert clip.times_s == pytest.approx(clip.frame_indices / fps, abs=1e-4)
    assert clip.duration_s == pytest.approx(count / fps, rel=0.02)


def test_pixels_equal_the_librarys(tmp_path, monkeypatch):
    library = pytest.importorskip("qwen_vl_utils.vision_process")
    path = write_video(tmp_path / "v.mp4", 40, size=(90, 162))
    frames, _ = decode_all(path)

    def reader(ele):
        n_frames = library.smart_nframes(ele, total_frames=len(frames), video_fps=10.0)
        index = torch.linspace(0, len(frames) - 1, n_frames).round().long()
        return torch.from_numpy(frames).permute(0, 3, 1, 2)[index], {}, 2.0

    monkeypatch.setitem(library.VIDEO_READER_BACKENDS, "torchvision", reader)
    monkeypatch.setattr(library, "get_video_reader_backend", lambda: "torchvision")
    ele = {"video": str(path), "total_pixels": 8192 * 32 * 32, "max_frames": 768}
    theirs = library.fetch_video(ele, image_patch_size=16)
    ours = load_clip(path, VideoConfig()).frames
    assert ours.shape[0] == 8 and ours.dtype == np.uint8
    assert np.array_equal(ours, theirs.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def variable_times(seed: int, count: int) -> np.ndarray:
    gaps = np.random.default_rng(seed).choice([0.02, 0.1, 0.5, 1.3], size=count - 1)
    return np.concatenate([[0.0], np.cumsum(gaps)])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_files_keep_their_true_times(tmp_path, suffix):
    times_s = variable_times(0, 80)
    path = write_video(tmp_path / f"v{suffix}", 80, times_s=times_s)
    clip, info = load_clip(path, NATIVE), probe(path)
    tolerance = 1e-6 if suffix == ".mp4" else 1e-3  # Matroska counts milliseconds
    assert info.variable_rate
    assert info.times_s == pytest.approx(times_s, abs=tolerance)
    assert [read_number(f) for f in clip.frames] == clip.frame_indices.tolist()
    assert clip.times_s == pytest.approx(times_s[clip.frame_indices], abs=tolerance)
    targets = np.linspace(0, times_s[-1], min(80, int(clip.duration_s * 2) // 2 * 2))
    nearest = np.unique(np.abs(times_s[:, None] - targets).argmin(axis=0))
    assert set(clip.frame_indices) == set(nearest)  # index/fps would have chosen others
    assert len(clip.frames) % 2 == 0


def test_times_begin_at_the_first_frame(tmp_path):
    path = write_video(tmp_path / "v.mkv", 20, times_s=5.0 + np.arange(20) / 10)
    clip, info = load_clip(path, NATIVE), probe(path)
    assert clip.times_s[0] == 0.0 and clip.duration_s == pytest.approx(2.0, abs=0.01)
    assert not info.variable_rate


def test_jitter_below_half_a_frame_is_no_variable_rate(tmp_path):
    times_s = np.arange(40) / 10 + np.random.default_rng(0).uniform(-0.02, 0.02, 40).clip(0)
    info = probe(write_video(tmp_path / "v.mp4", 40, times_s=times_s))
    assert not info.variable_rate and info.times_s == pytest.approx(times_s - times_s[0], abs=1e-4)


@pytest.mark.parametrize(("count", "kept"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (5, [0, 1, 3, 4])])
def test_videos_of_few_frames_are_whole_pairs(tmp_path, count, kept):
    clip = load_clip(write_video(tmp_path / "v.mp4", count), SMALL)
    assert clip.frame_indices.tolist() == kept
    assert clip.times_s == pytest.approx(np.array(kept) / 10)
    assert clip.duration_s == pytest.approx(count / 10)
    if count == 1:
        assert np.array_equal(clip.frames[0], clip.frames[1])


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_honoured_as_the_file_format_says(tmp_path, rotation):
    path = write_video(tmp_path / "v.mp4", 4, size=(64, 192), rotation=rotation)
    data = path.read_bytes()
    matrix = struct.unpack(">9i", data[data.index(b"tkhd") + 44 :][:36])
    a, b, c, d = (round(v / 65536) for v in (matrix[0], matrix[1], matrix[3], matrix[4]))
    stored, _ = decode_all(path)
    height, width = stored.shape[1:3]
    y, x = np.mgrid[0:height, 0:width]
    shown_x, shown_y = a * x + c * y, b * x + d * y  # ISO 14496-12: (x, y) · [[a, b], [c, d]]
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    expected = np.empty((shown_y.max() + 1, shown_x.max() + 1, 3), dtype=np.uint8)
    expected[shown_y, shown_x] = stored[0]
    clip = load_clip(path, NATIVE)
    assert clip.source_size_px == expected.shape[:2]
    assert np.array_equal(clip.frames[0], expected)


def test_only_stretches_that_are_needed_are_decoded_and_memory_is_bounded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 600, codec_options={"g": "10", "preset": "ultrafast"})
    fed = []
    plain = demux.decode_packet

    def counted(stream, packet):
        fed.append(packet is not None)
        return plain(stream, packet)

    monkeypatch.setattr(decode, "decode_packet", counted)
    tracemalloc.start()
    clip = load_clip(path, VideoConfig(max_frames=12, min_frame_tokens=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [read_number(f) for f in clip.frames] == clip.frame_indices.tolist()
    assert len(clip.frames) == 12 and sum(fed) <= 12 * 11
    whole_video = 600 * 64 * 192 * 3
    assert peak < whole_video / 4


def test_three_hours_are_planned_from_their_packets(tmp_path):
    times_s = np.arange(271) * 40.0  # a frame every 40 s
    path = write_video(tmp_path / "v.mkv", 271, times_s=times_s, size=(32, 96))
    clip = load_clip(path, VideoConfig(max_video_tokens=512))
    assert clip.duration_s == pytest.approx(3 * 3600 + 20, abs=41)
    assert count_tokens(*clip.frames.shape[:3]) <= 512
    assert clip.times_s == pytest.approx(times_s[clip.frame_indices])


@pytest.mark.parametrize("size", [(32, 320), (320, 32), (16, 160)])
def test_elongated_videos_stay_within_the_bound(tmp_path, size):
    clip = load_clip(write_video(tmp_path / "v.mp4", 120, size=size), VideoConfig(max_video_tokens=60))
    assert count_tokens(*clip.frames.shape[:3]) <= 60


def test_the_digest_is_of_frames_and_times(tmp_path):
    path = write_video(tmp_path / "v.mp4", 20)
    first, again = load_clip(path, SMALL), load_clip(path, SMALL)
    assert first.digest == again.digest
    changed = first.frames.copy()
    changed[-1, -1, -1, 0] ^= 1
    digests = {
        first.digest,
        clip_digest(changed, first.times_s),
        clip_digest(first.frames, first.times_s + 1e-9),
        clip_digest(first.frames.transpose(0, 2, 1, 3), first.times_s),
    }
    assert len(digests) == 4


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    elif kind == "junk":
        path.write_bytes(bytes(range(256)) * 64)
    elif kind == "text":
        path.write_text("not a video\n" * 50)
    elif kind == "sound":
        write_sound(path)
    elif kind == "cut":  # the index lies at the end, and is gone
        path.write_bytes(write_video(path, 60).read_bytes()[:-2000])
    elif kind == "cut-front":  # the index is there, the rest is not
        data = write_video(path, 200, container_options={"movflags": "faststart"}).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "corrupt":
        noisy = bytearray(write_video(path, 200).read_bytes())
        start = len(noisy) // 3
        noise = np.random.default_rng(0)
        noisy[start : start + 9_000 : 7] = noise.bytes(len(range(start, start + 9_000, 7)))
        path.write_bytes(noisy)
    elif kind == "no-frames":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            container.start_encoding()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "empty file"),
        ("folder", "not a file"),
        ("junk", "cannot be opened"),
        ("text", "cannot be opened|no video stream|no frame can be decoded"),
        ("sound", "no video stream"),
        ("cut", "cannot be opened"),
        ("cut-front", r"truncated: \d+\.\d of 20\.0 s"),
        # A demuxer leaves packets out. Which ones depends on the bytes, and these on the encoder's machine.
        ("corrupt", r"corrupt: \d+ of \d\d chosen frames cannot be decoded"),
        ("no-frames", "no frames|no video stream|cannot be opened"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_reason(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    with pytest.raises(VideoError, match=reason) as caught:
        load_clip(path, SMALL)
    assert caught.value.path == path and str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason) == (path, caught.value.reason)


def test_a_playlist_cannot_name_another_file(tmp_path):
    secret = write_video(tmp_path / "secret.ts", 10)
    playlist = tmp_path / "list.mp4"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/{secret.name}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(VideoError):
        load_clip(playlist, SMALL)


def test_a_few_damaged_frames_are_left_out_with_their_times(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", 400, codec_options={"preset": "ultrafast"})
    plain = video._pyav_frames
    monkeypatch.setattr(
        video, "_pyav_frames", lambda *a: (f for i, f in enumerate(plain(*a)) if i not in (3, 4))
    )
    clip = load_clip(path, SMALL)
    assert len(clip.frames) == 78 and (np.diff(clip.frame_indices) > 0).all()
    assert [read_number(f) for f in clip.frames] == clip.frame_indices.tolist()
    assert clip.times_s == pytest.approx(clip.frame_indices / 10)


def test_backends_are_checked(tmp_path):
    path = write_video(tmp_path / "v.mp4", 8)
    with pytest.raises(UserError, match="pyav, torchcodec"):
        load_clip(path, SMALL, backend="decord")


@pytest.mark.skipif(not REAL.exists(), reason="the real videos are not here")
@pytest.mark.parametrize(
    ("name", "frames", "fps", "duration_s"),
    [("OHOFG", 70, 9.5329, 35.1), ("v_TpB_zMG3XBA", 326, 3.0, 163.7), ("v_rBMQFpHspmo", 288, 3.0, 144.7)],
)
def test_real_videos(name, frames, fps, duration_s):
    path = REAL / f"{name}.mp4"
    clip = load_clip(path, VideoConfig())
    assert len(clip.frames) == frames
    assert count_tokens(*clip.frames.shape[:3]) <= 8192
    assert clip.duration_s == pytest.approx(duration_s, abs=0.1)
    assert clip.times_s == pytest.approx(clip.frame_indices / fps, abs=0.01)


def test_frames_of_the_tests_carry_their_number():
    assert all(read_number(numbered_frame(n, 64, 192)) == n for n in (0, 1, 999, 4095))


def test_tags_that_are_not_utf_8_are_no_reason_to_refuse_a_video(tmp_path: Path) -> None:
    """Every PyAV that is allowed has its own way to be told so, or none."""
    path = write_video(tmp_path / "plain.mp4", 8)
    tagged, title = tmp_path / "tagged.mp4", "plain title"
    with av.open(str(path)) as source, av.open(str(tagged), "w") as target:
        target.metadata["title"] = title
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    written = tagged.read_bytes()
    assert title.encode() in written
    tagged.write_bytes(written.replace(title.encode(), b"pl\xe9in \xff\xfetle"))
    assert probe(tagged).frame_count == probe(path).frame_count
