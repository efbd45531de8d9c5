"""A deeper model computes the same, a shallower one keeps its first layers, and stages may differ in size."""

from __future__ import annotations

import copy
import json

import model_cases as cases
import numpy as np
import pytest
import torch
from places import TOOLS

from tiny_models import stages
from tiny_models.auxiliary import POINTER_LAYER, Pretrainer
from tiny_models.depth import resized, size_name, size_of
from tiny_models.examples import Example, batches
from tiny_models.stages import Trainer, read_pretraining, sizes
from video_opd.errors import UserError
from video_opd.world.scene import compose, style_name
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
    grown = resized(tiny, "small").eval()
    assert size_of(grown) == SIZES["small"] and size_of(tiny) == SIZES["tiny"]
    for prompt in cases.mixed_prompts():
        torch.testing.assert_close(logits(grown, prompt), logits(tiny, prompt), atol=1e-6, rtol=0)


def test_the_new_layers_can_learn(tiny):
    """Each of their zero matrices has a gradient, so none of them stays an identity."""
    grown = resized(tiny, "small")
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
    grown = module.resized("small")
    after = grown.state_dict()
    assert all(torch.equal(after[name], value) for name, value in module.state_dict().items())
    assert not torch.equal(after["objects.weight"], Pretrainer(copy.deepcopy(tiny)).objects.weight)


def test_a_shallower_model_keeps_its_first_layers(tiny):
    small = resized(tiny, "mini")
    assert size_of(small) == SIZES["mini"] and size_name(size_of(small)) == "mini"
    before = tiny.state_dict()
    after = small.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    lost = {name for name in before if name not in after}
    assert lost and all(name.startswith("model.language_model.layers.3.") for name in lost)


def test_only_depth_can_change(tiny):
    with pytest.raises(UserError, match="hidden must be 32 as before, not 128"):
        resized(build_model("test"), "tiny")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{name: a, steps: 1, resize: huge}"], "a: resize is 'huge'; choose one of: test, tiny"),
        (["{name: a, steps: 1, resize: test}"], "a: resize from tiny to test: a model changes"),
        (["{name: a, steps: 1, tasks: {thinking: -1}}"], r"tasks.thinking must be at least 0, not -1"),
        (["{name: a, steps: 1, tasks: {grounding: 0}}"], "a: no task has a share"),
        (["{name: a, steps: 1, pairs: 5, tasks: {thinking: 1}}"], "a: pairs is 5; questions and thinking"),
        (["{name: a, steps: 1, start_from_model: huge}"], "a: start_from_model: .*huge"),
        (["{name: a, steps: 1, start_from: b}", "{name: b, steps: 1}"], "a: start_from is 'b'; choose"),
        (["{name: a, steps: 1, long_share: 1.5}"], r"stages\[0\].long_share must be at most 1, not 1.5"),
        (["{name: a, steps: 1, resize: 6}"], "resize must be text, not 6"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_followed(tmp_path, lines, message):
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n" + "".join(f"  - {line}\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_pretraining(path)


def test_the_shipped_teacher_is_deeper_than_the_base():
    path = TOOLS / "tiny_models" / "pretraining.yaml"
    recipe = read_pretraining(str(path))
    saved = {stage.save_as: sizes(recipe)[stage.name] for stage in recipe.stages if stage.save_as}
    assert saved == {"tiny-teacher-small": "tiny", "tiny-teacher": "small", "tiny-base": "tiny"}


def test_a_recipe_of_an_unknown_size(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("size: large\nstages: []\n")
    with pytest.raises(UserError, match="size is 'large'; choose one of: test, tiny, mini, small"):
        read_pretraining(path)


def test_stages_of_two_sizes_train_save_and_continue(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(
        "videos: 12\ncheck_videos: 1\nstages:\n"
        "  - {name: first, steps: 1, batch_size: 1, pairs: 5}\n"
        "  - {name: deeper, start_from: first, steps: 1, batch_size: 1, pairs: 5,\n"
        "     resize: small, save_as: big}\n"
        "  - {name: loose, start_from: first, steps: 1, batch_size: 1, pairs: 5, save_as: little}\n"
        "  - {name: more, start_from: deeper, steps: 1, batch_size: 1, pairs: 5}\n"
    )
    recipe, out = read_pretraining(path), tmp_path / "out"
    monkeypatch.setattr(stages, "make_test_sets", lambda _: {})
    monkeypatch.setattr(Trainer, "check", lambda self, name: {})
    trainer = Trainer(recipe, out, workers=2)  # rendered by a pool
    trainer.run()

    def layers(name: str) -> int:
        weights = torch.load(out / f"{name}.pt", weights_only=True)
        return sum("language_model.layers." in key and "mlp.down_proj" in key for key in weights)

    assert [layers(stage.name) for stage in recipe.stages] == [4, 6, 4, 6]
    config = {n: json.loads((out / n / "config.json").read_text())["text_config"] for n in ("big", "little")}
    assert config["big"]["num_hidden_layers"] == 6 and config["little"]["num_hidden_layers"] == 4

    (out / "loose.pt").unlink()  # as if killed before it: the next run has a module of another size by then
    (out / "more.pt").unlink()
    trainer.run()
    assert [layers(name) for name in ("loose", "more")] == [4, 6]


def test_long_videos_are_drawn_as_often_as_asked():
    frames = np.zeros((4, 2, 2, 3), np.uint8)
    pool = [
        Example(scene=compose("train", 0, i), frames=frames, times_s=np.arange(4) / 2) for i in range(200)
    ]

    def share(asked: float | None) -> float:
        stream = batches(pool, 8, np.random.default_rng(0), asked)
        drawn = [style_name("train", e.scene.index) == "long" for _ in range(200) for e in next(stream)]
        return sum(drawn) / len(drawn)

    assert share(None) == pytest.approx(0.25, abs=0.03)
    assert share(0.5) == pytest.approx(0.5, abs=0.03)
    assert share(1.0) == 1.0
