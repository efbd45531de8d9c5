"""Patches embedded by a matrix product equal those of the model's own convolution."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import model
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from video_opd.models.loading import load_model
from video_opd.models.patch_embedding import PatchProjection, use_linear_patches
from video_opd.world.shipped import shipped

PATCHES = torch.randn(40, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def embedded(tower: Any) -> torch.Tensor:
    return tower.patch_embed(PATCHES.to(tower.patch_embed.proj.weight.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_embeddings_and_gradients_equal_the_convolution(dtype: torch.dtype, tolerance: float) -> None:
    stock, linear = model().to(dtype), model().to(dtype)
    assert use_linear_patches(linear)
    expected, got = embedded(stock.model.visual), embedded(linear.model.visual)
    assert got.shape == expected.shape and got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for output in (expected, got):
        output.square().sum().backward()
    one, other = (m.model.visual.patch_embed.proj for m in (stock, linear))
    for name in ("weight", "bias"):
        a, b = getattr(one, name).grad, getattr(other, name).grad
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance * float(a.abs().max()))


def test_weights_keep_names_shapes_and_identity(tmp_path: Path) -> None:
    changed = model()
    before = {name: (weight.shape, weight.data_ptr()) for name, weight in changed.named_parameters()}
    order = list(changed.state_dict())
    assert use_linear_patches(changed)
    assert {n: (w.shape, w.data_ptr()) for n, w in changed.named_parameters()} == before
    assert list(changed.state_dict()) == order
    changed.save_pretrained(tmp_path)
    again = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again.model.visual.patch_embed.proj) is nn.Conv3d  # other models are not changed
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, changed.state_dict()[name]), name


def test_a_copy_follows_its_own_weights() -> None:
    original = model()
    use_linear_patches(original)
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.model.visual.patch_embed.proj.weight.zero_()
    assert embedded(original.model.visual).std() > 0
    assert embedded(other.model.visual).std(0).max() == 0  # the bias alone


def test_twice_is_once() -> None:
    again = model()
    assert use_linear_patches(again)
    assert not use_linear_patches(again)


def test_loaded_models_have_it() -> None:
    loaded, _ = load_model(shipped("tiny-base"), dtype="float32")
    assert isinstance(loaded.model.visual.patch_embed.proj, PatchProjection)


def test_a_larger_input_is_not_taken_for_patches() -> None:
    changed = model()
    use_linear_patches(changed)
    with pytest.raises(AssertionError, match="one patch"):
        changed.model.visual.patch_embed.proj(torch.zeros(1, 3, 2, 32, 32))
