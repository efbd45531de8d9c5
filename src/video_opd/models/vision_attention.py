"""The vision tower's attention, one call for all frames of a size.

Frames of a video attend to themselves only. On ``sdpa`` transformers walks through them in a Python loop:
hundreds of small attention calls a layer. Frames of equal size are a batch, so here they are one call. The
results are the same; only the number of calls changes.

transformers hands the whole packed sequence and its frame borders (``cu_seqlens``) to any registered
attention function whose name contains "flash", and splits it into frames for all others: hence :data:`NAME`.
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
    """Attend to all frames of a size in one call; returns whether the model was changed.

    Only a vision tower on ``sdpa`` is changed: flash attention is packed already, and ``eager`` was chosen by
    somebody who wants to look at the weights. Nothing of it reaches ``model.config``: it is neither saved,
    nor passed on to a model that is built from this one's config.
    """
    vision = model.model.visual
    if vision.config._attn_implementation != "sdpa":
        return False
    # A config of their own for these modules: transformers would take the name in a shared config for a
    # flash-attention kernel to download when the next model is built from it.
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
