"""The bytes of a graph by formula, against those that autograd keeps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from model_cases import encode, processor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from video_opd.config import LoraConfig
from video_opd.config.sections import AdaptedPart
from video_opd.models.chunk_sizes import repeats_mask
from video_opd.models.grouped_attention import use_grouped_heads
from video_opd.models.lora import add_adapters
from video_opd.models.parts import cast_weights
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.policy import HFPolicy
from video_opd.models.prompt_batch import encode_videos
from video_opd.models.vision_attention import use_batched_frames
from video_opd.planning import graph
from video_opd.planning.sizes import ModelSizes, sizes_of
from video_opd.types import EncodedPrompt
from video_opd.world.tiny import build_model

# Wide enough that what depends on no width (positions, statistics of norms) is a few percent.
TEXT = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
VISION = {
    "hidden_size": 96, "intermediate_size": 352, "depth": 3, "num_heads": 4, "out_hidden_size": 256,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
CASES = [
    case
    for case in itertools.product(("float32", "autocast", "bfloat16"), ("full", "adapters", "passed"))
    if case != ("autocast", "adapters")  # what carries adapters is in bfloat16 then
]


@lru_cache(maxsize=1)
def _wide() -> Any:
    base = build_model("test")
    config = base.config.to_dict()
    config["text_config"] |= TEXT
    config["text_config"]["rope_parameters"] |= {"mrope_section": [8, 4, 4]}
    config["vision_config"] |= VISION
    with torch.random.fork_rng(devices=[]):
        made = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config)).eval()
    made.generation_config = base.generation_config
    return made


def wide() -> Any:
    made = copy.deepcopy(_wide())
    use_batched_frames(made)
    assert use_grouped_heads(made)
    use_linear_patches(made)
    return made.requires_grad_(False)


@lru_cache(maxsize=1)
def prompt() -> EncodedPrompt:
    return encode("when does the red circle appear?", frames=24, height_px=96, width_px=96)


def kept_bytes(model: Any, forward: Callable[[], Any]) -> int:
    """The bytes that autograd keeps of a forward, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # kept, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights)


def prepared(part: str, mode: str, role: str) -> tuple[HFPolicy, ModelSizes]:
    """A model in which ``part`` plays ``role``, and nothing else takes part in the backward."""
    model = wide()
    module = model.model.visual if part == "vision" else model.model.language_model
    if role == "full":
        module.requires_grad_(True)
    if role == "passed":
        (model.model.visual.pos_embed if part == "vision" else module.embed_tokens).requires_grad_(True)
    if mode == "bfloat16":
        cast_weights(model, torch.bfloat16)
    if role == "adapters":
        parts: tuple[AdaptedPart, ...] = ("vision", "merger") if part == "vision" else ("language",)
        add_adapters(model, LoraConfig(parts=parts, rank=1), 0)
    policy = HFPolicy(
        model, processor(), compute_dtype=None if mode == "float32" else torch.bfloat16, recompute=False
    )
    return policy, sizes_of(model.config.to_dict(), "wide")


@pytest.mark.parametrize(("mode", "role"), CASES)
def test_the_decoder_keeps_what_the_formula_says(mode: graph.Mode, role: graph.Role) -> None:
    policy, sizes = prepared("language", mode, role)
    found = kept_bytes(policy.model, lambda: policy.prefill([prompt()], grad=True))
    expected = graph.graph_bytes(sizes.text, prompt().length, mode, role)
    if mode == "autocast":  # autocast's copies of the weights
        expected += 2 * sizes.text.all_layers.in_matrices
    # Masks, rotary positions and statistics of norms are left out. Nothing is upstream of the first adapter.
    assert 0.96 < expected / found < 1.015


@pytest.mark.parametrize(("mode", "role"), CASES)
def test_the_vision_tower_keeps_what_the_formula_says(mode: graph.Mode, role: graph.Role) -> None:
    policy, sizes = prepared("vision", mode, role)

    def encoded() -> Any:
        with policy._state(grad=True):
            return encode_videos(policy.model, policy.passes.batch([prompt()]))

    patches = 4 * prompt().video_tokens
    expected = graph.vision_graph_bytes(sizes.vision, patches, mode, role, recompute=False)
    if mode == "autocast":
        expected += 2 * (sizes.parts["vision"].in_matrices + sizes.parts["merger"].in_matrices)
    assert 0.92 < expected / kept_bytes(policy.model, encoded) < 1.01


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "length", [2, 6, 30]
)  # tokens of each of three responses: the last have keys repeated
def test_responses_keep_of_their_prompt_what_the_formula_says(mode: graph.Mode, length: int) -> None:
    policy, sizes = prepared("language", mode, "full")
    assert repeats_mask(3 * 6, sizes.text.keys) and not repeats_mask(3 * 29, sizes.text.keys)
    prompts = prompt(), encode("when?", frames=48, height_px=96, width_px=96)
    number = 4 if mode == "float32" else 2
    responses = [[tuple(range(9, 9 + length))] * 3]
    found, expected = [], []
    for each in prompts:
        prefix = policy.prefill([each], grad=True)
        found.append(kept_bytes(policy.model, partial(policy.logprobs, prefix, responses, grad=True)))
        queries = 3 * (length - 1)  # nothing is scored behind the last token
        columns = each.length + queries
        a_layer = graph.response_bytes(sizes.text, number, columns, queries, masked=True)
        expected.append(sizes.text.layers * a_layer)
    # Of two prompts, because the responses keep as much of themselves with each.
    assert 0.97 < (expected[1] - expected[0]) / (found[1] - found[0]) < 1.01


@pytest.mark.parametrize("mode", ["float32", "autocast", "bfloat16"])
def test_layers_that_are_computed_again_keep_their_input_and_the_keys(mode: graph.Mode) -> None:
    policy, sizes = prepared("language", mode, "full")
    policy.recompute = True
    policy.model.train()
    prefix = []
    found = kept_bytes(policy.model, lambda: prefix.append(policy.prefill([prompt()], grad=True)))
    cached = sum(x.nbytes for layer in prefix[0].cache.layers for x in (layer.keys, layer.values))
    text, tokens = sizes.text, prompt().length
    assert cached == tokens * text.layers * graph.cache_bytes(text, mode)
    kept = tokens * (text.layers * graph.input_bytes(text, mode) + graph.last_norm_bytes(text, mode, "full"))
    assert 0.9 < kept / found < 1.0
