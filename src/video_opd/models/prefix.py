"""The prompt, read once: what sampling and scoring start from.

Shapes: ``B`` prompts, ``P`` prompt tokens, ``D`` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from video_opd.models.batching import row_index
from video_opd.types import EncodedPrompt

if TYPE_CHECKING:
    from transformers import DynamicCache


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Keys and values of left-padded prompts, and where their answers begin.

    Sampling and scoring leave it as it is, so one prefix serves any number of both.
    """

    prompts: tuple[EncodedPrompt, ...]
    cache: DynamicCache
    attention_mask_BP: torch.Tensor
    next_position_B: torch.Tensor  # rotary position of the first response token
    last_hidden_BD: torch.Tensor  # predicts the first response token

    def __len__(self) -> int:
        return len(self.prompts)

    def repeated(self, repeats: Sequence[int]) -> Prefix:
        """Prompt b ``repeats[b]`` times in a row, with a cache that may be written to.

        Gradients flow back into this prefix. Nothing is copied where every prompt is taken once: a
        ``DynamicCache`` grows by replacing its tensors, not by changing them.
        """
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        rows = row_index(repeats).to(self.next_position_B.device)
        if set(repeats) == {repeats[0]}:
            if repeats[0] != 1:
                cache.batch_repeat_interleave(repeats[0])  # its gradient is a sum, not a scatter
        else:
            cache.batch_select_indices(rows)
        return Prefix(
            prompts=tuple(self.prompts[row] for row in rows.tolist()),
            cache=cache,
            attention_mask_BP=self.attention_mask_BP[rows],
            next_position_B=self.next_position_B[rows],
            last_hidden_BD=self.last_hidden_BD[rows],
        )
