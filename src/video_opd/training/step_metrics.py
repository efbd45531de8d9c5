"""From the micro-batches of a step to one row of ``metrics.jsonl``; ``docs/metrics.md`` defines every key.

Each micro-batch is summed up on its own (:func:`measure`). The sums of all micro-batches of all processes are
merged into the row (:func:`step_metrics`), which is therefore the same however the batch was cut.

Shapes: ``B`` rollouts of a micro-batch (prompt-major), ``T`` response tokens (right-padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch

from video_opd.algorithms.losses import is_clipped
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.signals import entropy, k3, reverse_kl
from video_opd.temporal import best_iou, parse_answer
from video_opd.training.loss_batch import ScoredBatch
from video_opd.types import TokenLogprobs

OUTLIER_NATS = 5.0  # |r_t| above this: one of the two models finds the token all but impossible


@dataclass(frozen=True, kw_only=True)
class TokenValues:
    """The measurements at each response token: [B, T], float64, on the CPU.

    A value is NaN where the token is padding or masked out of the loss, and where the method has no such
    quantity.
    """

    old: torch.Tensor  # log π_old
    current: torch.Tensor  # log π_θ at this update
    teacher: torch.Tensor  # log π_tea
    reference: torch.Tensor  # log π_ref
    reward: torch.Tensor  # r_t, eq 5
    advantage: torch.Tensor
    ratio: torch.Tensor  # π_θ / π_old
    weight: torch.Tensor  # importance weight between sampler and trainer
    kl: torch.Tensor  # KL(π_θ ‖ π_tea) over the vocabulary
    entropy: torch.Tensor  # entropy of π_θ


@torch.no_grad()
def token_values(batch: Trajectories, student: TokenLogprobs, signal: Signal) -> TokenValues:
    """``student`` scores the trajectories at this update."""
    ratio_BT = (student.logprobs_BT - batch.old_BT).exp()
    unknown_BT = torch.full_like(ratio_BT, math.nan)
    entropy_BT = kl_BT = None
    if student.full_BTV is not None:
        entropy_BT = entropy(student.full_BTV)
        if batch.teacher is not None and batch.teacher.full_BTV is not None:
            kl_BT = reverse_kl(student.full_BTV, batch.teacher.full_BTV)
    found = {
        "old": batch.old_BT,
        "current": student.logprobs_BT,
        "teacher": None if batch.teacher is None else batch.teacher.logprobs_BT,
        "reference": None if batch.reference is None else batch.reference.logprobs_BT,
        "reward": signal.token_reward_BT,
        "advantage": signal.advantage_BT,
        "ratio": ratio_BT,
        "weight": batch.weight_BT,
        "kl": kl_BT,
        "entropy": entropy_BT,
    }
    all_BT = torch.stack([unknown_BT if values is None else values for values in found.values()])
    masked = torch.where(batch.mask_BT, all_BT, math.nan).cpu().double()  # one transfer for all
    return TokenValues(**dict(zip(found, masked, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Count, sum, squared deviations from the mean, smallest and largest of some numbers.

    Summaries of disjoint sets merge into the summary of their union.
    """

    n: int = 0
    total: float = 0.0
    squares: float = 0.0  # Σ (x − mean)²
    low: float = math.inf
    high: float = -math.inf

    @classmethod
    def of(cls, values: torch.Tensor | Sequence[float]) -> Summary:
        """The summary of the finite numbers among ``values``."""
        numbers = torch.as_tensor(values, dtype=torch.float64)
        numbers = numbers[numbers.isfinite()]
        if not len(numbers):
            return cls()
        return cls(
            n=len(numbers),
            total=numbers.sum().item(),
            squares=(numbers - numbers.mean()).square().sum().item(),
            low=numbers.min().item(),
            high=numbers.max().item(),
        )

    @classmethod
    def merged(cls, summaries: Iterable[Summary]) -> Summary:
        some = [summary for summary in summaries if summary.n]
        if not some:
            return cls()
        n, total = sum(each.n for each in some), math.fsum(each.total for each in some)
        between = [each.n * (each.mean - total / n) ** 2 for each in some]
        return cls(
            n=n,
            total=total,
            squares=math.fsum([each.squares for each in some] + between),
            low=min(each.low for each in some),
            high=max(each.high for each in some),
        )

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else math.nan

    @property
    def std(self) -> float:
        """The population's standard deviation."""
        return math.sqrt(self.squares / self.n) if self.n else math.nan

    @property
    def smallest(self) -> float:
        return self.low if self.n else math.nan

    @property
    def largest(self) -> float:
        return self.high if self.n else math.nan


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The summaries of some rollouts. A share is the mean of zeros and ones."""

    # over response tokens
    reverse_kl: Summary = Summary()  # log π_old − log π_tea of sampled tokens
    analytic_kl: Summary = Summary()
    reference_kl: Summary = Summary()  # k3
    token_reward: Summary = Summary()
    outlier: Summary = Summary()
    advantage: Summary = Summary()
    ratio_off: Summary = Summary()  # |ratio − 1|
    clipped: Summary = Summary()
    weight: Summary = Summary()
    entropy: Summary = Summary()
    current: Summary = Summary()  # log π_θ
    # over rollouts
    rollout_reward: Summary = Summary()
    length: Summary = Summary()  # tokens
    truncated: Summary = Summary()
    unparsed: Summary = Summary()
    iou: Summary = Summary()
    repeated_prompt: Summary = Summary()  # tokens of its prompt
    # over groups and over prompts
    equal_group: Summary = Summary()
    prompt: Summary = Summary()  # tokens
    video: Summary = Summary()  # tokens

    @classmethod
    def merged(cls, measured: Sequence[Measured]) -> Measured:
        """The summaries of all rollouts together; their order matters for the last digit at most."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: Summary.merged(getattr(each, name) for each in measured) for name in names})


def measure(
    scored: ScoredBatch, values: TokenValues, clip: tuple[float, float] | None, thinking: bool
) -> Measured:
    """Sums up one micro-batch. ``clip`` and ``thinking`` are the recipe's."""
    rollouts, samples = scored.trajectories.rollouts, scored.trajectories.samples
    parsed = [parse_answer(rollout.text, thinking=thinking) for rollout in rollouts]
    annotated = [(a, sample) for a, sample in zip(parsed, samples, strict=True) if sample.spans]
    sampled_B1 = torch.tensor([rollout.logprobs is not None for rollout in rollouts])[:, None]
    clipped = Summary()
    if clip is not None:
        clipped = _share(is_clipped(values.ratio, values.advantage, clip), values.ratio + values.advantage)
    rewards = [] if scored.signal.reward_B is None else scored.signal.reward_B.tolist()
    prompts = [row.prompt for row in scored.rows]
    return Measured(
        reverse_kl=Summary.of((values.old - values.teacher)[sampled_B1.expand_as(values.old)]),
        analytic_kl=Summary.of(values.kl),
        reference_kl=Summary.of(k3(values.reference - values.current)),
        token_reward=Summary.of(values.reward),
        outlier=_share(values.reward.abs() > OUTLIER_NATS, values.reward),
        advantage=Summary.of(values.advantage),
        ratio_off=Summary.of((values.ratio - 1.0).abs()),
        clipped=clipped,
        weight=Summary.of(values.weight),
        entropy=Summary.of(values.entropy),
        current=Summary.of(values.current),
        rollout_reward=Summary.of(rewards),
        length=Summary.of([len(rollout.token_ids) for rollout in rollouts]),
        truncated=Summary.of([rollout.truncated for rollout in rollouts]),
        unparsed=Summary.of([a.span is None for a in parsed]),
        iou=Summary.of([best_iou(a.span, sample.spans) for a, sample in annotated]),
        repeated_prompt=Summary.of(
            [p.length for p, group in zip(prompts, scored.groups, strict=True) for _ in group]
        ),
        equal_group=Summary.of(_equal_groups(scored, rewards)),
        prompt=Summary.of([prompt.length for prompt in prompts]),
        video=Summary.of([prompt.video_tokens for prompt in prompts]),
    )


def _share(true_BT: torch.Tensor, among_BT: torch.Tensor) -> Summary:
    """Ones where ``true_BT``, zeros elsewhere, counted where ``among_BT`` is finite."""
    return Summary.of(true_BT[among_BT.isfinite()].double())


def _equal_groups(scored: ScoredBatch, rewards: Sequence[float]) -> list[float]:
    """For each group of rollouts, 1 if all of them got the same reward; nothing without such rewards."""
    remaining = iter(rewards)
    return [float(len({next(remaining) for _ in group}) == 1) for group in scored.groups if rewards]


def step_metrics(measured: Sequence[Measured]) -> dict[str, float]:
    """The metrics of the global batch, from all micro-batches of all processes; NaN if nothing was
    measured."""
    m = Measured.merged(measured)
    # A method rewards tokens or whole responses.
    reward = m.token_reward if m.token_reward.n else m.rollout_reward
    return {
        "rollouts": m.length.n,
        "reverse_kl/sampled": m.reverse_kl.mean,
        "reverse_kl/analytic": m.analytic_kl.mean,
        "reference_kl/sampled": m.reference_kl.mean,
        "reward/mean": reward.mean,
        "reward/std": reward.std,
        "reward/min": reward.smallest,
        "reward/max": reward.largest,
        "reward/outlier_share": m.outlier.mean,
        "reward/equal_group_share": m.equal_group.mean,
        "advantage/mean": m.advantage.mean,
        "advantage/std": m.advantage.std,
        "policy/ratio_off_max": m.ratio_off.largest,
        "policy/clipped_share": m.clipped.mean,
        "policy/importance_weight_mean": m.weight.mean,
        "policy/entropy": m.entropy.mean,
        "response/length_mean": m.length.mean,
        "response/length_max": int(m.length.high) if m.length.n else math.nan,
        "response/truncated_share": m.truncated.mean,
        "response/unparsed_share": m.unparsed.mean,
        "response/iou_mean": m.iou.mean,
        "response/nll": -m.current.mean,
        "loss/masked_tokens": int(m.length.total) - m.current.n,
    }


def token_counts(
    measured: Sequence[Measured], needs: Needs, *, prefix_engine: bool, continued_prefill: bool
) -> dict[str, int]:
    """How many tokens each stage put through a model.

    The plain engine puts a prompt through the model once for each of its rollouts. An update that continues
    the prefill of sampling puts the response through it alone.
    """
    m = Measured.merged(measured)
    prompt, response = int(m.prompt.total), int(m.length.total)
    scored = (prompt if prefix_engine else int(m.repeated_prompt.total)) + response
    return {
        "tokens/video": int(m.video.total),
        "tokens/prompt": prompt,
        "tokens/response": response,
        "tokens/prefill": prompt if prefix_engine and needs.sampling else 0,
        "tokens/sample": response if needs.sampling else 0,
        "tokens/teacher": scored if needs.teacher else 0,
        "tokens/reference": scored if needs.reference else 0,
        "tokens/update": response if continued_prefill else scored,
    }
