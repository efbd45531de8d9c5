"""The layers of a trained model in shards, gathered one at a time, in forwards and in backwards.

A layer is whole while its forward runs, and once more while its backward runs, which begins with that
forward (gradient checkpointing) and ends with the reduction of the layer's gradients. Between two layers
nothing of either is whole. As in :mod:`~video_opd.models.collective_passes`, processes agree on what is run
next; here the backward of the vision tower and of the decoder are runs, too:

    process 0:  vision tower, decoder, decoder, …, backward of the decoder, backward of the vision tower

A process that does not need a run gathers the same layers and computes nothing. In a backward it takes part
in the reductions with zeros.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from video_opd.models.collective_passes import Agreement, before_each_run
from video_opd.models.modes import computing_in
from video_opd.models.recompute import OneLayer, cached_layer

T = TypeVar("T")
Reduce = Callable[[Any], None]


class GatheredLayers:
    """Takes over the layers of ``model``, which FSDP2 holds in shards, from FSDP's own hooks.

    ``reduce`` is called with a layer that is whole and has met its gradients; it takes them away. The rest of
    the model (embeddings, ``lm_head``, mergers, norms) is not touched, and must be whole while it is run.
    """

    def __init__(self, model: Any, mesh: DeviceMesh, device: torch.device, reduce: Reduce) -> None:
        self._agreement, self._reduce = Agreement(mesh, device), reduce
        decoder, tower = model.model.language_model, model.model.visual
        _prefetch_nothing(model)
        # Backwards come after forwards, and the vision tower's after the decoder's.
        for layers in (tower.blocks, decoder.layers):
            begin = functools.partial(
                self._agreement.reach, self._agreement.add(functools.partial(self._no_backward, layers))
            )
            for layer in layers:
                _Layer(layer, begin if layer is layers[-1] else None, reduce)
        for part, layers in ((decoder, decoder.layers), (tower, tower.blocks)):
            number = self._agreement.add(functools.partial(self._no_forward, layers))
            before_each_run(part, functools.partial(self._agreement.reach, number))

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, in which this process runs the model, and its backward, as often as it
        likes. All processes call it together."""
        return self._agreement.together(work)

    def _no_forward(self, layers: Sequence[Any]) -> None:
        for layer in layers:
            layer.unshard()
            layer.reshard()

    def _no_backward(self, layers: Sequence[Any]) -> None:
        for layer in reversed(layers):
            layer.unshard()
            self._reduce(layer)
            layer.reshard()


class _Layer:
    """One layer: whole in its forward and its backward. ``begin`` agrees on a backward, which begins here."""

    def __init__(self, layer: Any, begin: Callable[[], None] | None, reduce: Reduce) -> None:
        self.layer, self.reduce, self._begin, self._begun = layer, reduce, begin, False
        self._forward = layer.forward
        self._trained = any(weight.requires_grad for weight in layer.parameters())
        _prefetch_nothing(layer)
        layer.forward = self._checkpointed
        before_each_run(layer, layer.unshard)
        # Its own hook on the output comes before FSDP's, which would gather at once.
        layer.register_forward_hook(self._announce, prepend=True)
        layer.register_forward_hook(lambda *_: layer.reshard())

    def begin_backward(self) -> None:
        """Gathers the layer; the first one of a backward waits for its turn."""
        if not self._begun:
            self._begun = True
            if self._begin is not None:
                self._begin()
            self.layer.unshard()

    def end_backward(self) -> None:
        self.reduce(self.layer)
        self.layer.reshard()
        self._begun = False

    def run(
        self, hidden: torch.Tensor, cached: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor | None, ...]:
        """(hidden states, keys and values, if there is a cache)."""
        if cached is None:
            return self._forward(hidden, **inputs), None, None
        alone = OneLayer(cached)
        return self._forward(hidden, past_key_values=alone, **inputs), alone.keys, alone.values

    def _checkpointed(self, hidden: torch.Tensor, *, past_key_values: Any = None, **inputs: Any) -> Any:
        cached = None if past_key_values is None else cached_layer(past_key_values, self.layer)
        before = (None, None) if cached is None or not cached.is_initialized else (cached.keys, cached.values)
        differentiated = self._trained or any(t is not None and t.requires_grad for t in (hidden, *before))
        if not (torch.is_grad_enabled() and differentiated):
            if past_key_values is not None:
                inputs["past_key_values"] = past_key_values
            return self._forward(hidden, **inputs)
        anchor = torch.empty(0, device=hidden.device, requires_grad=True)
        result, keys, values = _Again.apply(
            self, _with(cached, (None, None)), inputs, anchor, hidden, *before
        )
        if cached is not None:
            cached.update(keys, values)
        return result

    def _announce(self, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.begin_backward())


def _prefetch_nothing(module: Any) -> None:
    """Before the backward of a module FSDP would gather another one, which nobody has agreed on."""
    module.set_modules_to_backward_prefetch([module])


def _with(cached: Any, keys_and_values: Sequence[torch.Tensor | None]) -> Any:
    """The cache of a layer with other keys and values; it may have grown since they were taken."""
    if cached is None:
        return None
    other = copy.copy(cached)
    other.keys, other.values = keys_and_values
    return other


class _Again(torch.autograd.Function):
    """The forward of a layer without a graph; the backward repeats it, with one.

    Unlike torch's checkpointing, it knows when the layer's backward begins and ends. ``anchor`` makes
    autograd come here also if only the layer's weights want a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: _Layer,
        cached: Any,
        inputs: dict[str, Any],
        anchor: torch.Tensor,
        hidden: torch.Tensor,
        *before: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        kind = hidden.device.type
        ctx.layer, ctx.inputs = layer, inputs
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.cached = cached
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, *before)
        return layer.run(hidden, _with(cached, before), inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        layer: _Layer = ctx.layer
        layer.begin_backward()
        leaves = [
            None if saved is None else saved.detach().requires_grad_(needed)
            for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)
        ]
        hidden, *before = leaves
        assert hidden is not None
        with torch.enable_grad(), computing_in(ctx.dtype, hidden.device):
            outputs = layer.run(hidden, _with(ctx.cached, before), ctx.inputs)
        found = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if output is not None and grad is not None and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in found], [grad for _, grad in found])
        layer.end_backward()
        return None, None, None, None, *[None if leaf is None else leaf.grad for leaf in leaves]
