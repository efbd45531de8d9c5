"""The tokens that a model finds likeliest at each position of a response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

COUNT = 3  # tokens that are kept of each position
Alternatives = list[list[tuple[int, float]]]
"""For each position (token id, log-prob in nats), the likeliest first."""


def likeliest(full_TV: torch.Tensor, count: int = COUNT) -> Alternatives:
    """Returns the ``count`` likeliest tokens of each of the distributions ``full_TV`` (log-probs)."""
    top = full_TV.detach().topk(min(count, full_TV.shape[-1]), dim=-1)
    ids_TK, values_TK = top.indices.cpu().tolist(), top.values.cpu().double().tolist()
    return [list(zip(ids, values, strict=True)) for ids, values in zip(ids_TK, values_TK, strict=True)]


def text_of_token(processor: Any) -> Callable[[int], str]:
    """Returns the function that gives the text of one token, a special token's too."""
    tokenizer = processor.tokenizer
    return lambda token: str(tokenizer.decode([token]))
