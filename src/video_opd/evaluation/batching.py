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

BLOCK_BATCHES = 4  # batches that are sorted together
# The pixels of a prompt take about 25 kB a video token: this bounds what waits to some 1.6 GB.
BLOCK_TOKENS = 65_536


def blocks_of_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Batch]]:
    """Cuts ``items`` into blocks, sorts each by the length of its videos, and yields a block's batches.

    A batch has at most ``batch_size`` rows. It holds whole videos, because a policy prefills a video once for
    all of its queries in a batch; only a video with more than ``batch_size`` queries is spread over several.
    A block ends where a video begins, so the queries of one video must come one after another
    (:func:`video_opd.processes.by_video`). A block's batches do not depend on the rows before it, so
    work that was cut off at the end of a block goes on with the same batches.
    """
    assert batch_size >= 1
    block: dict[str, list[Item]] = {}
    for item in items:
        digest = item[1].clip_digest
        if digest not in block and _is_full(list(block.values()), batch_size):
            yield list(_batches(block.values(), batch_size))
            block = {}
        block.setdefault(digest, []).append(item)
    if block:
        yield list(_batches(block.values(), batch_size))


def _is_full(videos: Sequence[Sequence[Item]], batch_size: int) -> bool:
    rows = sum(map(len, videos))
    waiting = sum(video[0][1].video_tokens for video in videos)  # queries share their video's pixels
    return rows >= BLOCK_BATCHES * batch_size or (waiting >= BLOCK_TOKENS and rows >= batch_size)


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
