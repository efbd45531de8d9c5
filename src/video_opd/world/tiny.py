"""Builds tiny Qwen3-VL models: the real model and processor classes with a few million parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor


@dataclass(frozen=True, kw_only=True)
class TinySize:
    """The widths and depths of a tiny model. ``mrope_section`` sums to half of ``head_dim``."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    mrope_section: tuple[int, int, int]
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    deepstack: tuple[int, ...]


SIZES = {
    # The smallest that the class allows, for tests.
    "test": TinySize(
        hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64, mrope_section=(4, 2, 2),
        vision_hidden=32, vision_layers=2, vision_heads=2, vision_mlp=64, deepstack=(0,),
    ),
    "tiny": TinySize(
        hidden=128, layers=4, heads=4, kv_heads=4, head_dim=32, mlp=384, mrope_section=(8, 4, 4),
        vision_hidden=64, vision_layers=2, vision_heads=2, vision_mlp=192, deepstack=(0,),
    ),
    # "mini" and "small" are as wide as "tiny", so that a tiny model becomes one by losing or adding layers.
    "mini": TinySize(
        hidden=128, layers=3, heads=4, kv_heads=4, head_dim=32, mlp=384, mrope_section=(8, 4, 4),
        vision_hidden=64, vision_layers=2, vision_heads=2, vision_mlp=192, deepstack=(0,),
    ),
    "small": TinySize(
        hidden=128, layers=6, heads=4, kv_heads=4, head_dim=32, mlp=384, mrope_section=(8, 4, 4),
        vision_hidden=64, vision_layers=3, vision_heads=2, vision_mlp=192, deepstack=(0,),
    ),
}  # fmt: skip


def build_processor() -> Qwen3VLProcessor:
    """Builds the processor of all tiny models: Qwen3-VL's classes with the world's small tokenizer."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    from video_opd.world.queries import corpus
    from video_opd.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(corpus())
    mean_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, temporal_patch_size=2, merge_size=2, **mean_std),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**mean_std),
        chat_template=tokenizer.chat_template,
    )


def build_model(size: str = "test", seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """Builds a float32 model for the tiny processor, with random weights that depend on ``seed`` alone."""
    import torch
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = build_processor().tokenizer
    s = SIZES[size]
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 32) * 32,  # padded, as in the published models
            "hidden_size": s.hidden,
            "intermediate_size": s.mlp,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_dim,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": list(s.mrope_section),
                "mrope_interleaved": True,
            },
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": s.vision_layers,
            "hidden_size": s.vision_hidden,
            "intermediate_size": s.vision_mlp,
            "num_heads": s.vision_heads,
            "out_hidden_size": s.hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(s.deepstack),
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids("<|im_end|>"), ids("<|endoftext|>")],
        pad_token_id=ids("<|endoftext|>"),
        do_sample=True,
        temperature=1.0,
    )
    return model.float()
