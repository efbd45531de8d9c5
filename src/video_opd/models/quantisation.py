"""Frozen linear layers with weights in 8 bits, through torchao.

A layer of weight W [out, in] holds q [out, in] in int8 or float8 and a float32 scale s for each row:
W ≈ s q, with s so that the largest magnitude of a row is the largest that the type has. The product is
computed in the type of the input: int8 computes s (q x), float8 (s q) x. A dequantised copy of one layer's
weight exists while the layer is run.

``lm_head`` and the embeddings keep their type. ``lm_head`` has 2% of the weights of a 32B model, and its
error would go straight into the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from video_opd.config import Quantization
from video_opd.errors import UserError
from video_opd.models.torchao import check_torchao


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is one of torchao's tensors. Gradients flow into its input."""

    @classmethod
    def of(cls, layer: nn.Linear, kind: Quantization, device: torch.device) -> QuantisedLinear:
        """``layer`` with its weight quantised on ``device``; ``layer`` itself is left as it is."""
        from torchao.quantization import quantize_

        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        made.weight = nn.Parameter(layer.weight.detach().to(device), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        quantize_(made, _config(kind))
        return made.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]. Under autocast the product is computed in autocast's type."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return _FrozenProduct.apply(x.to(dtype), self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b for a quantised W. The backward dequantises W again: autograd would keep a whole copy of it,
    for every layer of the model."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None, None


def check_quantisation(kind: Quantization, setting: str, device: torch.device, model_type: str) -> None:
    """Raises :class:`UserError` that names ``setting`` unless layers can be quantised so on ``device``."""
    check_torchao(f"{setting} {kind}")
    if model_type == "qwen3_vl_moe":
        raise UserError(
            f"{setting} {kind}: the experts of a {model_type} model are no linear layers, and they are most "
            "of its weights; leave the setting out, or take a dense model"
        )
    try:
        tried = QuantisedLinear.of(nn.Linear(16, 16, dtype=torch.bfloat16), kind, device)
        tried(torch.ones(1, 16, dtype=torch.bfloat16, device=device))
    except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
        raise UserError(
            f"{setting} {kind} cannot be computed on {device} ({str(error).splitlines()[0]}); "
            + ("use int8, or leave it out" if kind == "float8" else "leave it out")
        ) from error


def quantise_frozen_layers(model: nn.Module, kind: Quantization, device: torch.device) -> int:
    """Quantises the frozen linear layers of ``model`` in place, one at a time, each on ``device``.

    ``lm_head`` and layers that are trained, such as adapters, are left as they are. Other weights stay where
    they are, so a model that was loaded on the CPU is never whole on ``device`` in its own type. Returns the
    number of weights that were quantised.
    """
    count = 0
    for parent, name, layer in list(_frozen_layers(model)):
        count += layer.weight.numel()
        setattr(parent, name, QuantisedLinear.of(layer, kind, device))
    # DDP sends the first process's weights to all others, and knows no quantised ones. They are the same.
    quantised = [
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, quantised)
    return count


def restore_layers(model: nn.Module, base: nn.Module) -> None:
    """Puts the layers of ``base`` in the place of the quantised ones that were made of them.

    A layer of ``model`` that peft wrapped has its name in ``base`` without ``.base_layer``.
    """
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantisedLinear):
                own = base.get_submodule(f"{prefix}.{name}".removesuffix(".base_layer"))
                setattr(parent, name, own.requires_grad_(False).to(child.weight.device))


def _frozen_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name != "lm_head" and not child.weight.requires_grad:
                yield parent, name, child


def _config(kind: Quantization) -> Any:
    """torchao's settings for weights alone; by default both have one scale a row."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kinds = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}
    return kinds[kind](set_inductor_config=False)  # which would change the compiler's settings
