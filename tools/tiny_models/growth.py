"""Makes a model deeper without changing what it computes, so that it keeps all that it has learnt.

The old layers keep their places, so that the auxiliary heads still work on the layers that they were trained
on. The new layers follow. They are copies of the last old layer with output matrices of zero, and therefore
add nothing to the residual stream until they are trained.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from video_opd.errors import UserError
from video_opd.world.tiny import SIZES, TinySize, build_model

DEPTHS = ("layers", "vision_layers")


def check_growth(old: TinySize, new: TinySize) -> None:
    """Raises :class:`UserError` unless ``new`` is ``old`` with as many layers, or with more of them."""
    for spec in fields(TinySize):
        a, b = getattr(old, spec.name), getattr(new, spec.name)
        if a > b if spec.name in DEPTHS else a != b:
            want = "at least" if spec.name in DEPTHS else "also"
            raise UserError(f"a model grows in depth alone: {spec.name} must be {want} {a}, not {b}")


@torch.no_grad()
def grow(model: Any, size: str) -> Any:
    """Returns a new model of ``size`` that computes the same as ``model``.

    Raises :class:`UserError` if ``size`` differs from the model's in more than depth.
    """
    check_growth(size_of(model), SIZES[size])
    grown = build_model(size)
    language, visual = model.model.language_model.layers, model.model.visual.blocks
    lost = grown.load_state_dict(model.state_dict(), strict=False)
    assert not lost.unexpected_keys, lost.unexpected_keys
    for layer in grown.model.language_model.layers[len(language) :]:
        layer.load_state_dict(language[-1].state_dict())
        _silence(layer.self_attn.o_proj, layer.mlp.down_proj)
    for block in grown.model.visual.blocks[len(visual) :]:
        block.load_state_dict(visual[-1].state_dict())
        _silence(block.attn.proj, block.mlp.linear_fc2)
    return grown.train(model.training)


def size_of(model: Any) -> TinySize:
    """The widths and depths of ``model``."""
    text, vision = model.config.text_config, model.config.vision_config
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
