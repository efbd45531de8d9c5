"""A model that grows computes the same."""

from __future__ import annotations

import copy

import model_cases as cases
import pytest
import torch

from video_opd.errors import UserError
from video_opd.world.pretraining.auxiliary import POINTER_LAYER, Pretrainer
from video_opd.world.pretraining.growth import grow, size_of
from video_opd.world.tiny import SIZES, build_model


@pytest.fixture(scope="module")
def tiny():
    """A tiny model that is far from its initialisation: zero biases and unit norms would hide mistakes."""
    model = build_model("tiny", seed=3).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


@torch.no_grad()
def logits(model, prompt):
    return model(input_ids=prompt.input_ids, **prompt.tensors).logits


def test_a_grown_model_computes_the_same(tiny):
    grown = grow(tiny, "small").eval()
    assert size_of(grown) == SIZES["small"] and size_of(tiny) == SIZES["tiny"]
    for prompt in cases.mixed_prompts():
        torch.testing.assert_close(logits(grown, prompt), logits(tiny, prompt), atol=1e-6, rtol=0)


def test_the_new_layers_can_learn(tiny):
    """Each of their zero matrices has a gradient, so none of them stays an identity."""
    grown = grow(tiny, "small")
    prompt = cases.mixed_prompts()[0]
    grown(input_ids=prompt.input_ids, **prompt.tensors).logits.square().mean().backward()
    for layer in grown.model.language_model.layers[4:]:
        assert layer.self_attn.o_proj.weight.grad.abs().sum() > 0
        assert layer.mlp.down_proj.weight.grad.abs().sum() > 0
    block = grown.model.visual.blocks[2]
    assert block.attn.proj.weight.grad.abs().sum() > 0 and block.mlp.linear_fc2.weight.grad.abs().sum() > 0


def test_a_grown_pretrainer_keeps_its_heads_and_its_pointer_layer(tiny):
    module = Pretrainer(copy.deepcopy(tiny))
    with torch.no_grad():  # trained: its queries and keys are no longer the same
        module.model.model.language_model.layers[POINTER_LAYER].self_attn.k_proj.weight.mul_(0.5)
    grown = module.grown("small")
    after = grown.state_dict()
    assert all(torch.equal(after[name], value) for name, value in module.state_dict().items())
    assert not torch.equal(after["objects.weight"], Pretrainer(copy.deepcopy(tiny)).objects.weight)


def test_only_depth_can_grow(tiny):
    with pytest.raises(UserError, match="hidden must be also 32, not 128"):
        grow(build_model("test"), "tiny")
    with pytest.raises(UserError, match="at least 6, not 4"):
        grow(grow(tiny, "small"), "tiny")
