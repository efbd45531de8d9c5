"""Key/value caches that copy less than transformers' own.

``DynamicCache`` concatenates for every new token and keeps the result. While sampling, each token of a
response would copy the keys and values of its whole prompt; a forward on top of a prefix would leave a copy
of them behind.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from video_opd.models.chunk_sizes import CACHE_ROOM


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, L, d] as views of buffers with room for more tokens. Not for gradients."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        super().__init__()
        self.room = room
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        # The buffers start without room, so tensors that another cache holds are never written to.
        self.keys = self._keys = keys
        self.values = self._values = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled(), "a buffer that is written in place cannot be differentiated"
        done, new = self.keys.shape[-2], key_states.shape[-2]
        if done + new > self._keys.shape[-2]:
            room = max(self.room, new)
            self._keys = pad(self.keys, (0, 0, 0, room))
            self._values = pad(self.values, (0, 0, 0, room))
        self._keys[..., done : done + new, :] = key_states
        self._values[..., done : done + new, :] = value_states
        self.keys, self.values = self._keys[..., : done + new, :], self._values[..., : done + new, :]
        return self.keys, self.values


class FixedLayer(DynamicLayer):
    """Keys and values [B, heads, L, d] of which every forward is given all columns, also those that no token
    has written yet, which its mask has to hide. Not for gradients.

    ``columns`` says where the next tokens go. So a forward is the same sequence of operations on the same
    memory for every token, which a CUDA graph can repeat.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, columns: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.columns = keys, values, columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled(), "a buffer that is written in place cannot be differentiated"
        # Under autocast a cache that was concatenated is in the wider of two types.
        self.keys.index_copy_(2, self.columns, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.columns, value_states.to(self.values.dtype))
        return self.keys, self.values


class ReadOnlyLayer(DynamicLayer):
    """Keys and values that are extended for one forward but do not grow. Gradients flow through them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def read_only(cache: DynamicCache) -> DynamicCache:
    """A cache with the same keys and values for a forward on top of them that keeps nothing."""
    other = copy.copy(cache)
    other.layers = [ReadOnlyLayer(layer.keys, layer.values) for layer in cache.layers]
    return other


def grow_in_place(cache: DynamicCache, width: int = 1) -> None:
    """Lets the layers of ``cache`` grow in place by ``width`` tokens at a time. Other caches that hold the
    same tensors are not changed."""
    assert all(type(layer) is DynamicLayer for layer in cache.layers), "Qwen3-VL has plain layers only"
    cache.layers = [GrowingLayer(layer.keys, layer.values, CACHE_ROOM * width) for layer in cache.layers]


def lengthen(cache: DynamicCache, room: int, columns: torch.Tensor) -> None:
    """Gives the layers of ``cache`` a fixed length, which is ``room`` columns more than they have; new tokens
    go to ``columns``. Other caches that hold the same tensors are not changed. One layer after the other lets
    go of what it had, so that no second cache is held."""
    cache.layers = list(cache.layers)
    for number, layer in enumerate(cache.layers):
        keys, values = pad(layer.keys, (0, 0, 0, room)), pad(layer.values, (0, 0, 0, room))
        cache.layers[number] = FixedLayer(keys, values, columns)
