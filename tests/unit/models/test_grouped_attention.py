"""Query heads that share keys, against the attention of transformers, which repeats the keys."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from model_cases import SEEDS, encode, mixed_prompts, model, processor, tokens_of
from transformers import Qwen3VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from video_opd.models import grouped_attention as grouped
from video_opd.models.grouped_attention import (
    NAME,
    grouped_attention,
    kernel_shares_heads,
    use_grouped_heads,
)
from video_opd.models.policy import HFPolicy

RESPONSES: list[list[tuple[int, ...]]] = [
    [(9, 10, 11), (12, 13)],
    [(14, 15)],
    [(16,), (17, 18, 19), (20, 21)],
]


def inputs(heads: int, queries: int, keys: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(queries, keys and values that record gradients; a mask in which every token sees something)."""
    made = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, number, length, 8, generator=made, dtype=torch.float64, requires_grad=True)
        for number, length in ((6, queries), (heads, keys), (heads, keys))
    ]
    mask = torch.rand(2, 1, queries, keys, generator=made) < 0.5
    mask[..., 0] = True
    return tensors, mask


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("additive", [False, True])
def test_results_and_gradients_are_those_of_repeated_keys(
    heads: int, queries: int, keys: int, additive: bool
) -> None:
    tensors, mask = inputs(heads, queries, keys)
    form = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30) if additive else mask
    module: Any = SimpleNamespace(num_key_value_groups=6 // heads)
    query, key, value = tensors
    found, _ = grouped_attention(module, query, key, value, form, scaling=0.3)

    key, value = (each.repeat_interleave(6 // heads, 1) for each in (key, value))
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, wanted in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("queries", [1, 9])
def test_without_a_mask_it_is_that_of_transformers(
    queries: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a kernel takes as many heads of keys as of queries."""
    (query, key, value), _ = inputs(2, queries, 9)
    module: Any = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    monkeypatch.setattr(grouped, "kernel_shares_heads", lambda query: shares)
    found, _ = grouped_attention(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_a_gpu_shares_heads_in_16_bits_only() -> None:
    class OnGpu:
        device, is_cuda = torch.device("cuda"), True

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    assert kernel_shares_heads(torch.ones(1))
    assert kernel_shares_heads(cast(Any, OnGpu(torch.bfloat16)))
    assert not kernel_shares_heads(cast(Any, OnGpu(torch.float32)))


def test_many_new_tokens_have_their_keys_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "sdpa_attention_forward", lambda *_, **__: (None, "by transformers"))
    module: Any = SimpleNamespace(num_key_value_groups=3)
    for queries, by in ((16, None), (17, "by transformers")):  # two heads of eight numbers
        (query, key, value), mask = inputs(2, queries, 40)
        assert grouped_attention(module, query, key, value, mask, scaling=0.3)[1] == by


def test_a_policy_scores_samples_and_learns_alike_and_copies_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    text = model().config.text_config
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    plain = HFPolicy(model(sharpness=20), processor())
    changed = model(sharpness=20)
    assert use_grouped_heads(changed)
    student = HFPolicy(changed, processor())
    attend, heads = grouped.scaled_dot_product_attention, []

    def watched(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads.append((query.shape[1], key.shape[1]))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", watched)
    rollouts = [each.sample(mixed_prompts(), n=3, max_new_tokens=6, seeds=SEEDS) for each in (plain, student)]
    assert tokens_of(rollouts[0]) == tokens_of(rollouts[1])
    sampled = len(heads)
    assert sampled > 0
    scores = [each.logprobs(mixed_prompts(), RESPONSES, grad=True) for each in (plain, student)]
    torch.testing.assert_close(scores[1].logprobs_BT, scores[0].logprobs_BT, atol=1e-5, rtol=0)
    assert len(heads) > sampled and {*heads} == {(1, 1)}
    for score in scores:
        (score.logprobs_BT * score.mask_BT).sum().backward()
    for (name, a), b in zip(plain.model.named_parameters(), student.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()), msg=name)


def test_a_loaded_model_is_changed_and_its_config_is_not(tmp_path: Any) -> None:
    from video_opd.models.loading import load_model

    model().save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, "float32")
    layers = loaded.model.language_model.layers
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {NAME}
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert HFPolicy(loaded, processor()).passes.side_by_side
    loaded.save_pretrained(tmp_path / "again")
    assert not any(NAME in file.read_text() for file in (tmp_path / "again").glob("*.json"))
    Qwen3VLForConditionalGeneration(copy.deepcopy(loaded.config))
    prompt = encode("when?")
    scored = [
        HFPolicy(each, processor()).logprobs([prompt], [[(9, 8)]]) for each in (loaded, copy.deepcopy(loaded))
    ]
    assert torch.equal(scored[0].logprobs_BT, scored[1].logprobs_BT)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_choices_are_respected(attention: str) -> None:
    chosen = model()
    chosen.config.text_config._attn_implementation = attention
    assert not use_grouped_heads(chosen)


def test_heads_that_share_no_keys_are_left() -> None:
    chosen = model()
    chosen.config.text_config.num_key_value_heads = chosen.config.text_config.num_attention_heads
    assert not use_grouped_heads(chosen)
