"""The prefix: prompts after their prefill, from which sampling and scoring continue.

Shapes: ``B`` prompts, ``P`` columns of the cache (prompt tokens and padding), ``D`` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from video_opd.models.prompt_batch import row_index
from video_opd.types import EncodedPrompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import DynamicCache


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """The keys and values of prompts, and the state from which their responses begin.

    Prompts are padded at the end (for flash attention in front), those that share a video also behind the
    shared tokens and before their own (:mod:`video_opd.models.sharing`). Only the mask reflects this;
    positions are those of the prompt alone.

    Sampling and scoring do not change a prefix, so it can be used any number of times until the weights of
    ``prefilled_by`` change. ``grad``: the prefill recorded its graph, and one update can be differentiated
    through it.
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
        """Prompt b ``repeats[b]`` times in a row; see :meth:`select`."""
        return self.select(row_index(repeats).tolist())

    def select(self, rows: Sequence[int]) -> Prefix:
        """A prefix whose prompt i is this prefix's prompt ``rows[i]``; its cache may be written to.

        Gradients flow back into this prefix. Nothing is copied if ``rows`` is every prompt once, in order.
        """
        cache = copy_cache(self.cache)
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

    def cut(self) -> tuple[Prefix, Callable[[], None]]:
        """(the same prefix as leaves, what goes on with the backward).

        A backward from responses ends at the leaves, and the second result, called once after it, carries it
        on through the prompts. A weight then gives away its gradient of the responses before that of the
        prompts is computed. In one backward autograd would hold the first until it can add the second: as
        many numbers as there are weights, beside the gradients of earlier micro-batches.
        """
        ends: list[tuple[torch.Tensor, torch.Tensor]] = []

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            ends.append((tensor, tensor.detach().requires_grad_()))
            return ends[-1][1]

        cache = copy_cache(self.cache)
        for layer in cache.layers:
            layer.keys, layer.values = leaf(layer.keys), leaf(layer.values)
        same = replace(self, cache=cache, last_hidden_BD=leaf(self.last_hidden_BD))

        def go_on() -> None:
            found = [_Found.apply(tensor, [end.grad]) for tensor, end in ends if end.grad is not None]
            ends.clear()  # the graph holds what it needs
            torch.autograd.backward(found)

        return same, go_on


class _Found(torch.autograd.Function):
    """A zero, whose backward gives a tensor the gradient that was found at its leaf, and lets go of it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gradient: list[torch.Tensor]) -> torch.Tensor:
        ctx.gradient = gradient
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient.pop(), None


class Unprefilled:
    """Stands in for the prefix of prompts that another engine prefills by itself, or another process."""

    def __init__(self, prompts: Sequence[EncodedPrompt]) -> None:
        self.prompts = prompts

    def select(self, rows: Sequence[int]) -> Unprefilled:
        return Unprefilled([self.prompts[row] for row in rows])

    def __len__(self) -> int:
        return len(self.prompts)


def prompts_of(given: Sequence[EncodedPrompt] | Prefix | Unprefilled) -> Sequence[EncodedPrompt]:
    """The prompts of a prefix, or prompts as they are."""
    return given.prompts if isinstance(given, Prefix | Unprefilled) else given


def copy_cache(cache: DynamicCache) -> DynamicCache:
    """A cache with the same keys and values that may be written to, because it grows by replacing its
    tensors."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def select_rows(cache: DynamicCache, rows: Sequence[int], count: int) -> None:
    """Changes a cache of ``count`` rows in place, so that its row i is what row ``rows[i]`` was."""
    times, rest = divmod(len(rows), count)
    if rest == 0 and list(rows) == row_index([times] * count).tolist():
        if times != 1:
            cache.batch_repeat_interleave(times)  # its gradient is a sum, not a scatter
    else:
        cache.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))
