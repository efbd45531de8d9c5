"""Prompts in order, whatever fails on the way."""

import ast
import errno
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest
import torch
from process_cases import wait_until
from video_cases import write_video

from video_opd.config import VideoConfig
from video_opd.data import clip_cache, loader
from video_opd.data.encode import PromptEncoder
from video_opd.data.loader import PromptLoader
from video_opd.data.prompt_memory import PromptMemory
from video_opd.data.video import load_clip
from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.types import Clip, Sample
from video_opd.world.tiny import build_processor

SMALL = VideoConfig(max_frames=8, min_frame_tokens=1, max_frame_tokens=3)


@lru_cache(maxsize=1)
def encoder() -> PromptEncoder:
    return PromptEncoder(build_processor())


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    options = {"preset": "ultrafast"}
    return [write_video(folder / f"{i}.mp4", 10 + 3 * i, codec_options=options) for i in range(5)]


def rows(videos: list[Path], queries: int = 2) -> list[Sample]:
    return [
        Sample(id=f"{video.stem}-{q}", video=video, query=f"event {q} of {video.stem}")
        for video in videos
        for q in range(queries)
    ]


def ids(made: list) -> list[str]:
    assert all(sample.id == prompt.sample_id for sample, prompt in made)
    return [sample.id for sample, _ in made]


def count_decodes(monkeypatch) -> list[Path]:
    """The videos that the loader decodes from here on, in the order it begins them."""
    begun: list[Path] = []

    def counted(path, *arguments):
        begun.append(path)
        return load_clip(path, *arguments)

    monkeypatch.setattr(loader, "load_clip", counted)
    return begun


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (3, 1), (3, 8)])
def test_order_and_content_do_not_depend_on_the_workers(videos, workers, prefetch):
    samples = rows(videos)
    made = list(PromptLoader(samples, encoder(), SMALL, workers=workers, prefetch=prefetch))
    assert ids(made) == [s.id for s in samples]
    for sample, prompt in made:
        plain = encoder().encode(load_clip(sample.video, SMALL), sample.query, sample.id)
        assert torch.equal(prompt.input_ids, plain.input_ids)
        assert torch.equal(prompt.tensors["pixel_values_videos"], plain.tensors["pixel_values_videos"])


def test_rows_on_one_video_decode_it_once(videos, monkeypatch):
    decoded = count_decodes(monkeypatch)
    made = list(PromptLoader(rows(videos[:2], queries=4), encoder(), SMALL))
    assert len(made) == 8 and sorted(decoded) == videos[:2]
    assert made[0][1].tensors["pixel_values_videos"] is made[3][1].tensors["pixel_values_videos"]


def epochs(videos: list[Path], count: int) -> list[Sample]:
    """Two rows on each video in every epoch, never next to each other."""
    first, second = rows(videos)[0::2], rows(videos)[1::2]
    return (first + second) * count


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (3, 4)])
def test_what_an_earlier_epoch_encoded_is_not_encoded_again(videos, monkeypatch, workers, prefetch):
    plain = list(PromptLoader(epochs(videos, 3), encoder(), SMALL, workers=0))
    decoded = count_decodes(monkeypatch)
    made = list(
        PromptLoader(
            epochs(videos, 3), encoder(), SMALL, workers=workers, prefetch=prefetch, memory_bytes=1 << 30
        )
    )
    assert sorted(decoded) == videos
    assert ids(made) == ids(plain)
    for (_, kept), (_, alone) in zip(made, plain, strict=True):
        assert torch.equal(kept.input_ids, alone.input_ids) and kept.text == alone.text
        assert kept.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(kept.tensors[key], alone.tensors[key]) for key in alone.tensors)
        assert replace(kept, input_ids=alone.input_ids, tensors=alone.tensors) == alone
    assert made[0][1] is made[10][1]  # with the positions that a model numbered


def test_what_is_kept_is_bounded_and_left_after_its_last_use(videos, monkeypatch):
    (one,) = (prompt for _, prompt in PromptLoader(rows(videos[:1], queries=1), encoder(), SMALL))
    video_bytes = sum(tensor.nbytes for tensor in one.tensors.values()) + 2 * 40 * one.length
    decoded = count_decodes(monkeypatch)
    list(PromptLoader(epochs(videos, 3), encoder(), SMALL, workers=0, memory_bytes=2.5 * video_bytes))
    # The first two are kept until they have come for the last time; the others are decoded for each row.
    assert [decoded.count(video) for video in videos] == [1, 1, 6, 6, 6]
    decoded.clear()
    list(PromptLoader(epochs(videos, 1) * 2, encoder(), SMALL, workers=0))
    assert len(decoded) == 4 * len(videos)

    memory = PromptMemory({videos[0]: 2, videos[1]: 1}, 1 << 30)
    assert memory.use(videos[0]) == memory.use(videos[1]) == {}
    memory.keep(videos[0], [one])
    memory.keep(videos[1], [one])
    assert memory.use(videos[0]) == {one.sample_id: one} and memory.held_bytes == 0


def test_a_video_that_failed_is_tried_again_in_the_next_epoch(tmp_path):
    write_video(tmp_path / "good.mp4", 10)
    (tmp_path / "late.mp4").write_bytes(b"not yet")
    samples = rows([tmp_path / "good.mp4", tmp_path / "late.mp4"], queries=1)
    loaded = PromptLoader(
        samples * 2, encoder(), SMALL, workers=0, max_failed_share=1.0, memory_bytes=1 << 30
    )
    iterator = iter(loaded)
    assert next(iterator)[0].id == "good-0"
    assert next(iterator)[0].id == "good-0" and [sample.id for sample, _ in loaded.skipped] == ["late-0"]
    shutil.copy(tmp_path / "good.mp4", tmp_path / "late.mp4")
    assert [sample.id for sample, _ in iterator] == ["late-0"]


@pytest.mark.parametrize("queries", [1, 5])
def test_what_is_made_ahead_is_bounded_and_goes_on_while_the_caller_works(videos, monkeypatch, queries):
    """Videos are counted, not their queries: with five each, several are still decoded at a time."""
    started = count_decodes(monkeypatch)
    iterator = iter(PromptLoader(rows(videos, queries) * 4, encoder(), SMALL, workers=2, prefetch=3))
    next(iterator)
    wait_until(lambda: len(started) >= 4)
    time.sleep(0.2)  # more might come
    assert len(started) == 4  # the one in hand, and three ahead
    iterator.close()  # type: ignore[attr-defined]


def test_failed_videos_are_put_aside_once_and_the_rest_goes_on(videos, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"junk" * 100)
    samples = rows([videos[0], bad, tmp_path / "gone.mp4", videos[1]])
    skipped = tmp_path / "run" / "skipped.jsonl"
    for _ in range(2):  # a second run, or a run that is continued, reports nothing twice
        made = PromptLoader(samples, encoder(), SMALL, skipped_path=skipped, max_failed_share=0.5)
        assert ids(list(made)) == ["0-0", "0-1", "1-0", "1-1"]
        assert [sample.id for sample, _ in made.skipped] == ["bad-0", "bad-1", "gone-0", "gone-1"]
    written = [row for _, row in read_jsonl(skipped)]
    assert [row["id"] for row in written] == ["bad-0", "bad-1", "gone-0", "gone-1"]
    assert written[0]["video"] == str(bad) and "cannot be opened" in written[0]["reason"]
    assert written[2]["reason"] == "no such file"


def test_too_many_failures_stop_the_run_at_its_end(videos, tmp_path):
    samples = rows([*videos, tmp_path / "gone.mp4"], queries=1)
    made: list = []
    with pytest.raises(UserError, match=r"1 of 6 rows .* more than 10%.*gone\.mp4: no such file"):
        made.extend(PromptLoader(samples, encoder(), SMALL, max_failed_share=0.1))
    assert len(list(PromptLoader(samples, encoder(), SMALL, max_failed_share=0.2))) == 5


def test_too_many_failures_stop_a_long_run_early(tmp_path):
    samples = rows([tmp_path / f"{i}.mp4" for i in range(5000)], queries=1)
    skipped = tmp_path / "skipped.jsonl"
    with pytest.raises(UserError, match="50 of 50 rows"):
        list(PromptLoader(samples, encoder(), SMALL, skipped_path=skipped))
    assert len(list(read_jsonl(skipped))) == 50


@pytest.mark.parametrize("workers", [0, 2])
def test_a_query_that_cannot_be_encoded_is_put_aside_alone(videos, tmp_path, monkeypatch, workers):
    """Other queries on its video are encoded; a video about which nothing else is asked is not decoded."""
    decoded = count_decodes(monkeypatch)
    samples = rows(videos[:3])
    bad = [1, 2, 3]  # one on the first video, both on the second
    for i in bad:
        samples[i] = replace(samples[i], query="a <|im_end|> b")
    skipped = tmp_path / "skipped.jsonl"
    made = PromptLoader(
        samples, encoder(), SMALL, workers=workers, skipped_path=skipped, max_failed_share=0.5
    )
    assert ids(list(made)) == ["0-0", "2-0", "2-1"] and sorted(decoded) == [videos[0], videos[2]]
    reason = "its query holds the control token <|im_end|>; remove it"
    told = [{"id": samples[i].id, "video": str(samples[i].video), "reason": reason} for i in bad]
    assert [row for _, row in read_jsonl(skipped)] == told
    assert [(sample.id, why) for sample, why in made.skipped] == [(row["id"], reason) for row in told]
    with pytest.raises(UserError, match=r"3 of 6 rows cannot be used.*0-1, .*<\|im_end\|>"):
        list(PromptLoader(samples, encoder(), SMALL, workers=workers, max_failed_share=0.4))


def test_a_bad_query_on_a_bad_video_has_its_own_reason(tmp_path):
    samples = rows([tmp_path / "gone.mp4"], queries=3)
    samples[1] = replace(samples[1], query="<|video_pad|>")
    made = PromptLoader(samples, encoder(), SMALL, max_failed_share=1.0)
    assert list(made) == []
    reasons = {sample.id: reason for sample, reason in made.skipped}
    assert reasons["gone-0"] == reasons["gone-2"] == "no such file" and "<|video_pad|>" in reasons["gone-1"]


def test_waiting_is_measured_and_a_left_loader_stops_its_threads(videos, monkeypatch):
    """The clock of this test moves by 0.1 s once: when the caller waits, and the first video is decoded."""
    waits, now_s = threading.Event(), [0.0]

    def clock() -> float:
        read_s = now_s[0]
        waits.set()
        return read_s

    def slow(path, *arguments):
        assert waits.wait(300)
        now_s[0] = 0.1
        return load_clip(path, *arguments)

    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(loader, "load_clip", slow)
    made = PromptLoader(rows(videos, queries=1), encoder(), SMALL, workers=1)
    for _ in made:
        break
    assert made.wait_s == 0.1
    wait_until(lambda: not any(t.name.startswith("decode") for t in threading.enumerate()))


def test_the_cache_gives_the_same_clips_without_decoding(videos, tmp_path, monkeypatch):
    samples = rows(videos, queries=1)
    first = list(PromptLoader(samples, encoder(), SMALL, cache_dir=tmp_path / "cache"))
    monkeypatch.setattr(clip_cache, "load_clip", lambda *a: pytest.fail("decoded again"))
    again = list(PromptLoader(samples, encoder(), SMALL, cache_dir=tmp_path / "cache"))
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert a.clip_digest == b.clip_digest and a.pair_times_s == b.pair_times_s
        assert torch.equal(a.tensors["pixel_values_videos"], b.tensors["pixel_values_videos"])


def test_one_thread_at_a_time_parses_the_headers_of_entries(videos, tmp_path, monkeypatch):
    """Python 3.11's parser may fail in one of two threads that use it together."""
    samples = rows(videos, queries=1)
    list(PromptLoader(samples, encoder(), SMALL, cache_dir=tmp_path))
    parse, decoded = ast.literal_eval, []
    inside: list[str] = []
    together: list[list[str]] = []

    def watched(text: str) -> Any:
        inside.append(text)
        time.sleep(0.01)  # another thread would come in
        together.append(inside.copy())
        inside.remove(text)
        return parse(text)

    def decode(path: Path, *arguments: Any) -> Clip:
        decoded.append(path)
        return load_clip(path, *arguments)

    monkeypatch.setattr(clip_cache, "load_clip", decode)
    monkeypatch.setattr(ast, "literal_eval", watched)
    list(PromptLoader(samples, encoder(), SMALL, workers=4, cache_dir=tmp_path))
    assert {len(texts) for texts in together} == {1} and not decoded

    def fails(text: str) -> Any:
        raise SystemError("AST constructor recursion depth mismatch (before=42, after=40)")

    monkeypatch.setattr(ast, "literal_eval", fails)
    assert len(list(PromptLoader(samples, encoder(), SMALL, cache_dir=tmp_path))) == len(samples)
    assert sorted(decoded) == videos


def test_the_cache_knows_another_budget_and_a_changed_file(videos, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(videos[0].read_bytes())
    kept = clip_cache.ClipCache(tmp_path / "cache", 1 << 30)
    first = kept.load(path, SMALL, "pyav")
    assert len(kept.load(path, VideoConfig(min_frames=2, max_frames=2), "pyav").frames) == 2
    path.write_bytes(videos[3].read_bytes())
    assert kept.load(path, SMALL, "pyav").digest != first.digest


def test_a_damaged_entry_is_made_anew(videos, tmp_path):
    kept = clip_cache.ClipCache(tmp_path, 1 << 30)
    clip = kept.load(videos[0], SMALL, "pyav")
    (entry,) = tmp_path.glob("*.npz")
    whole = entry.read_bytes()
    at = whole.index(clip.frames.tobytes()[:64])
    for damaged in (whole[:100], b"", whole[:at] + bytes(64) + whole[at + 64 :]):
        entry.write_bytes(damaged)
        again = kept.load(videos[0], SMALL, "pyav")
        assert again.digest == clip.digest and np.array_equal(again.frames, clip.frames)


def test_the_cache_is_bounded_and_drops_the_least_recently_used(videos, tmp_path):
    sizes = []
    for video in videos[:3]:
        clip_cache.ClipCache(tmp_path / "one", 1 << 30).load(video, SMALL, "pyav")
        sizes = [p.stat().st_size for p in (tmp_path / "one").glob("*.npz")]
    bound = sum(sizes) + 1000
    kept = clip_cache.ClipCache(tmp_path / "cache", bound)
    for age, video in enumerate(videos[:3]):
        kept.load(video, SMALL, "pyav")
        newest = max((tmp_path / "cache").glob("*.npz"), key=lambda p: p.stat().st_mtime_ns)
        os.utime(newest, (1000 + age, 1000 + age))
    kept.load(videos[0], SMALL, "pyav")  # used again: now the youngest
    before = {p.name for p in (tmp_path / "cache").glob("*.npz")}
    kept.load(videos[4], SMALL, "pyav")
    after = {p.name: p for p in (tmp_path / "cache").glob("*.npz")}
    assert len(before) == 3 and sum(p.stat().st_size for p in after.values()) <= bound
    assert len(before & set(after)) == 2 or len(after) < 4  # the oldest went, not the one used again
    fresh = clip_cache.ClipCache(tmp_path / "cache", bound)
    entry = fresh._entry(videos[0], SMALL, "pyav")
    assert entry is not None and entry.name in after


def write_and_die(kept: clip_cache.ClipCache, clip: Clip) -> None:
    def die(file: IO[bytes], **arrays: np.ndarray) -> None:
        file.write(bytes(1000))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    clip_cache.np.savez = die  # type: ignore[assignment]
    kept._write(kept.folder / "a.npz", clip)


def test_what_killed_processes_left_in_the_cache_is_removed(videos, tmp_path):
    kept = clip_cache.ClipCache(tmp_path, 1 << 30)
    clip = load_clip(videos[0], SMALL)
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(kept, clip))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 and not list(tmp_path.glob("*.npz"))
    kept.load(videos[0], SMALL, "pyav")
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_an_entry_that_another_process_removes_does_not_end_the_cache(videos, tmp_path, monkeypatch):
    real = clip_cache.replacing_file

    @contextmanager
    def removing(path: Path, **options: Any) -> Iterator[Path]:
        with real(path, **options) as temporary:
            yield temporary
        path.unlink()

    kept = clip_cache.ClipCache(tmp_path, 1 << 30)
    with monkeypatch.context() as patch:
        patch.setattr(clip_cache, "replacing_file", removing)
        kept.load(videos[0], SMALL, "pyav")
    kept.load(videos[1], SMALL, "pyav")
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_a_cache_of_somebody_else_is_read(videos, tmp_path, monkeypatch):
    """The time of use of an entry can then not be changed."""
    clip = clip_cache.ClipCache(tmp_path, 1 << 30).load(videos[0], SMALL, "pyav")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(clip_cache.os, "utime", refuse)
    monkeypatch.setattr(clip_cache, "load_clip", lambda *_: pytest.fail("decoded again"))
    assert clip_cache.ClipCache(tmp_path, 1 << 30).load(videos[0], SMALL, "pyav").digest == clip.digest


def test_a_cache_that_cannot_be_written_is_reported_once(videos, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    made = list(PromptLoader(rows(videos, queries=1), encoder(), SMALL, cache_dir=blocked / "cache"))
    assert len(made) == 5
    assert sum("no more clips are cached" in record.message for record in caplog.records) == 1


def edit_entry(entry: Path, *, sealed: bool, compressed: bool = False, **changes: Any) -> None:
    with np.load(entry, allow_pickle=True) as stored:
        arrays = {name: stored[name] for name in stored.files}
    meta = json.loads(str(arrays["meta"]))
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = value
        else:
            meta[name] = value
    arrays["meta"] = np.array(json.dumps(meta))
    if sealed:  # by somebody who knows how
        arrays["seal"] = np.array(
            clip_cache._seal(
                str(arrays["meta"]), *(arrays[n] for n in ("frames", "times_s", "frame_indices"))
            )
        )
    with entry.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **arrays)


@pytest.mark.parametrize(
    ("sealed", "changes"),
    [
        (False, {"duration_s": 99.0}),
        (False, {"source_fps": 99.0}),
        (False, {"source_size_px": [5, 5]}),
        (False, {"frame_indices": np.arange(100, 102)}),
        (True, {"duration_s": math.inf}),
        (True, {"duration_s": math.nan}),
        (True, {"duration_s": -1.0}),
        (True, {"duration_s": 1e-9}),
        (True, {"duration_s": "5"}),
        (True, {"duration_s": None}),
        (True, {"source_fps": 0.0}),
        (True, {"source_size_px": [0, 64]}),
        (True, {"source_size_px": 3}),
        (True, {"digest": "0" * 32}),
        (True, {"times_s": np.array([math.nan])}),
        (True, {"frames": np.zeros((0, 32, 32, 3), dtype=np.uint8)}),
        (True, {"frames": np.zeros((2, 2), dtype=np.float32)}),
        (True, {"compressed": True}),
    ],
)
def test_the_cache_decodes_again_what_is_damaged_or_impossible(
    videos: list[Path], tmp_path: Path, sealed: bool, changes: dict[str, Any]
) -> None:
    kept = clip_cache.ClipCache(tmp_path, 1 << 30)
    first = kept.load(videos[0], SMALL, "pyav")
    (entry,) = tmp_path.glob("*.npz")
    assert kept._read(entry, videos[0]) is not None
    edit_entry(entry, sealed=sealed, **changes)
    assert kept._read(entry, videos[0]) is None
    again = kept.load(videos[0], SMALL, "pyav")
    assert (again.duration_s, again.digest, again.source_fps) == (
        first.duration_s,
        first.digest,
        first.source_fps,
    )


def test_the_cache_unpickles_nothing(videos: list[Path], tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    kept = clip_cache.ClipCache(tmp_path / "cache", 1 << 30)
    kept.load(videos[0], SMALL, "pyav")
    (entry,) = (tmp_path / "cache").glob("*.npz")
    with np.load(entry) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(entry, **{**arrays, "frames": np.array([Trap()], dtype=object)})
    assert kept.load(videos[0], SMALL, "pyav").frames.dtype == np.uint8
    entry.write_bytes(pickle.dumps(Trap()))
    assert kept.load(videos[0], SMALL, "pyav").frames.dtype == np.uint8
    assert not (tmp_path / "ran").exists()
