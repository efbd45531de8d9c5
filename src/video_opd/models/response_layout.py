"""The layout of all responses to a prompt in one row on top of it: its keys and values are not copied.

    columns of the cache:   prompt | a₀ b₀ c₀ | a₁ b₁ c₁ | …

Token ``t`` of a response attends to the prompt and to the tokens up to ``t`` of its own response: an
attention mask hides the others. Its position is that of token ``t`` after the prompt.

Shapes: ``B`` prompts, ``G`` responses a prompt (the most of any), ``R`` tokens of a response, ``P`` columns
of the prompts, ``Q`` = ``R * G`` columns of responses, ``K`` = ``P + Q``, ``N`` responses of all prompts
together, prompt-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from video_opd.models.prompt_batch import row_index


def response_attention_mask(
    prompt_mask_BP: torch.Tensor, width: int, first: int | torch.Tensor, steps: int, room: int | None = None
) -> torch.Tensor:
    """Bool [B, 1, Q, K]: the columns that each of the ``steps`` tokens from token ``first`` on attends to.

    ``width`` is G. Q is ``steps * width``, and K is ``P + room * width``: the cache has columns for ``room``
    tokens of a response, by default for those until the last query. With a room, ``first`` may be a tensor on
    the device, whose number the host need not know.
    """
    if room is None:
        assert isinstance(first, int)
        room = first + steps
    device = prompt_mask_BP.device
    query_Q = torch.arange(steps * width, device=device) + first * width
    key_K = torch.arange(room * width, device=device)
    same_response_QK = (query_Q[:, None] - key_K) % width == 0
    own_QK = same_response_QK & (key_K <= query_Q[:, None])
    rows, columns = prompt_mask_BP.shape
    prompt_BQP = prompt_mask_BP.bool()[:, None].expand(rows, len(query_Q), columns)
    return torch.cat([prompt_BQP, own_QK.expand(rows, -1, -1)], dim=2)[:, None]


def mask_for(mask_B1QK: torch.Tensor, attention: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask in the form that an attention implementation takes: ``eager`` adds it to the scores."""
    if attention != "eager":
        return mask_B1QK
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask_B1QK.shape, dtype=dtype, device=mask_B1QK.device).masked_fill(~mask_B1QK, lowest)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseLayout:
    """Maps flat rows to the layout: response n is number ``place_N[n]`` of prompt ``prompt_N[n]``.

    ``width`` is G, ``prompts`` is B.
    """

    prompt_N: torch.Tensor
    place_N: torch.Tensor
    width: int
    prompts: int

    @classmethod
    def of(cls, repeats: Sequence[int], device: torch.device) -> ResponseLayout:
        """The layout of ``repeats[b]`` responses to prompt b."""
        places = [place for count in repeats for place in range(count)]
        return cls(
            prompt_N=row_index(repeats).to(device),
            place_N=torch.tensor(places, device=device),
            width=max(repeats),
            prompts=len(repeats),
        )

    def interleave(self, ids_NR: torch.Tensor, pad_id: int) -> torch.Tensor:
        """Token ids [B, R·G] in the layout; ``pad_id`` fills the columns of prompts with fewer responses."""
        ids_BRG = ids_NR.new_full((self.prompts, ids_NR.shape[1], self.width), pad_id)
        ids_BRG[self.prompt_N, :, self.place_N] = ids_NR
        return ids_BRG.flatten(1)

    def separate(self, hidden_BQD: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`interleave` for hidden states: [N, R, D]."""
        hidden_BRGD = hidden_BQD.unflatten(1, (-1, self.width))
        return hidden_BRGD[self.prompt_N, :, self.place_N]
