"""Prompts and tiny random models for the tests of ``video_opd.models``.

The prompts are made by the processor alone, with explicit metadata, so these tests do not depend on how the
project decodes and encodes.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.video_utils import VideoMetadata

from video_opd.types import EncodedPrompt, Rollout
from video_opd.world.tiny import build_model, build_processor

QUERIES = (
    "when does the red circle appear?",
    "the blue square moves left",
    "a small green triangle, then a large yellow circle: when do the two meet?",
)
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@lru_cache(maxsize=1)
def processor() -> Any:
    return build_processor()


@lru_cache(maxsize=8)
def _built(seed: int) -> Any:
    return build_model("test", seed=seed).eval()


def model(seed: int = 0, *, sharpness: float = 1.0) -> Any:
    """A fresh random model; ``sharpness`` scales its logits, so that responses are not near-uniform noise."""
    made = copy.deepcopy(_built(seed))
    with torch.no_grad():
        made.lm_head.weight.mul_(sharpness)
    return made


@lru_cache(maxsize=2)
def _mixture_built(seed: int) -> Any:
    """A model of the same sizes with four experts in each decoder layer, two of them for each token."""
    dense = _built(0)
    text, vision = dense.config.text_config.to_dict(), dense.config.vision_config.to_dict()
    for part in (text, vision):
        del part["model_type"]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = Qwen3VLMoeConfig(
        text_config=text | experts,
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: getattr(dense.config, name) for name in names},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = Qwen3VLMoeForConditionalGeneration(config)
        for layer in made.model.language_model.layers:  # the initial weights would choose all experts alike
            torch.nn.init.normal_(layer.mlp.gate.weight)
    made.generation_config = dense.generation_config
    return made.float().eval()


def mixture(seed: int = 0, *, sharpness: float = 1.0) -> Any:
    """A fresh random model with experts."""
    made = copy.deepcopy(_mixture_built(seed))
    with torch.no_grad():
        made.lm_head.weight.mul_(sharpness)
    return made


def forbidden(rows: int) -> list[int]:
    ids = processor().tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS))
    return [*ids, *range(len(processor().tokenizer), rows)]


def stock_logprobs(
    stock: Any, prompt: EncodedPrompt, tokens: tuple[int, ...], *, grad: bool = False
) -> torch.Tensor:
    """[R, V] of one response by one unpadded forward of the stock model, without any code of the project."""
    response = torch.tensor([tokens])
    types = torch.cat([prompt.tensors["mm_token_type_ids"], torch.zeros_like(response)], dim=1)
    with torch.set_grad_enabled(grad):
        logits = stock(
            input_ids=torch.cat([prompt.input_ids, response], dim=1),
            **{**prompt.tensors, "mm_token_type_ids": types},
        ).logits[0, prompt.length - 1 : -1]
    logits[:, forbidden(logits.shape[-1])] = -torch.inf
    return logits.log_softmax(-1)


def encode(
    query: str, *, frames: int = 4, height_px: int = 64, width_px: int = 64, video_seed: int = 0
) -> EncodedPrompt:
    pixels = np.random.default_rng(video_seed).integers(
        0, 256, (frames, 3, height_px, width_px), dtype=np.uint8
    )
    content = [{"type": "video"}, {"type": "text", "text": query}]
    text = processor().apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    encoded = dict(
        processor()(
            text=[text],
            videos=[torch.from_numpy(pixels)],
            video_metadata=[
                VideoMetadata(total_num_frames=frames, fps=2.0, frames_indices=list(range(frames)))
            ],
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=True,
            return_tensors="pt",
        )
    )
    input_ids = encoded.pop("input_ids")
    encoded.pop("attention_mask")
    return EncodedPrompt(
        sample_id=f"{video_seed}/{query}",
        input_ids=input_ids,
        tensors=encoded,
        text=text,
        pair_times_s=tuple(float(t) + 0.25 for t in range(frames // 2)),
        video_tokens=int((input_ids == processor().video_token_id).sum()),
        clip_digest=f"{video_seed}-{frames}-{height_px}-{width_px}",
        duration_s=frames / 2,
    )


@lru_cache(maxsize=1)
def mixed_prompts() -> tuple[EncodedPrompt, ...]:
    """Prompts of three lengths and two frame sizes; two are queries on one video."""
    prompts = (
        encode(QUERIES[0], frames=4, height_px=64, width_px=96, video_seed=1),
        encode(QUERIES[1], frames=8, video_seed=2),
        encode(QUERIES[2], frames=8, video_seed=2),
    )
    assert len({p.length for p in prompts}) == 3
    return prompts


SEEDS = [[10 * i + j for j in range(3)] for i in range(3)]


def tokens_of(rollouts: list[list[Rollout]]) -> list[list[tuple[int, ...]]]:
    return [[r.token_ids for r in group] for group in rollouts]


def old_logprobs(rollouts: list[list[Rollout]], width: int) -> torch.Tensor:
    rows = [r.recorded for group in rollouts for r in group]
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
