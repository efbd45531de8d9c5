"""Loads prompts in order and decodes videos in the background, so that the model need not wait for them.

It uses threads, not processes: decoding, resizing and normalising release the interpreter's lock, and threads
pass on a clip of tens of megabytes without a copy. Neighbouring rows on the same video share its clip.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from video_opd.config import VideoConfig
from video_opd.data.clip_cache import ClipCache
from video_opd.data.encode import PromptEncoder
from video_opd.data.prompt_memory import PromptMemory
from video_opd.data.video import VideoError, load_clip
from video_opd.errors import UserError
from video_opd.jsonl import append_jsonl, read_jsonl, repair_jsonl
from video_opd.types import Clip, EncodedPrompt, Sample

# The share of failed rows is not checked on fewer rows than this, unless the data has fewer.
MIN_CHECKED_ROWS = 50

_Group = list[Sample]


@dataclass(frozen=True, kw_only=True)
class _EncodedRows:
    """The rows of one video: each has a prompt, or the reason why it has none."""

    prompts: list[tuple[Sample, EncodedPrompt]]
    failed: list[tuple[Sample, str]]


class PromptLoader:
    """Yields ``(sample, prompt)`` in the order of ``samples``, which does not depend on ``workers``.

    ``workers`` threads decode (0: the calling thread does), at most ``prefetch`` videos ahead. Memory grows
    with ``prefetch``, not with the number of rows, because the prompts of a video share its pixels; beside
    them, up to ``memory_bytes`` of prompts whose videos come again are kept.

    A row is skipped if its video cannot be decoded or the encoder refuses its query. It is listed with the
    reason in ``skipped``, and once in the file ``skipped_path`` (keys ``id``, ``video``, ``reason``).
    Iterating raises UserError when more than ``max_failed_share`` of the rows so far failed; the share is
    checked from the 50th row on, or at the last row if there are fewer.

    ``wait_s`` is the time that the caller has waited for prompts so far, in seconds.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: PromptEncoder,
        budget: VideoConfig,
        *,
        workers: int = 2,
        prefetch: int = 8,
        skipped_path: str | Path | None = None,
        max_failed_share: float = 0.05,
        backend: str = "pyav",
        cache_dir: str | Path | None = None,
        cache_bytes: int = 20 << 30,
        memory_bytes: float = 0,
    ) -> None:
        assert workers >= 0 and prefetch >= 1
        self.samples = list(samples)
        self.encoder = encoder
        self.budget = budget
        self.workers = workers
        self.prefetch = prefetch
        self.skipped_path = None if skipped_path is None else Path(skipped_path)
        self.max_failed_share = max_failed_share
        self.backend = backend
        self.skipped: list[tuple[Sample, str]] = []
        self.wait_s = 0.0
        self.memory_bytes = memory_bytes
        self._cache = None if cache_dir is None else ClipCache(cache_dir, cache_bytes)
        self._reported = self._already_reported()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Sample, EncodedPrompt]]:
        self.skipped = []
        groups = [list(group) for _, group in itertools.groupby(self.samples, key=lambda s: s.video)]
        memory = PromptMemory(Counter(group[0].video for group in groups), self.memory_bytes)
        done = failed = 0
        for group, rows in self._in_order(groups, memory):
            done += len(group)
            failed += len(rows.failed)
            self._record_skipped(rows.failed)
            if done >= min(MIN_CHECKED_ROWS, len(self.samples)):
                self._check_failed_share(failed, done)
            yield from rows.prompts

    def _in_order(self, groups: list[_Group], memory: PromptMemory) -> Iterator[tuple[_Group, _EncodedRows]]:
        if self.workers == 0:
            for group in groups:
                started = time.perf_counter()
                rows = self._encode(group, memory)
                self.wait_s += time.perf_counter() - started
                yield group, rows
            return
        executor = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead: deque[tuple[_Group, Future[_EncodedRows]]] = deque()
        waiting = deque(groups)

        def fill() -> None:
            while waiting and len(ahead) < self.prefetch:
                group = waiting.popleft()
                ahead.append((group, executor.submit(self._encode, group, memory)))

        try:
            fill()
            while ahead:
                group, future = ahead.popleft()
                fill()  # before waiting, so that the workers go on while the caller uses this group
                started = time.perf_counter()
                rows = future.result()
                self.wait_s += time.perf_counter() - started
                yield group, rows
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _encode(self, group: _Group, memory: PromptMemory) -> _EncodedRows:
        video = group[0].video
        encodable: list[Sample] = []
        failed: list[tuple[Sample, str]] = []
        for sample in group:
            reason = self.encoder.refusal(sample.query)
            if reason is None:
                encodable.append(sample)
            else:
                failed.append((sample, reason))
        prompts = memory.use(video)
        new = [sample for sample in encodable if sample.id not in prompts]
        if new:
            queries, ids = [sample.query for sample in new], [sample.id for sample in new]
            try:
                if prompts:
                    made = self.encoder.encode_more(next(iter(prompts.values())), queries, ids)
                else:
                    made = self.encoder.encode_many(self._clip(video), queries, ids)
            except VideoError as error:
                return _EncodedRows(prompts=[], failed=failed + [(sample, error.reason) for sample in new])
            memory.keep(video, made)
            prompts |= zip(ids, made, strict=True)
        return _EncodedRows(prompts=[(sample, prompts[sample.id]) for sample in encodable], failed=failed)

    def _clip(self, video: Path) -> Clip:
        if self._cache is not None:
            return self._cache.load(video, self.budget, self.backend)
        return load_clip(video, self.budget, self.backend)

    def _record_skipped(self, failed: Sequence[tuple[Sample, str]]) -> None:
        self.skipped += failed
        new = [(sample, reason) for sample, reason in failed if sample.id not in self._reported]
        self._reported.update(sample.id for sample, _ in new)
        if self.skipped_path is not None and new:
            append_jsonl(
                self.skipped_path,
                [{"id": sample.id, "video": str(sample.video), "reason": reason} for sample, reason in new],
            )

    def _already_reported(self) -> set[str]:
        if self.skipped_path is None or not self.skipped_path.exists():
            return set()
        repair_jsonl(self.skipped_path)
        return {str(row.get("id")) for _, row in read_jsonl(self.skipped_path)}

    def _check_failed_share(self, failed: int, done: int) -> None:
        if failed > self.max_failed_share * done:
            sample, reason = self.skipped[0]
            where = "" if self.skipped_path is None else f"; all are in {self.skipped_path}"
            raise UserError(
                f"{failed} of {done} rows cannot be used, more than {self.max_failed_share:.0%} "
                f"(first: {sample.id}, {sample.video}: {reason}{where}); check the paths and the video root "
                "(video-opd data check lists all), or raise data.max_failed_share"
            )
