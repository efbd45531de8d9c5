"""All answers to a prompt side by side in one row on top of it: its keys and values are repeated for none.

    columns of the cache:   prompt | a₀ b₀ c₀ | a₁ b₁ c₁ | …

Token ``t`` of an answer sees the prompt and the tokens up to ``t`` of its own answer; a mask says so. Its
position is that of token ``t`` after the prompt.

Shapes: ``B`` prompts, ``G`` answers a prompt (the most of any), ``R`` tokens of an answer, ``P`` columns of
the prompts, ``Q`` = ``R * G`` columns of answers, ``K`` = ``P + Q``, ``N`` answers of all prompts together,
prompt-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from video_opd.models.prompt_batch import row_index


def response_attention_mask(
    prompt_mask_BP: torch.Tensor, beside: int, first: int, steps: int
) -> torch.Tensor:
    """Bool [B, 1, Q, K]: what the ``steps`` tokens from ``first`` on, of ``beside`` = G answers, see.

    Q is ``steps * beside``, K is ``P + (first + steps) * beside``.
    """
    device = prompt_mask_BP.device
    query_Q = torch.arange(first * beside, (first + steps) * beside, device=device)
    key_K = torch.arange((first + steps) * beside, device=device)
    same_answer_QK = (query_Q[:, None] - key_K) % beside == 0
    own_QK = same_answer_QK & (key_K <= query_Q[:, None])
    rows, columns = prompt_mask_BP.shape
    prompt_BQP = prompt_mask_BP.bool()[:, None].expand(rows, len(query_Q), columns)
    return torch.cat([prompt_BQP, own_QK.expand(rows, -1, -1)], dim=2)[:, None]


def for_attention(mask_B1QK: torch.Tensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask as ``implementation`` takes it: ``eager`` adds it to the scores."""
    if implementation != "eager":
        return mask_B1QK
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask_B1QK.shape, dtype=dtype, device=mask_B1QK.device).masked_fill(~mask_B1QK, lowest)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseLayout:
    """Where the answer of each flat row stands: prompt ``prompt_N``, place ``place_N`` of ``width`` = G."""

    prompt_N: torch.Tensor
    place_N: torch.Tensor
    width: int
    prompts: int

    @classmethod
    def of(cls, repeats: Sequence[int], device: torch.device) -> ResponseLayout:
        """Of ``repeats[b]`` answers to prompt b."""
        places = [place for count in repeats for place in range(count)]
        return cls(
            prompt_N=row_index(repeats).to(device),
            place_N=torch.tensor(places, device=device),
            width=max(repeats),
            prompts=len(repeats),
        )

    def laid_out(self, ids_NR: torch.Tensor, pad_id: int) -> torch.Tensor:
        """Token ids [B, R·G], step after step; ``pad_id`` where a prompt has fewer answers than others."""
        ids_BRG = ids_NR.new_full((self.prompts, ids_NR.shape[1], self.width), pad_id)
        ids_BRG[self.prompt_N, :, self.place_N] = ids_NR
        return ids_BRG.flatten(1)

    def picked(self, hidden_BQD: torch.Tensor) -> torch.Tensor:
        """[N, R, D] of what was laid out."""
        hidden_BRGD = hidden_BQD.unflatten(1, (-1, self.width))
        return hidden_BRGD[self.prompt_N, :, self.place_N]
