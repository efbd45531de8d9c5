"""Prompts in order, decoded in the background, so that the model does not wait for videos.

Threads, not processes: decoding, resizing and normalising release the interpreter's lock, and a clip of
tens of megabytes then costs no copy. Rows that follow one another on the same video share its clip.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from video_opd.data.budget import VideoBudget
from video_opd.data.clip_cache import ClipCache
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import VideoError, load_clip
from video_opd.errors import UserError
from video_opd.jsonl import append_jsonl, read_jsonl, repair_jsonl
from video_opd.types import EncodedPrompt, Sample

# A share is not judged on fewer rows than this, unless there are no more.
MIN_JUDGED = 50

_Group = list[Sample]


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What became of the rows of a video: each has a prompt, or a reason why there is none."""

    prompts: list[tuple[Sample, EncodedPrompt]]
    failed: list[tuple[Sample, str]]


class PromptLoader:
    """Iterates ``(sample, prompt)`` in the order of ``samples``; the same for any number of workers.

    ``workers`` threads decode (0: the caller does), at most ``prefetch`` videos ahead: memory is theirs,
    because the prompts of a video share its pixels.

    A row whose video cannot be decoded, or whose query the encoder refuses, is put aside with its reason in
    ``skipped_path`` (a row of ``id``, ``video``, ``reason``; each once) and in ``skipped``. UserError is
    raised when more than ``max_failed_share`` of the rows failed: of the first 50 or more, of all at the end.

    ``wait_s`` is how long the caller was kept waiting so far.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        encoder: PromptEncoder,
        budget: VideoBudget,
        *,
        workers: int = 2,
        prefetch: int = 8,
        skipped_path: str | Path | None = None,
        max_failed_share: float = 0.05,
        backend: str = "pyav",
        cache_dir: str | Path | None = None,
        cache_bytes: int = 20 << 30,
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
        self._cache = None if cache_dir is None else ClipCache(cache_dir, cache_bytes)
        self._reported = self._already_reported()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[Sample, EncodedPrompt]]:
        self.skipped = []
        groups = [list(rows) for _, rows in itertools.groupby(self.samples, key=lambda s: s.video)]
        done = failed = 0
        for group, made in self._in_order(groups):
            done += len(group)
            failed += len(made.failed)
            self._put_aside(made.failed)
            if done >= min(MIN_JUDGED, len(self.samples)):
                self._judge(failed, done)
            yield from made.prompts

    def _in_order(self, groups: list[_Group]) -> Iterator[tuple[_Group, _Made]]:
        if self.workers == 0:
            for group in groups:
                started = time.perf_counter()
                made = self._make(group)
                self.wait_s += time.perf_counter() - started
                yield group, made
            return
        executor = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead: deque[tuple[_Group, Future[_Made]]] = deque()
        waiting = deque(groups)

        def fill() -> None:
            while waiting and len(ahead) < self.prefetch:
                group = waiting.popleft()
                ahead.append((group, executor.submit(self._make, group)))

        try:
            fill()
            while ahead:
                group, future = ahead.popleft()
                fill()  # before waiting: the workers go on while the caller is busy with this group
                started = time.perf_counter()
                made = future.result()
                self.wait_s += time.perf_counter() - started
                yield group, made
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _make(self, group: _Group) -> _Made:
        video = group[0].video
        asked: list[Sample] = []
        failed: list[tuple[Sample, str]] = []
        for sample in group:
            reason = self.encoder.refusal(sample.query)
            if reason is None:
                asked.append(sample)
            else:
                failed.append((sample, reason))
        if not asked:
            return _Made(prompts=[], failed=failed)
        try:
            if self._cache is not None:
                clip = self._cache.load(video, self.budget, self.backend)
            else:
                clip = load_clip(video, self.budget, self.backend)
        except VideoError as error:
            return _Made(prompts=[], failed=failed + [(sample, error.reason) for sample in asked])
        prompts = self.encoder.encode_many(clip, [s.query for s in asked], [s.id for s in asked])
        return _Made(prompts=list(zip(asked, prompts, strict=True)), failed=failed)

    def _put_aside(self, failed: Sequence[tuple[Sample, str]]) -> None:
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

    def _judge(self, failed: int, done: int) -> None:
        if failed > self.max_failed_share * done:
            sample, reason = self.skipped[0]
            where = "" if self.skipped_path is None else f"; all are in {self.skipped_path}"
            raise UserError(
                f"{failed} of {done} rows cannot be used, more than {self.max_failed_share:.0%} "
                f"(first: {sample.id}, {sample.video}: {reason}{where}); check the paths and the video root "
                "(video-opd data check lists all), or raise data.max_failed_share"
            )
