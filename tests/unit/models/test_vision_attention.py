"""Attention to all frames in one call equals transformers' loop over frames."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import model
from transformers import Qwen3VLForConditionalGeneration

from video_opd.models import vision_attention
from video_opd.models.vision_attention import NAME, use_batched_frames

# Three videos with frames of two sizes: the first size comes again after the second.
GRID_THW = torch.tensor([[3, 4, 6], [2, 4, 4], [2, 4, 6]])


def features(tower: Any) -> torch.Tensor:
    patches = int(GRID_THW.prod(-1).sum())
    pixels = torch.randn(patches, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    output = tower(pixels, grid_thw=GRID_THW, return_dict=True)
    return torch.cat([output.pooler_output, *output.deepstack_features])


def test_features_and_gradients_equal_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, batched = model(), model()
    calls: Any = []
    real = vision_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        vision_attention,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(a[0].shape) or real(*a, **k),
    )
    assert use_batched_frames(batched)
    towers = stock.model.visual, batched.model.visual
    expected, got = (features(tower) for tower in towers)
    assert (got - expected).abs().max() < 1e-6
    assert [shape[0] for shape in calls] == [3, 2, 2] * batched.config.vision_config.depth  # frames a call
    for output in (expected, got):
        output.square().sum().backward()
    for (name, a), b in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6 * float(a.grad.abs().max()), msg=name)


def test_nothing_else_changes(tmp_path: Path) -> None:
    changed = model()
    before = changed.config.to_json_string()
    use_batched_frames(changed)
    assert changed.config.to_json_string() == before
    assert changed.config.text_config._attn_implementation == "sdpa"
    assert {
        m.config._attn_implementation for m in changed.model.language_model.layers for m in [m.self_attn]
    } == {"sdpa"}
    changed.save_pretrained(tmp_path)
    assert not any(NAME in file.read_text() for file in tmp_path.glob("*.json"))
    Qwen3VLForConditionalGeneration(copy.deepcopy(changed.config))  # would look for a kernel by that name


def test_a_copy_of_the_model_works() -> None:
    original = model()
    use_batched_frames(original)
    torch.testing.assert_close(
        features(copy.deepcopy(original).model.visual), features(original.model.visual)
    )


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_choices_are_respected(attention: str) -> None:
    chosen = model()
    chosen.model.visual.config._attn_implementation = attention
    assert not use_batched_frames(chosen)
    assert chosen.model.visual.blocks[0].attn.config._attn_implementation == attention


def test_twice_is_once() -> None:
    again = model()
    assert use_batched_frames(again)
    assert not use_batched_frames(again)
    features(again.model.visual)
