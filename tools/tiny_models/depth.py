"""Makes a model deeper without changing what it computes, or shallower.

The old layers keep their places, so that the auxiliary heads still work on the layers that they were trained
on. New layers follow. They are copies of the last old layer with output matrices of zero, and therefore add
nothing to the residual stream until they are trained. A shallower model loses its last layers, and must learn
again what they did.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from video_opd.errors import UserError
from video_opd.world.tiny import SIZES, TinySize, build_model

DEPTHS = ("layers", "vision_layers")


def check_depths_alone_differ(old: TinySize, new: TinySize) -> None:
    """Raises :class:`UserError` if the sizes differ in more than depth."""
    for spec in fields(TinySize):
        a, b = getattr(old, spec.name), getattr(new, spec.name)
        if a != b and spec.name not in DEPTHS:
            raise UserError(f"a model changes in depth alone: {spec.name} must be {a} as before, not {b}")


@torch.no_grad()
def resized(model: Any, size: str) -> Any:
    """Returns a new model of ``size`` with the layers of ``model``; a deeper one computes the same.

    Raises :class:`UserError` if ``size`` differs from the model's in more than depth.
    """
    check_depths_alone_differ(size_of(model), SIZES[size])
    made = build_model(size)
    kept = made.state_dict().keys()
    made.load_state_dict({k: v for k, v in model.state_dict().items() if k in kept}, strict=False)
    old, new = model.model.language_model.layers, made.model.language_model.layers
    for layer in new[len(old) :]:
        layer.load_state_dict(old[-1].state_dict())
        _silence(layer.self_attn.o_proj, layer.mlp.down_proj)
    seen, blocks = model.model.visual.blocks, made.model.visual.blocks
    for block in blocks[len(seen) :]:
        block.load_state_dict(seen[-1].state_dict())
        _silence(block.attn.proj, block.mlp.linear_fc2)
    return made.train(model.training)


def size_name(size: TinySize) -> str:
    """The name of a size of world/tiny.py."""
    return next(name for name, known in SIZES.items() if known == size)


def size_of(model: Any) -> TinySize:
    """The widths and depths of ``model``."""
    return size_of_config(model.config)


def size_of_config(config: Any) -> TinySize:
    text, vision = config.text_config, config.vision_config
    return TinySize(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        mlp=text.intermediate_size,
        mrope_section=tuple(text.rope_parameters["mrope_section"]),
        vision_hidden=vision.hidden_size,
        vision_layers=vision.depth,
        vision_heads=vision.num_heads,
        vision_mlp=vision.intermediate_size,
        deepstack=tuple(vision.deepstack_visual_indexes),
    )


def _silence(*outputs: nn.Linear) -> None:
    for linear in outputs:
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()
