"""Batches of prompts: the queries of a video stay together, and a batch holds videos of similar length.

Similar lengths keep the padding of a batch small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from video_opd.types import EncodedPrompt, Sample

Item: TypeAlias = tuple[Sample, EncodedPrompt]
Batch: TypeAlias = list[Item]

MakeLoader: TypeAlias = Callable[[Sequence[Sample]], Iterable[Item]]
"""Reads the videos of the samples that are still to do; a sample whose video fails is not yielded."""

WINDOW_BATCHES = 4  # batches that are sorted together
# The pixels of a prompt take about 25 kB a video token: this bounds what waits to some 1.6 GB.
WINDOW_TOKENS = 65_536


def windows_of_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Batch]]:
    """Cuts ``items`` into windows, sorts each by the videos' length, and yields a window's batches.

    A batch has at most ``batch_size`` rows. It holds whole videos, because a policy prefills a video once for
    all of its queries in a batch; only a video with more than ``batch_size`` queries is spread over several.
    A window ends where a video begins, so the queries of one video must come one after another
    (:func:`video_opd.processes.by_video`). The rows of a window depend on the rows before it in no way, so
    work that was cut off at the end of a window goes on with the same batches.
    """
    assert batch_size >= 1
    window: dict[str, list[Item]] = {}
    for item in items:
        digest = item[1].clip_digest
        if digest not in window and _is_full(list(window.values()), batch_size):
            yield list(_batches(window.values(), batch_size))
            window = {}
        window.setdefault(digest, []).append(item)
    if window:
        yield list(_batches(window.values(), batch_size))


def _is_full(videos: Sequence[Sequence[Item]], batch_size: int) -> bool:
    rows = sum(map(len, videos))
    waiting = sum(video[0][1].video_tokens for video in videos)  # queries share their video's pixels
    return rows >= WINDOW_BATCHES * batch_size or (waiting >= WINDOW_TOKENS and rows >= batch_size)


def _batches(videos: Iterable[Sequence[Item]], batch_size: int) -> Iterator[Batch]:
    batch: Batch = []
    for video in sorted(videos, key=lambda video: video[0][1].video_tokens):  # stable
        for start in range(0, len(video), batch_size):
            piece = video[start : start + batch_size]
            if len(batch) + len(piece) > batch_size:
                yield batch
                batch = []
            batch = [*batch, *piece]
    if batch:
        yield batch
