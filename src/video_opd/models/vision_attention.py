"""The attention of the vision tower, with one call for all frames of a size.

A frame of a video attends only to itself. On ``sdpa``, transformers loops over the frames in Python, with
hundreds of small attention calls in each layer. Frames of equal size can form a batch, so here they take one
call. The results are the same.

transformers passes the whole packed sequence and its frame borders (``cu_seqlens``) to any registered
attention function whose name contains "flash", and splits the sequence into frames for all others. That is
why :data:`NAME` contains "flash".
"""

from __future__ import annotations

import copy
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

NAME = "video_opd_flash_frames"


def use_batched_frames(model: Qwen3VLForConditionalGeneration) -> bool:
    """Makes the vision tower attend to all frames of a size in one call; returns whether it was changed.

    Only a vision tower on ``sdpa`` is changed: flash attention is packed already, and ``eager`` is chosen to
    look at the attention weights. ``model.config`` stays as it is, so the change is neither saved nor passed
    on to a model that is built from this config.
    """
    vision = model.model.visual
    if vision.config._attn_implementation != "sdpa":
        return False
    # These modules get a config of their own. In a shared config, transformers would take the name for a
    # flash-attention kernel to download when it builds the next model from that config.
    shared = vision.config
    own = copy.deepcopy(shared)
    own._attn_implementation = NAME
    for module in vision.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return True


def batched_frames_attention(
    module: torch.nn.Module,
    query_1HSD: torch.Tensor,
    key_1HSD: torch.Tensor,
    value_1HSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Block-diagonal attention over packed frames: [1, heads, S, d] each → [1, S, heads, d].

    ``cu_seq_lens_q`` [frames + 1] holds the borders of the frames in S. Neighbouring frames of equal length
    form one batch.
    """
    assert attention_mask is None, "the vision tower masks by frame borders only"
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    outputs = []
    start = 0
    for length, run in groupby(lengths):
        frames = len(list(run))
        stop = start + frames * length
        query, key, value = (
            x[0, :, start:stop].unflatten(1, (frames, length)).transpose(0, 1)  # [frames, heads, length, d]
            for x in (query_1HSD, key_1HSD, value_1HSD)
        )
        attended = scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # [frames * length, heads, d]
        start = stop
    return torch.cat(outputs).unsqueeze(0), None


AttentionInterface.register(NAME, batched_frames_attention)
