"""Prompts of similar length go together, so that little of a batch is padding."""

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
