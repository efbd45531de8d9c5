"""A key/value cache that answers are appended to in place.

``DynamicCache`` concatenates: every token of an answer copies the keys and values of its whole prompt. With
prompts of thousands of tokens that is most of the time of sampling.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # tokens; a longer answer copies once for every so many


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, L, d] are views of buffers with room for more tokens. Not for gradients."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        # Without any room: whoever else holds these tensors is never written to.
        self.keys = self._keys = keys
        self.values = self._values = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled(), "what is overwritten cannot be differentiated"
        done, new = self.keys.shape[-2], key_states.shape[-2]
        if done + new > self._keys.shape[-2]:
            room = max(ROOM, new)
            self._keys = pad(self.keys, (0, 0, 0, room))
            self._values = pad(self.values, (0, 0, 0, room))
        self._keys[..., done : done + new, :] = key_states
        self._values[..., done : done + new, :] = value_states
        self.keys, self.values = self._keys[..., : done + new, :], self._values[..., : done + new, :]
        return self.keys, self.values


def grow_in_place(cache: DynamicCache) -> None:
    """Lets the layers of ``cache`` grow in place; other caches that hold the same tensors are left alone."""
    assert all(type(layer) is DynamicLayer for layer in cache.layers), "Qwen3-VL has plain layers only"
    cache.layers = [GrowingLayer(layer.keys, layer.values) for layer in cache.layers]
