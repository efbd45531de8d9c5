"""From the rollouts of a step to one row of ``metrics.jsonl``; ``docs/metrics.md`` defines every key."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

OUTLIER_NATS = (
    5.0  # |r_t| above this: the teacher's answer lies outside the student's support, or the reverse
)


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """One rollout and everything measured on it, in plain numbers, so that it travels between processes.

    The token lists have one entry for each response token; nan where a token was masked out of the loss, or
    where the quantity was not measured.
    """

    position: int  # of the prompt in the global batch
    index: int  # of the rollout among those of its prompt
    sample_id: str
    video: str
    query: str
    text: str
    token_ids: tuple[int, ...]
    truncated: bool
    rule: str
    span: tuple[float, float] | None
    spans: tuple[tuple[float, float], ...]  # annotated; may be empty
    iou: float | None  # none: not annotated
    prompt_tokens: int
    video_tokens: int
    old: tuple[float, ...]
    teacher: tuple[float, ...]
    signal: tuple[float, ...]  # r_t, eq 5
    ratio: tuple[float, ...]
    kl: tuple[float, ...]
    entropy: tuple[float, ...]


def rollout_metrics(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Metrics of the global batch; the order of ``records`` does not matter but for the last digit."""
    signal = _finite(record.signal for record in records)
    kl, entropy = (_finite(getattr(r, name) for r in records) for name in ("kl", "entropy"))
    ratio_off = [abs(ratio - 1.0) for ratio in _finite(record.ratio for record in records)]
    lengths = [len(record.token_ids) for record in records]
    ious = [record.iou for record in records if record.iou is not None]
    return {
        "rollouts": len(records),
        "reverse_kl/sampled": -_mean(signal),
        "reverse_kl/analytic": _mean(kl),
        "reward/mean": _mean(signal),
        "reward/std": _std(signal),
        "reward/min": min(signal, default=math.nan),
        "reward/max": max(signal, default=math.nan),
        "reward/outlier_share": _mean([float(abs(r) > OUTLIER_NATS) for r in signal]),
        "policy/ratio_off_max": max(ratio_off, default=math.nan),
        "policy/entropy": _mean(entropy),
        "response/length_mean": _mean(lengths),
        "response/length_max": max(lengths, default=math.nan),
        "response/truncated_share": _mean([float(record.truncated) for record in records]),
        "response/unparsed_share": _mean([float(record.span is None) for record in records]),
        "response/iou_mean": _mean(ious),
        "loss/masked_tokens": sum(lengths) - len(signal),
    }


def token_counts(records: Sequence[RolloutRecord], reads_prompts_once: bool, teacher: bool) -> dict[str, int]:
    """Tokens that each stage put through a model. A plain engine reads a prompt again for each rollout."""
    once = {record.position: record for record in records}.values()
    prompt = sum(record.prompt_tokens for record in once)
    response = sum(len(record.token_ids) for record in records)
    read = prompt if reads_prompts_once else sum(record.prompt_tokens for record in records)
    return {
        "tokens/video": sum(record.video_tokens for record in once),
        "tokens/prompt": prompt,
        "tokens/response": response,
        "tokens/prefill": prompt if reads_prompts_once else 0,
        "tokens/sample": response,
        "tokens/teacher": read + response if teacher else 0,
        "tokens/update": read + response,
    }


def rollout_row(step: int, record: RolloutRecord, tokens: Sequence[str]) -> dict[str, Any]:
    """A line of ``rollouts.jsonl``; ``tokens`` are the response's tokens as text."""
    return {
        "step": step,
        "id": record.sample_id,
        "rollout": record.index,
        "video": record.video,
        "query": record.query,
        "response": record.text,
        "tokens": list(tokens),
        "token_ids": record.token_ids,
        "r": record.signal,
        "student_logprobs": record.old,
        "teacher_logprobs": record.teacher,
        "reverse_kl": record.kl,
        "span": record.span,
        "rule": record.rule,
        "spans": record.spans,
        "iou": record.iou,
        "truncated": record.truncated,
    }


@dataclass
class Stopwatch:
    """Seconds spent in each stage of a step, on this process. ``settle`` waits for a device's queued work."""

    settle: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.settle()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.settle()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self, stages: Sequence[str]) -> dict[str, float]:
        """``time/<stage>_s`` for each stage, and starts again."""
        row = {f"time/{name}_s": self.seconds.pop(name, 0.0) for name in stages}
        assert not self.seconds, f"a stage without a metric: {list(self.seconds)}"
        return row


def _finite(lists: Iterator[tuple[float, ...]] | Any) -> list[float]:
    return [value for values in lists for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values])) if values else math.nan
