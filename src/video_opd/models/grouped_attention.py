"""The attention of the decoder where query heads share keys, without a copy of the keys for each of them.

On top of a prefix, a few new tokens attend to many keys, and a mask says to which. ``sdpa`` then takes as
many heads of keys as of queries, so transformers repeats keys and values in every layer: four times the
memory of the prompt's cache in Qwen3-VL-8B, written and read for each forward. The query heads that share
keys can as well stand in one head, one behind the other, under the same mask. The results are the same.

Shapes: ``B`` rows, ``H`` heads of keys, ``G`` query heads that share one of them, ``N`` = ``G * H``, ``Q``
new tokens, ``K`` columns of the cache and the new tokens, ``d`` numbers of a head.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from video_opd.models.chunk_sizes import repeats_mask

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

NAME = "video_opd_grouped"


def use_grouped_heads(model: Qwen3VLForConditionalGeneration) -> bool:
    """Lets the decoder's layers attend by :func:`grouped_attention`; returns whether they were changed.

    Only a decoder on ``sdpa`` whose query heads share keys is changed. ``model.config`` stays as it is, so
    the change is neither saved nor passed on to a model that is built from this config, and masks are those
    of ``sdpa``. ``model.set_attn_implementation`` does not reach the layers afterwards.
    """
    config = model.config.text_config
    if config._attn_implementation != "sdpa" or config.num_attention_heads == config.num_key_value_heads:
        return False
    own = copy.deepcopy(config)
    own._attn_implementation = NAME
    for layer in model.model.language_model.layers:
        layer.self_attn.config = own
    return True


def grouped_attention(
    module: Any,
    query_BNQd: torch.Tensor,
    key_BHKd: torch.Tensor,
    value_BHKd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """[B, N, Q, d] of queries → [B, Q, N, d]. ``attention_mask`` is [B, 1, Q, K], True where a token attends.

    Many new tokens under a mask are left to transformers, and what has no mask, unless the GPU has no kernel
    for that.
    """
    G, Q, width = module.num_key_value_groups, query_BNQd.shape[2], key_BHKd.shape[1] * key_BHKd.shape[3]
    if attention_mask is None and not kernel_shares_heads(query_BNQd):
        key, value = (each.repeat_interleave(G, dim=1) for each in (key_BHKd, value_BHKd))
        attended_BNQd = scaled_dot_product_attention(
            query_BNQd, key, value, dropout_p=dropout, scale=scaling, is_causal=Q > 1
        )
        return attended_BNQd.transpose(1, 2).contiguous(), None
    if attention_mask is None or not repeats_mask(Q, width):
        return sdpa_attention_forward(
            module,
            query_BNQd,
            key_BHKd,
            value_BHKd,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            **other,
        )
    attended_BHGQd = scaled_dot_product_attention(
        query_BNQd.unflatten(1, (-1, G)).flatten(2, 3),
        key_BHKd,
        value_BHKd,
        attn_mask=attention_mask.repeat(1, 1, G, 1),
        dropout_p=dropout,
        scale=scaling,
    ).unflatten(2, (G, Q))
    return attended_BHGQd.flatten(1, 2).transpose(1, 2).contiguous(), None


def kernel_shares_heads(query: torch.Tensor) -> bool:
    """Whether a fused kernel takes fewer heads of keys than of queries. In float32 a GPU's do not: all scores
    of a prompt would be in memory at once."""
    in_32_bits = query.dtype == torch.float32 and not torch.is_autocast_enabled(query.device.type)
    return not (query.is_cuda and in_32_bits)


AttentionInterface.register(NAME, grouped_attention)
