"""Key/value caches that do what one forward after another needs, and no more.

``DynamicCache`` concatenates and keeps: every token of an answer copies the keys and values of its whole
prompt, and a forward on top of a prompt leaves a copy of them behind.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # tokens of each answer; longer ones copy once for every so many


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, L, d] are views of buffers with room for more tokens. Not for gradients."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        super().__init__()
        self.room = room
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
            room = max(self.room, new)
            self._keys = pad(self.keys, (0, 0, 0, room))
            self._values = pad(self.values, (0, 0, 0, room))
        self._keys[..., done : done + new, :] = key_states
        self._values[..., done : done + new, :] = value_states
        self.keys, self.values = self._keys[..., : done + new, :], self._values[..., : done + new, :]
        return self.keys, self.values


class ReadOnlyLayer(DynamicLayer):
    """Keys and values that new ones follow in one forward, but that never grow. With gradients."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def read_only(cache: DynamicCache) -> DynamicCache:
    """The same keys and values, for one more forward on top of them, after which nothing of it is kept."""
    other = copy.copy(cache)
    other.layers = [ReadOnlyLayer(layer.keys, layer.values) for layer in cache.layers]
    return other


def grow_in_place(cache: DynamicCache, answers: int = 1) -> None:
    """Lets the layers of ``cache`` grow in place, by ``answers`` tokens at a time; other caches that hold the
    same tensors are left alone."""
    assert all(type(layer) is DynamicLayer for layer in cache.layers), "Qwen3-VL has plain layers only"
    cache.layers = [GrowingLayer(layer.keys, layer.values, ROOM * answers) for layer in cache.layers]
