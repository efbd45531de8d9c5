"""The bytes that autograd keeps of a prompt for the backward, and what a layer needs while it runs.

Derived from the forward of Qwen3-VL in transformers, operation by operation; tests hold them against what
autograd saves. Symbols are those of :mod:`video_opd.planning.sizes`, a token or patch each.
"""

from __future__ import annotations

from typing import Literal

from video_opd.models.chunk_sizes import repeats_mask
from video_opd.planning.sizes import TextSizes, VisionSizes

# float32: everything in float32. autocast: float32 weights under autocast, so norms and the residual stream
# are float32. bfloat16: the weights, too, are bfloat16.
Mode = Literal["float32", "autocast", "bfloat16"]
# What the backward does in a part: its weights are trained, adapters on it are, or gradients only pass
# through it to a part before it. None: no gradient reaches it.
Role = Literal["full", "adapters", "passed"]


def graph_bytes(text: TextSizes, tokens: int, mode: Mode, role: Role = "full") -> int:
    """What autograd keeps of ``tokens`` prompt tokens in all decoder layers and the last norm."""
    return tokens * (
        last_norm_bytes(text, mode, role)
        + (text.layers - text.expert_layers) * layer_bytes(text, mode, role)
        + text.expert_layers * layer_bytes(text, mode, role, experts=True)
    )


def layer_bytes(text: TextSizes, mode: Mode, role: Role, *, experts: bool = False) -> int:
    """What autograd keeps of a token in one decoder layer: of the norms and the residual stream (D), of the
    queries (A) and keys and values (C), and of the feed-forward layer (F).

    In bfloat16 trained or adapted linear layers that read the same input keep it once; under autocast every
    linear layer keeps a cast of its input. A norm keeps its input in float32.
    """
    D, F, A, C = text.hidden, text.feed_forward, text.queries, text.keys
    of_d, of_a, of_c, of_f = {
        ("float32", "full"): (24, 16, 16, 16),
        ("float32", "adapters"): (16, 12, 12, 16),
        ("float32", "passed"): (8, 12, 12, 12),
        ("autocast", "full"): (26, 10, 10, 8),
        ("autocast", "adapters"): (18, 10, 8, 8),
        ("autocast", "passed"): (8, 8, 8, 6),
        ("bfloat16", "full"): (16, 10, 10, 8),
        ("bfloat16", "adapters"): (12, 8, 8, 8),
        ("bfloat16", "passed"): (8, 8, 8, 6),
    }[mode, role]
    kept = of_d * D + of_a * A + of_c * C
    if not experts:
        return kept + of_f * F
    # Autocast does not cast the products of experts, which are float32 then.
    K, F = text.experts_a_token, text.expert_feed_forward
    number = 2 if mode == "bfloat16" else 4
    return kept + K * number * (2 * D + 4 * F)


def last_norm_bytes(text: TextSizes, mode: Mode, role: Role) -> int:
    """What autograd keeps of a token in the norm behind the layers: its float32 input and, if its weight is
    trained, the normed numbers."""
    normed = 0 if role != "full" else 2 if mode == "bfloat16" else 4
    return text.hidden * (4 + normed)


def input_bytes(text: TextSizes, mode: Mode) -> int:
    """A token's residual stream: the input of a layer, which is all that is kept of a layer that is
    recomputed."""
    return text.hidden * (2 if mode == "bfloat16" else 4)


def cache_bytes(text: TextSizes, mode: Mode) -> int:
    """A token's keys and values in one layer. Under autocast keys come from a norm, in float32, and
    transformers gives values the keys' type."""
    return text.keys * (4 if mode == "bfloat16" else 8)


def vision_graph_bytes(
    vision: VisionSizes, patches: int, mode: Mode, role: Role, *, recompute: bool, cuda: bool = False
) -> int:
    """What autograd keeps of ``patches`` in the vision tower: its blocks (or, where they are recomputed,
    their inputs), the patches themselves, and the mergers."""
    number = 4 if mode == "float32" else 2
    block = number * vision.hidden if recompute else block_bytes(vision, mode, role, cuda=cuda)
    pixels = number * vision.patch_numbers if role == "full" else 0
    return patches * (vision.depth * block + pixels + merger_bytes(vision, mode, role, cuda=cuda))


def block_bytes(vision: VisionSizes, mode: Mode, role: Role, *, cuda: bool = False) -> int:
    """What autograd keeps of a patch in one block: of the norms, the residual stream and the attention (D),
    and of the feed-forward layer (F). On a GPU, autocast runs norms in float32."""
    D, F = vision.hidden, vision.feed_forward
    number = 4 if mode == "float32" else 2
    of_d, of_f = (8, 1) if role == "passed" else (11, 2)
    norms = 2 * 2 * D if cuda and mode != "float32" else 0
    return number * (of_d * D + of_f * F) + norms


def merger_bytes(vision: VisionSizes, mode: Mode, role: Role, *, cuda: bool = False) -> int:
    """What autograd keeps of a patch in all mergers, with the last block's output."""
    number = 4 if mode == "float32" else 2
    D = vision.hidden
    norm = 2 * D if cuda and mode != "float32" else 0
    a_merger = number * (1 if role == "passed" else 3) * D + norm
    return (1 + vision.levels) * a_merger + number * D


def response_bytes(text: TextSizes, number: int, columns: int, queries: int, *, masked: bool) -> int:
    """What one layer keeps of prompts for the responses on top of them: their keys and values with the
    responses' behind them, and the mask of the response tokens. ``columns`` of both together, in all rows;
    ``queries`` response tokens in a row. A mask is repeated for query heads that share keys, or else keys and
    values are."""
    A, C = text.queries, text.keys
    if not masked:
        return number * 2 * C * columns
    a_column = 2 * C + A // C * queries if repeats_mask(queries, C) else 2 * A + queries
    return number * a_column * columns


def block_work_bytes(vision: VisionSizes, number: int) -> int:
    """What a patch needs at most while a block runs without a graph: the residual stream and, in the
    attention, queries, keys and values, of which the first two are rotated in float32."""
    return vision.hidden * (number + 3 * number + 8 + 12)


def layer_work_bytes(text: TextSizes, number: int) -> int:
    """What a token needs at most while a decoder layer runs without a graph: the residual stream twice and
    the feed-forward layer's three products, or the attention's."""
    D, A, C = text.hidden, text.queries, text.keys
    F = max(text.feed_forward, text.experts_a_token * (text.expert_feed_forward + D))
    feed_forward = number * (2 * D + 3 * F)
    attention = number * (2 * D + 3 * A + 3 * C) + 8 * A
    return max(feed_forward, attention)
