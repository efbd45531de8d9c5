"""Whether the activations that a backward needs fit into memory, or are recomputed.

Shapes: ``P`` prompt tokens of a micro-batch; ``D`` hidden size, ``F`` width of the feed-forward layer (in a
mixture, of one of a token's ``K`` experts), ``A`` query heads × head size, ``C`` key heads × head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from video_opd.config import Recipe
from video_opd.progress import log
from video_opd.types import Sample

SHARE = 0.8  # share of the free memory for the graph; responses, workspaces and fragmentation need the rest
TEXT_TOKENS = 256  # tokens of a prompt beside video and time stamps: an upper bound for most prompts
STAMP_TOKENS = 10  # tokens of the time stamp before each frame pair, "<12.3 seconds>" with its borders


def recomputes(recipe: Recipe, model: Any, samples: Sequence[Sample], device: torch.device) -> bool:
    """``model.gradient_checkpointing``; if it is not set, whether an estimate of memory asks for it.

    The estimate is logged. It is made when every model is loaded. Gradients, the optimiser's state and
    autocast's copies of the weights do not exist yet, so it adds them.
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
    # A float32 gradient and, unless they are on the CPU, Adam's two moments and the copy.
    free = free_bytes(device) - (4 if recipe.optim.offload else 12 + casts) * trained
    again = needed > SHARE * free
    log(
        f"prefilling {tokens:,} prompt tokens keeps about {needed / 2**30:.1f} GiB for the backward, "
        f"{max(0, free) / 2**30:.1f} GiB are free: activations are {'recomputed' if again else 'kept'} "
        "(model.gradient_checkpointing)"
    )
    return again


def graph_bytes(text_config: Any, tokens: int, dtype: str) -> int:
    """The bytes that autograd keeps of P = ``tokens`` prompt tokens in the decoder layers.

    The layers of Qwen3 save, for each token: 6.5 D numbers for the residual stream and norms, which are
    float32 in any precision; 4 F; and 4 (A + C), some of which (norms and rotations of queries and keys) are
    float32. A mixture saves K (2 D + 4 F) in place of 4 F, in float32: autocast does not cast its products.
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
    """An upper bound for the tokens of the longest prompt, from the video budget and the longest video."""
    video = recipe.video
    longest_s = max((math.inf if s.duration_s is None else s.duration_s for s in samples), default=math.inf)
    pairs = math.ceil(min(longest_s * video.fps, video.max_frames) / 2)
    most = video.max_video_tokens
    if video.keep == "min_frame_tokens":
        most = max(most, pairs * math.ceil(1.05 * video.min_frame_tokens))  # qwen-vl-utils' slack
    return min(pairs * video.max_frame_tokens, most) + pairs * STAMP_TOKENS + TEXT_TOKENS


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
