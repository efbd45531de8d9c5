"""Decoding: responses are written token by token until each has ended or reached the length limit.

Shapes: ``B`` rollouts (``G`` for each prompt), ``T`` response tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from video_opd.models.forward_passes import ForwardPasses
from video_opd.models.head import ResponseHead
from video_opd.models.prefix import Prefix
from video_opd.models.sampling import SamplingSettings, draw, sampled_logprobs
from video_opd.types import EncodedPrompt


class Decoder(Protocol):
    """Gives the hidden state [B, D] that predicts the next token of every rollout."""

    def first(self) -> torch.Tensor:
        """The state that predicts the first token."""
        ...

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        """The state that predicts the token after ``token_B``."""
        ...


class PrefixDecoder:
    """Puts one token of every rollout on top of a cache of its own, which starts as the prefix."""

    def __init__(self, passes: ForwardPasses, prefix: Prefix, n: int) -> None:
        from video_opd.models.kv_cache import grow_in_place

        self.passes = passes
        self.width = n if passes.side_by_side else 1
        self.prefix = prefix.repeated([n // self.width] * len(prefix))
        grow_in_place(self.prefix.cache, self.width)
        self.mask_BL, self.done = self.prefix.attention_mask_BP, 0

    def first(self) -> torch.Tensor:
        return self.prefix.last_hidden_BD.repeat_interleave(self.width, 0)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        if self.width == 1:
            self.mask_BL = torch.cat([self.mask_BL, torch.ones_like(token_B)[:, None]], dim=1)
            mask = self.mask_BL
        else:
            mask = self.passes.response_mask(self.prefix, self.width, self.done, 1)
        ids_BG = token_B.view(-1, self.width)
        hidden_BGD = self.passes.extend(self.prefix, ids_BG, mask, self.done, self.width)
        self.done += 1
        return hidden_BGD.flatten(0, 1)


class PlainDecoder:
    """Runs the model on the whole sequence again for every token."""

    def __init__(self, passes: ForwardPasses, prompts: Sequence[EncodedPrompt], n: int) -> None:
        self.passes = passes
        self.batch = passes.batch(prompts).repeated([n] * len(prompts))
        self.ids_BR = self.batch.input_ids_BP[:, :0]

    def first(self) -> torch.Tensor:
        mask_BR = torch.ones_like(self.ids_BR, dtype=torch.bool)
        return self.passes.concatenated(self.batch, self.ids_BR, mask_BR, share_videos=False)[:, -1]

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        self.ids_BR = torch.cat([self.ids_BR, token_B[:, None]], dim=1)
        return self.first()


def decode(
    decoder: Decoder,
    head: ResponseHead,
    settings: SamplingSettings,
    max_new_tokens: int,
    uniforms_BT: torch.Tensor | None,
) -> list[tuple[list[int], list[float]]]:
    """(token ids, log-probabilities) of each rollout, cut after its first end-of-sequence token.

    ``uniforms_BT`` decides the draws; None takes the most likely token.
    """
    hidden_BD = decoder.first()
    eos = torch.tensor(sorted(head.vocabulary.eos_ids), device=hidden_BD.device)
    tokens, logprobs = [], []
    finished_B = torch.zeros(len(hidden_BD), dtype=torch.bool, device=hidden_BD.device)
    for t in range(max_new_tokens):
        logprobs_BV = sampled_logprobs(head.logits(hidden_BD), settings)
        token_B = logprobs_BV.argmax(-1) if uniforms_BT is None else draw(logprobs_BV, uniforms_BT[:, t])
        tokens.append(token_B)
        logprobs.append(logprobs_BV.gather(-1, token_B[:, None]).squeeze(-1))
        finished_B = finished_B | torch.isin(token_B, eos)
        if t + 1 == max_new_tokens or bool(finished_B.all()):
            break
        hidden_BD = decoder.step(token_B)
    rows = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
    return [
        (ids[: (length := _length(ids, head.vocabulary.eos_ids))], values[:length]) for ids, values in rows
    ]


def _length(ids: Sequence[int], eos_ids: frozenset[int]) -> int:
    """The number of tokens up to the first end-of-sequence token, that one included."""
    return next((t + 1 for t, token in enumerate(ids) if token in eos_ids), len(ids))
