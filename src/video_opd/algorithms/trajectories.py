"""The two sources of trajectories: the student samples them, or they are the text of the annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from video_opd.config import OnPolicySamplingConfig
from video_opd.data.prompts import STYLES
from video_opd.models.interfaces import Sampler
from video_opd.types import Rollout, Sample


class SampledTrajectories:
    """eq 4: τ ~ π_θ(·|v, q), ``sampling.rollouts`` for each prompt, with the log-prob of every token."""

    def __init__(self, sampling: OnPolicySamplingConfig) -> None:
        self.sampling = sampling

    def __call__(
        self, sampler: Sampler, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        return sampler.sample(
            prefix,
            n=self.sampling.rollouts,
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            seeds=seeds,
        )


class AnnotatedTrajectories:
    """The annotated span in the answer format of a prompt style, then the end-of-sequence token (sec. C).

    If a row has several annotated spans, the seed chooses one, so that training sees each of them.
    """

    def __init__(self, tokenizer: Any, style: str = "paper") -> None:
        self.tokenizer, self.style = tokenizer, STYLES[style]

    def __call__(
        self, sampler: Sampler, prefix: Any, samples: Sequence[Sample], seeds: Sequence[Sequence[int]]
    ) -> list[list[Rollout]]:
        return [[self._rollout(sample, seed)] for sample, (seed,) in zip(samples, seeds, strict=True)]

    def _rollout(self, sample: Sample, seed: int) -> Rollout:
        assert sample.spans, f"{sample.id}: rows without an annotation must be left out before"
        text = self.style.write_answer(sample.spans[seed % len(sample.spans)])
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Rollout(
            token_ids=(*ids, self.tokenizer.eos_token_id), logprobs=None, text=text, truncated=False
        )
