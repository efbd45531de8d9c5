"""From logits to a token: temperature, top-k, top-p, and draws that depend only on their seed.

Shapes: ``B`` rollouts, ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings that decide how a token is chosen. The defaults sample the model's own distribution.

    ``temperature=0`` is greedy: the most likely token, recorded with its log-probability at temperature 1.
    ``top_k=0`` and ``top_p=1.0`` switch the filters off. The order is that of transformers: temperature,
    top-k, top-p.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def seeds_of_rollouts(seeds: Sequence[Sequence[int]] | None, prompts: int, n: int) -> Sequence[Sequence[int]]:
    """The seeds. Raises ``ValueError`` unless there is one for each of ``n`` rollouts of each prompt."""
    if seeds is None or [len(row) for row in seeds] != [n] * prompts:
        raise ValueError(f"sampling needs seeds: {prompts} lists of {n} integers, one for each rollout")
    return seeds


def rollout_uniforms(seeds: Sequence[int], length: int) -> np.ndarray:
    """Float64 [B, length] in [0, 1): entry (b, t) is a function of ``(seeds[b], t)`` alone.

    So the draws of a rollout do not depend on its batch, on other rollouts, or on the length limit. Philox is
    counter-based and gives the same numbers on every platform.
    """
    return np.stack([np.random.Generator(np.random.Philox(seed)).random(length) for seed in seeds])


def sampled_logprobs(logits_BV: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Float32 log-probabilities [B, V] of the sampled distribution; -inf for tokens that a filter removed."""
    logits_BV = logits_BV.float()
    if settings.greedy:
        return logits_BV.log_softmax(-1)
    if settings.temperature != 1.0:
        logits_BV = logits_BV / settings.temperature
    if 0 < settings.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if settings.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = sorted_BV.softmax(-1)
        # A token stays if the tokens before it have not reached top_p, so the first one always stays.
        drop_BV = probs_BV.cumsum(-1) - probs_BV >= settings.top_p
        drop_BV[:, 0] = False
        removed_BV = torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV)
        logits_BV = logits_BV.masked_fill(removed_BV, -torch.inf)
    return logits_BV.log_softmax(-1)


def draw(logprobs_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Token ids [B] by inverse CDF: the first token whose cumulative probability exceeds the uniform.

    The CDF is computed in float64 and divided by its last entry, so a token of probability 0 is never drawn.
    A row that is not finite gives some token, whose log-probability is not finite either, so the caller can
    detect it.
    """
    cdf_BV = logprobs_BV.double().exp().cumsum(-1)
    cdf_BV = cdf_BV / cdf_BV[:, -1:]
    token_B = torch.searchsorted(cdf_BV, uniforms_B.double()[:, None].contiguous(), right=True).squeeze(-1)
    return token_B.clamp(max=cdf_BV.shape[-1] - 1)
