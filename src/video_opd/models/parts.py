"""The parts of a Qwen3-VL model that a recipe names: ``vision``, ``merger``, ``language``, ``lm_head``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def part_modules(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """(name, module) of what each part consists of; every weight of the model is in one of them.

    ``vision`` is the tower without its mergers, ``merger`` the projections into the language model. Where
    embedding and ``lm_head`` are one tensor, it is in ``language`` and in ``lm_head``.
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


def cast_weights(model: nn.Module, dtype: torch.dtype, *, frozen_only: bool = False) -> None:
    """Holds the weights (or those that are not trained) in ``dtype``.

    Not ``model.to(dtype)``: that casts buffers, too, and rotary frequencies in bfloat16 are wrong by many
    radians some thousand positions on.
    """
    for parameter in model.parameters():
        if not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What ``state_dict`` gives of a plain model, from what its modules hold now: FSDP's own hooks would put
    a gathered model into shards again."""
    state: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                state[f"{prefix}.{name}" if prefix else name] = tensor.detach()
    return state
