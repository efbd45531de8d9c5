"""Models of Qwen3-VL's published shapes with random weights, and the rate at which a device multiplies
matrices.

The tokenizer is the tiny one: only tokens that can be written meet ``lm_head``, at response positions, so a
small vocabulary changes little.
"""

from __future__ import annotations

from typing import Any

import torch

from video_opd.bench.timing import take_turns
from video_opd.models.parts import cast_weights
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.vision_attention import use_batched_frames
from video_opd.planning.cost_model import Costs
from video_opd.planning.sizes import known_models, sizes_of
from video_opd.world.tiny import build_model

SHAPES = {"8b": "Qwen3-VL-8B", "32b": "Qwen3-VL-32B"}
LARGE = {"max_position_embeddings": 262144}


def make(size: str, dtype: str, device: torch.device, seed: int, layers: int | None = None) -> Any:
    """A model of random weights, made on its device; frozen. ``layers``: only so many decoder layers."""
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    with device:
        model = Qwen3VLForConditionalGeneration._from_config(
            config_of(size, layers), dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    cast_weights(model, getattr(torch, dtype))
    model.generation_config = build_model("test").generation_config
    use_batched_frames(model)
    use_linear_patches(model)
    return model.eval().requires_grad_(False)


def config_of(size: str, layers: int | None = None) -> Any:
    """Qwen3-VL's config of that size, with the tiny tokenizer's special tokens."""
    from transformers import Qwen3VLConfig

    config = build_model("test" if size in SHAPES else size).config.to_dict()
    text, vision = config["text_config"], config["vision_config"]
    if size in SHAPES:
        published = known_models()[SHAPES[size]]
        text |= published["text_config"] | LARGE
        text["rope_parameters"] |= {"mrope_section": [24, 20, 20], "rope_theta": 5_000_000}
        vision |= published["vision_config"]
    if layers is not None:
        text["num_hidden_layers"] = layers
        deepstack = vision["deepstack_visual_indexes"]
        vision["deepstack_visual_indexes"] = deepstack[:layers]  # one for each of the first decoder layers
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    return Qwen3VLConfig.from_dict(config)


def costs_of(model: Any) -> Costs:
    """The work of a model for each token, from its config."""
    return Costs.of(sizes_of(model.config.to_dict(), "model"))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two square matrices, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, seconds = take_turns({"product": lambda: a @ b}, 10, device)
    return 2 * size**3 / min(seconds["product"])
