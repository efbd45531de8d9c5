"""Where trajectories come from: the student writes them, or the annotation is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from video_opd.config import SamplingConfig
from video_opd.data.prompts import STYLES
from video_opd.models.interfaces import Policy
from video_opd.types import Rollout, Sample


def sampled(
    policy: Policy, prefix: Any, sampling: SamplingConfig, seeds: Sequence[Sequence[int]]
) -> list[list[Rollout]]:
    """eq 4: τ ~ π_θ(·|v, q), ``sampling.rollouts`` for each prompt, with the log-prob of every token."""
    return policy.sample(
        prefix,
        n=sampling.rollouts,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seeds=seeds,
    )


class Annotated:
    """The annotation in the answer format of a prompt style, ended by the end-of-sequence token (sec. C).

    Of several annotated spans the seed decides which one, so that each is shown in the course of training.
    """

    def __init__(self, tokenizer: Any, style: str = "paper") -> None:
        self.tokenizer, self.style = tokenizer, STYLES[style]

    def __call__(self, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]) -> list[list[Rollout]]:
        return [[self._rollout(sample, seed)] for sample, (seed,) in zip(samples, seeds, strict=True)]

    def _rollout(self, sample: Sample, seed: int) -> Rollout:
        assert sample.spans, f"{sample.id}: rows without an annotation are left out before"
        text = self.style.write_answer(sample.spans[seed % len(sample.spans)])
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Rollout(
            token_ids=(*ids, self.tokenizer.eos_token_id), logprobs=None, text=text, truncated=False
        )
