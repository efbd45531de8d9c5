"""Gradient checkpointing that keeps the key/value cache.

transformers drops the cache of a layer that it checkpoints, because the layer would write its keys and
values again when its forward is repeated. Here the checkpointed function returns the keys and values together
with the hidden states, and only the caller puts them into the cache. So a prompt is prefilled once and
rollouts are sampled from that prefix. The backward of an update goes from the layers of the responses to the
keys and values of the prompt, and from there through the prompt layer by layer, repeating each layer's
forward.

For each prompt, memory holds the input of each layer, its keys and values, and the gradients of these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache, DynamicLayer

from video_opd.models.loading import no_library_warnings


def let_library_recompute(model: Any, engine: str) -> None:
    """Lets transformers checkpoint the layers of ``model`` that the engine does not checkpoint itself: the
    prefix engine needs the cache of its decoder layers, and leaves the vision tower."""
    checkpointed = model.model.visual if engine == "prefix" else model
    old_name = checkpointed.gradient_checkpointing_enable  # before transformers 5.23
    # It warns of a vision tower without token embeddings. Gradients reach all weights without them, because
    # checkpointing that is not reentrant needs no input that requires gradients.
    with no_library_warnings():
        getattr(checkpointed, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
    model.train()  # transformers checkpoints in training mode only


@contextmanager
def recomputing(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, forwards of these decoder layers are checkpointed if they record gradients.

    ``forward`` of each layer is replaced, as Accelerate's hooks do it, and put back afterwards. The backward
    may come later, outside.
    """
    layers = list(layers)
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.forward = forward


class OneLayer:
    """Replaces the cache in one forward of one layer, and records the keys and values that it is given."""

    def __init__(self, layer: DynamicLayer) -> None:
        self.layer = layer
        self.keys = self.values = torch.empty(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = key_states, value_states
        return self.layer.update(key_states, value_states)


def cached_layer(cache: DynamicCache, layer: Any) -> DynamicLayer:
    """The keys and values of a decoder layer in a cache."""
    return cache.layers[layer.self_attn.layer_idx]


def _checkpointed(
    forward: Any, hidden_states: torch.Tensor, *, past_key_values: DynamicCache | None = None, **inputs: Any
) -> torch.Tensor:
    if past_key_values is None or not torch.is_grad_enabled():
        return forward(hidden_states, past_key_values=past_key_values, **inputs)
    cached = cached_layer(past_key_values, forward.__self__)
    before = copy.copy(cached)  # ``cached`` itself may have grown when the backward comes

    def run(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        alone = OneLayer(copy.copy(before))
        result = forward(hidden_states, past_key_values=alone, **inputs)
        return result, alone.keys, alone.values

    result, keys, values = checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)
    cached.update(keys, values)
    return result
