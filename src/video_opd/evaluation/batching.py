"""The queries of one video go together, and videos of similar length: little of a batch is padding."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from video_opd.files import write_text
from video_opd.types import EncodedPrompt, Sample

Item: TypeAlias = tuple[Sample, EncodedPrompt]

MakeLoader: TypeAlias = Callable[[Sequence[Sample]], Iterable[Item]]
"""Reads the videos of the samples that are still to do; those whose video fails are not yielded."""

WINDOW_BATCHES = 4  # batches that are looked at together
# Pixels of a prompt are about 25 kB a video token: this bounds what waits to some 1.6 GB.
WINDOW_TOKENS = 65_536


def length_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Batches of at most ``batch_size`` rows, in windows of the given order sorted by the videos' length.

    A batch is of whole videos, because a policy reads a video once for all its queries that are there; only a
    video with more than ``batch_size`` queries is spread over several batches. A window ends where a video
    begins, so the queries of one video must come one after another (:func:`by_video`).
    """
    assert batch_size >= 1
    window: dict[str, list[Item]] = {}
    for item in items:
        digest = item[1].clip_digest
        if digest not in window and _is_full(list(window.values()), batch_size):
            yield from _split(window.values(), batch_size)
            window = {}
        window.setdefault(digest, []).append(item)
    yield from _split(window.values(), batch_size)


def _is_full(videos: Sequence[Sequence[Item]], batch_size: int) -> bool:
    rows = sum(map(len, videos))
    waiting = sum(video[0][1].video_tokens for video in videos)  # queries share their video's pixels
    return rows >= WINDOW_BATCHES * batch_size or (waiting >= WINDOW_TOKENS and rows >= batch_size)


def _split(videos: Iterable[Sequence[Item]], batch_size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for video in sorted(videos, key=lambda video: video[0][1].video_tokens):  # stable
        for start in range(0, len(video), batch_size):
            piece = video[start : start + batch_size]
            if len(batch) + len(piece) > batch_size:
                yield batch
                batch = []
            batch = [*batch, *piece]
    if batch:
        yield batch


@contextlib.contextmanager
def whole_windows(make_loader: MakeLoader, out: str | Path) -> Iterator[MakeLoader]:
    """A loader with which a killed output ends with the very bytes of one that was not.

    What remains of a window would be batched with other prompts, in another order, and padded differently.
    So rows of a window that was cut off are taken back (at most ``WINDOW_BATCHES`` batches; a row is appended
    when its batch is finished) and made again. ``OUT.window`` holds the size of ``out`` at the last border,
    as long as it is not complete. The caller gives the loader to ``score`` or ``predict``.
    """
    out = Path(out)
    mark = out.with_name(f"{out.name}.window")
    if not out.exists():
        write_text(mark, "0")
    elif mark.exists():
        os.truncate(out, min(int(mark.read_text(encoding="utf-8")), _size(out)))

    def load(samples: Sequence[Sample]) -> Iterator[Item]:
        border = _size(out)
        for item in make_loader(samples):
            # Asked for another prompt after rows were appended: length_batches is done with a window.
            if _size(out) > border:
                border = _size(out)
                write_text(mark, str(border))
            yield item

    yield load
    mark.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
