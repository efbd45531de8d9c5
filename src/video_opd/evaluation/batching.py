"""Prompts of similar length go together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from video_opd.types import EncodedPrompt, Sample

Item: TypeAlias = tuple[Sample, EncodedPrompt]

MakeLoader: TypeAlias = Callable[[Sequence[Sample]], Iterable[Item]]
"""Reads the videos of the samples that are still to do; those whose video fails are not yielded."""

WINDOW_BATCHES = 4  # batches that are looked at together
# Pixels of a prompt are about 25 kB a video token: this bounds what waits to some 1.6 GB.
WINDOW_TOKENS = 65_536


def length_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Batches of at most ``batch_size``, in windows of the given order sorted by length.

    Length is that of the video, nearly all of a prompt: so the queries of one video stay together, and a
    policy that reads a video once can.
    """
    assert batch_size >= 1
    window: list[Item] = []
    for item in items:
        window.append(item)
        waiting = sum(prompt.video_tokens for _, prompt in window)
        if len(window) >= WINDOW_BATCHES * batch_size or (
            waiting >= WINDOW_TOKENS and len(window) >= batch_size
        ):
            yield from _split(window, batch_size)
            window = []
    yield from _split(window, batch_size)


def _split(window: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    ordered = sorted(window, key=lambda item: item[1].video_tokens)  # stable
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]
