"""The prompt, read once: what sampling and scoring start from.

Shapes: ``B`` prompts, ``P`` columns of the cache (prompt tokens and padding), ``D`` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from video_opd.models.prompt_batch import row_index
from video_opd.types import EncodedPrompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import DynamicCache


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Keys and values of prompts, and where their answers begin.

    Prompts are padded on the left; those that share a video also between what they share and what they do
    not (:mod:`video_opd.models.sharing`). Only the mask knows: positions are those of the prompt alone.

    Sampling and scoring leave it as it is, so one prefix serves any number of both, as long as the weights
    are those that read it. ``grad``: the reading was recorded, and one update can be differentiated through
    it.
    """

    prefilled_by: nn.Module
    prompts: tuple[EncodedPrompt, ...]
    cache: DynamicCache
    attention_mask_BP: torch.Tensor
    next_position_B: torch.Tensor  # rotary position of the first response token
    last_hidden_BD: torch.Tensor  # predicts the first response token
    grad: bool

    def __len__(self) -> int:
        return len(self.prompts)

    def repeated(self, repeats: Sequence[int]) -> Prefix:
        """Prompt b ``repeats[b]`` times in a row; see :meth:`taken`."""
        return self.select(row_index(repeats).tolist())

    def select(self, rows: Sequence[int]) -> Prefix:
        """Prompt ``rows[i]`` at place i, with a cache that may be written to.

        Gradients flow back into this prefix. Nothing is copied where every prompt is taken once, in order.
        """
        cache = copied(self.cache)
        select_rows(cache, rows, len(self))
        index = torch.tensor(rows, device=self.next_position_B.device)
        return Prefix(
            prefilled_by=self.prefilled_by,
            prompts=tuple(self.prompts[row] for row in rows),
            cache=cache,
            attention_mask_BP=self.attention_mask_BP[index],
            next_position_B=self.next_position_B[index],
            last_hidden_BD=self.last_hidden_BD[index],
            grad=self.grad,
        )


def copied(cache: DynamicCache) -> DynamicCache:
    """The same keys and values in a cache that may be written to: it grows by replacing its tensors."""
    copy_of = copy.copy(cache)
    copy_of.layers = [copy.copy(layer) for layer in cache.layers]
    return copy_of


def select_rows(cache: DynamicCache, rows: Sequence[int], count: int) -> None:
    """Row ``rows[i]`` of a cache of ``count`` rows at place i, in the cache itself."""
    times, rest = divmod(len(rows), count)
    if rest == 0 and list(rows) == row_index([times] * count).tolist():
        if times != 1:
            cache.batch_repeat_interleave(times)  # its gradient is a sum, not a scatter
    else:
        cache.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
