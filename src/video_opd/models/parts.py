"""The parts of a Qwen3-VL model that a recipe names: ``vision``, ``merger``, ``language``, ``lm_head``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def part_modules(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The modules of each part, as (name, module); every weight of the model belongs to a part.

    ``vision`` is the vision tower without its mergers, and ``merger`` the projections into the language
    model. If embedding and ``lm_head`` are one tensor, it belongs both to ``language`` and to ``lm_head``.
    """
    inner: Any = model
    visual = inner.model.visual
    mergers = ("merger", "deepstack_merger_list")
    names = {
        "vision": [f"model.visual.{name}" for name, _ in visual.named_children() if name not in mergers],
        "merger": [f"model.visual.{name}" for name in mergers],
        "language": ["model.language_model"],
        "lm_head": ["lm_head"],
    }
    return {part: [(name, model.get_submodule(name)) for name in found] for part, found in names.items()}


def cast_weights(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    frozen_only: bool = False,
    device: torch.device | None = None,
) -> None:
    """Casts the weights (or only those that are not trained) to ``dtype``, one after the other, on ``device``
    if it is given.

    ``model.to(dtype)`` would cast buffers, too, and rotary frequencies in bfloat16 are wrong by many radians
    after some thousand positions.
    """
    for parameter in model.parameters():
        if not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(device=device).to(dtype)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of ``state_dict``, taken from the tensors that the modules hold now.

    ``state_dict`` itself would run FSDP's hooks, which split a gathered model into shards again.
    """
    state: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return state
