"""Whether what a backward needs fits into memory, or is to be computed again.

Shapes: ``P`` prompt tokens of a micro-batch; ``D`` hidden size, ``F`` width of the feed-forward part (of an
expert, where there are some, ``K`` for each token), ``A`` heads times head size, ``C`` the same of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from video_opd.config import Recipe
from video_opd.progress import log
from video_opd.types import Sample

SHARE = 0.8  # of the free memory that a graph may take: responses, workspaces and fragments need the rest
TEXT_TOKENS = 256  # of a prompt that are neither video nor time stamps: an upper bound for most
STAMP_TOKENS = 10  # of the time before each frame pair, "<12.3 seconds>" with its borders


def recomputes(recipe: Recipe, model: Any, samples: Sequence[Sample], device: torch.device) -> bool:
    """``model.gradient_checkpointing``, or where it says none, what the estimate says, which is logged.

    Called when every model is loaded; gradients, the optimiser's state and autocast's copies of the weights
    are not there yet, and are reckoned with.
    """
    asked = recipe.model.gradient_checkpointing
    if asked is not None:
        return asked
    if recipe.model.engine == "plain":
        return False
    tokens = recipe.optim.micro_batch_size * prompt_tokens(recipe, samples)
    needed = graph_bytes(model.config.text_config, tokens, recipe.model.dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    casts = 2 if recipe.model.dtype != "float32" else 0
    free = free_bytes(device) - (12 + casts) * trained  # a float32 gradient and Adam's two moments
    again = needed > SHARE * free
    log(
        f"reading {tokens:,} prompt tokens keeps about {needed / 2**30:.1f} GiB for the backward, "
        f"{max(0, free) / 2**30:.1f} GiB are free: it {'is computed again' if again else 'is kept'} "
        "(model.gradient_checkpointing)"
    )
    return again


def graph_bytes(text_config: Any, tokens: int, dtype: str) -> int:
    """What autograd keeps of P = ``tokens`` prompt tokens in the decoder layers.

    Counted from what the layers of Qwen3 save: 6.5 D in float32, whatever the computation is in (residual
    stream and norms), 4 F, and 4 (A + C), of which norms and rotations of queries and keys a part in float32.
    With experts K (2 D + 4 F), in float32, in place of 4 F: autocast leaves their products alone.
    """
    c = text_config
    attention = c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    reduced = dtype != "float32"
    token = 26 * c.hidden_size + (10 if reduced else 16) * attention
    if hasattr(c, "num_experts_per_tok"):
        token += c.num_experts_per_tok * (8 * c.hidden_size + 16 * c.moe_intermediate_size)
    else:
        token += (8 if reduced else 16) * c.intermediate_size
    return token * tokens * c.num_hidden_layers


def prompt_tokens(recipe: Recipe, samples: Sequence[Sample]) -> int:
    """Of the longest prompt: the video budget's bound for the longest video."""
    video = recipe.video
    longest_s = max((math.inf if s.duration_s is None else s.duration_s for s in samples), default=math.inf)
    pairs = math.ceil(min(longest_s * video.fps, video.max_frames) / 2)
    return min(pairs * video.max_frame_tokens, video.max_video_tokens) + pairs * STAMP_TOKENS + TEXT_TOKENS


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
