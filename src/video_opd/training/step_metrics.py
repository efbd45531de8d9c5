"""From the rollouts of a step to one row of ``metrics.jsonl``; ``docs/metrics.md`` defines every key."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from video_opd.algorithms.method import Needs

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
    sampled: bool  # false: the annotation's text
    truncated: bool
    answer_reward: float | None  # of the whole answer; none: the method has no such reward
    rule: str
    span: tuple[float, float] | None
    spans: tuple[tuple[float, float], ...]  # annotated; may be empty
    iou: float | None  # none: not annotated
    prompt_tokens: int
    video_tokens: int
    old: tuple[float, ...]  # log π_old
    current: tuple[float, ...]  # log π_θ at this update
    teacher: tuple[float, ...]
    reference: tuple[float, ...]
    reward: tuple[float, ...]  # r_t, eq 5
    advantage: tuple[float, ...]
    ratio: tuple[float, ...]
    weight: tuple[float, ...]  # importance weight between sampler and trainer
    kl: tuple[float, ...]
    entropy: tuple[float, ...]


def rollout_metrics(
    records: Sequence[RolloutRecord], clip: tuple[float, float] | None = None
) -> dict[str, float]:
    """Metrics of the global batch; the order of ``records`` does not matter but for the last digit."""
    lengths = [len(record.token_ids) for record in records]
    learned = _finite(record.current for record in records)
    ious = [record.iou for record in records if record.iou is not None]
    return {
        "rollouts": len(records),
        **_divergences(records),
        **_rewards(records),
        **_policy(records, clip),
        "response/length_mean": _mean(lengths),
        "response/length_max": max(lengths, default=math.nan),
        "response/truncated_share": _mean([float(record.truncated) for record in records]),
        "response/unparsed_share": _mean([float(record.span is None) for record in records]),
        "response/iou_mean": _mean(ious),
        "response/nll": -_mean(learned),
        "loss/masked_tokens": sum(lengths) - len(learned),
    }


def _divergences(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Distances to the teacher and to the initial student, nats a token."""
    to_teacher = [
        old - teacher
        for record in records
        if record.sampled
        for old, teacher in zip(record.old, record.teacher, strict=True)
    ]
    # k3: exp(x) − x − 1 with x = log π_ref − log π_θ
    to_reference = [
        math.expm1(reference - current) - (reference - current)
        for record in records
        for reference, current in zip(record.reference, record.current, strict=True)
    ]
    return {
        "reverse_kl/sampled": _mean(_finite([to_teacher])),
        "reverse_kl/analytic": _mean(_finite(record.kl for record in records)),
        "reference_kl/sampled": _mean(_finite([to_reference])),
    }


def _rewards(records: Sequence[RolloutRecord]) -> dict[str, float]:
    """Of r_t over tokens, or of whole answers over rollouts: whichever the method has."""
    tokens = _finite(record.reward for record in records)
    answers = [record.answer_reward for record in records if record.answer_reward is not None]
    rewards, advantage = tokens or answers, _finite(record.advantage for record in records)
    groups: dict[int, set[float]] = {}
    for record in records:
        if record.answer_reward is not None:
            groups.setdefault(record.position, set()).add(record.answer_reward)
    return {
        "reward/mean": _mean(rewards),
        "reward/std": _std(rewards),
        "reward/min": min(rewards, default=math.nan),
        "reward/max": max(rewards, default=math.nan),
        "reward/outlier_share": _mean([float(abs(r) > OUTLIER_NATS) for r in tokens]),
        "reward/equal_group_share": _mean([float(len(found) == 1) for found in groups.values()]),
        "advantage/mean": _mean(advantage),
        "advantage/std": _std(advantage),
    }


def _policy(records: Sequence[RolloutRecord], clip: tuple[float, float] | None) -> dict[str, float]:
    ratios = _finite(record.ratio for record in records)
    weights = _finite(record.weight for record in records)
    clipped = math.nan
    if clip is not None:
        low, high = clip
        pairs = [
            (ratio, advantage)
            for record in records
            for ratio, advantage in zip(record.ratio, record.advantage, strict=True)
            if math.isfinite(ratio) and math.isfinite(advantage)
        ]
        clipped = _mean([float((a > 0 and x > 1 + high) or (a < 0 and x < 1 - low)) for x, a in pairs])
    return {
        "policy/ratio_off_max": max((abs(ratio - 1.0) for ratio in ratios), default=math.nan),
        "policy/clipped_share": clipped,
        "policy/importance_weight_mean": _mean(weights),
        "policy/entropy": _mean(_finite(record.entropy for record in records)),
    }


def token_counts(
    records: Sequence[RolloutRecord],
    reads_prompts_once: bool,
    needs: Needs,
    *,
    continues_prefill: bool = False,
) -> dict[str, int]:
    """Tokens that each stage put through a model. A plain engine reads a prompt again for each rollout;
    an update that continues the prefill of sampling does not read it at all."""
    once = {record.position: record for record in records}.values()
    prompt = sum(record.prompt_tokens for record in once)
    response = sum(len(record.token_ids) for record in records)
    read = prompt if reads_prompts_once else sum(record.prompt_tokens for record in records)
    return {
        "tokens/video": sum(record.video_tokens for record in once),
        "tokens/prompt": prompt,
        "tokens/response": response,
        "tokens/prefill": prompt if reads_prompts_once and needs.sampling else 0,
        "tokens/sample": response if needs.sampling else 0,
        "tokens/teacher": read + response if needs.teacher else 0,
        "tokens/reference": read + response if needs.reference else 0,
        "tokens/update": response if continues_prefill else read + response,
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
        "r": record.reward,
        "advantage": record.advantage,
        "reward": record.answer_reward,
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
