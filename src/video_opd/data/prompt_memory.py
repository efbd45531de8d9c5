"""Keeps the prompts of videos that come again, so that an epoch need not encode what an earlier one has."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from video_opd.types import EncodedPrompt

TOKEN_BYTES = 8 * (1 + 1 + 3)  # id, type, and the rotary positions that a model will number


class PromptMemory:
    """Keeps prompts until the last use of their video, up to ``max_bytes``. Threads may share it.

    ``uses`` says how often each video will be asked for; one that is asked for once is never kept. What is
    kept is not displaced: rows come in epochs, so the least recently used video is the next one to come.
    """

    def __init__(self, uses: Mapping[Path, int], max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self._left = Counter(uses)
        self._kept: dict[Path, dict[str, EncodedPrompt]] = {}
        self._bytes: Counter[Path] = Counter()
        self._lock = threading.Lock()

    def use(self, video: Path) -> dict[str, EncodedPrompt]:
        """Counts a use of ``video`` and returns its prompts so far, by the id of their row."""
        with self._lock:
            self._left[video] -= 1
            known = dict(self._kept.get(video, {}))
            if self._left[video] <= 0:
                self._kept.pop(video, None)
                self._bytes.pop(video, None)
        return known

    def keep(self, video: Path, prompts: Iterable[EncodedPrompt]) -> None:
        """Keeps ``prompts``, which share their pixels, if ``video`` comes again and there is room for all."""
        with self._lock:
            if self._left[video] <= 0:
                return
            kept = self._kept.get(video, {})
            new = {prompt.sample_id: prompt for prompt in prompts if prompt.sample_id not in kept}
            size = sum(TOKEN_BYTES * prompt.length for prompt in new.values())
            if new and not kept:
                size += _video_bytes(next(iter(new.values())))
            if self.held_bytes + size <= self.max_bytes:
                self._kept[video] = kept | new
                self._bytes[video] += size

    @property
    def held_bytes(self) -> int:
        """What is kept now."""
        return self._bytes.total()


def _video_bytes(prompt: EncodedPrompt) -> int:
    pixels = sum(tensor.nbytes for tensor in prompt.tensors.values())
    return pixels + (0 if prompt.clip is None else prompt.clip.frames.nbytes)
