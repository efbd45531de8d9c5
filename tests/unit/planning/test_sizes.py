"""The numbers of weights, against models that transformers builds without memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from video_opd.config import LoraConfig
from video_opd.config.sections import AdaptedPart
from video_opd.errors import UserError
from video_opd.models.lora import adapter_weights, add_adapters
from video_opd.models.parts import part_modules
from video_opd.planning.sizes import known_models, read_sizes, sizes_of

PUBLISHED = {  # weights, as published
    "Qwen3-VL-2B": 2_127_532_032,
    "Qwen3-VL-4B": 4_437_815_808,
    "Qwen3-VL-8B": 8_767_123_696,
    "Qwen3-VL-32B": 33_357_390_064,
    "Qwen3-VL-30B-A3B": 31_070_754_032,
}


def built(config: dict[str, Any]) -> Any:
    """The model of a config on the meta device, where weights have shapes and take no memory."""
    config = copy.deepcopy(config)
    moe = config["model_type"] == "qwen3_vl_moe"
    made = (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(**config)
    with torch.device("meta"):
        return (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(made)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_of_the_published_models_are_counted_exactly(name: str) -> None:
    model, sizes = built(known_models()[name]), read_sizes(f"Qwen/{name}-Instruct")
    assert sizes.weights == PUBLISHED[name] == sum(p.numel() for p in model.parameters())
    inner, text = model.model, sizes.text
    for part, modules in part_modules(model).items():
        counted = sum(p.numel() for _, module in modules for p in module.parameters())
        assert sizes.parts[part].count == (0 if part == "lm_head" and sizes.tied else counted)
    assert text.largest_layer.count == sum(p.numel() for p in inner.language_model.layers[0].parameters())
    assert sizes.vision.block.count == sum(p.numel() for p in inner.visual.blocks[0].parameters())
    assert sizes.embedding == inner.language_model.embed_tokens.weight.numel()
    layers = (*inner.language_model.layers, *inner.visual.blocks)
    assert sizes.rest == sizes.weights - sum(p.numel() for layer in layers for p in layer.parameters())
    assert sizes.parts["language"].largest == max(p.numel() for p in inner.language_model.parameters())


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"mlp_only_layers": [1]}])
def test_other_shapes_are_counted_exactly(changes: dict[str, Any]) -> None:
    config = copy.deepcopy(known_models()["Qwen3-VL-30B-A3B"])
    config["text_config"] |= {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2} | changes
    model, sizes = built(config), sizes_of(config, "small")
    assert sizes.weights == sum(p.numel() for p in model.parameters())
    layers = model.model.language_model.layers
    assert sizes.text.all_layers.count == sum(p.numel() for p in layers.parameters())


def test_adapters_are_counted_exactly() -> None:
    config = copy.deepcopy(known_models()["Qwen3-VL-2B"])
    config["text_config"]["num_hidden_layers"], config["vision_config"]["depth"] = 2, 18
    model, sizes = built(config), sizes_of(config, "small")
    parts: tuple[AdaptedPart, ...] = ("vision", "merger", "language")
    with torch.device("meta"):
        add_adapters(model, LoraConfig(parts=parts, rank=4), 0)
    added = sum(p.numel() for p in adapter_weights(model).values())
    assert added == sum(sizes.parts[part].adapters(4) for part in parts)


def test_a_folder_is_read_by_its_config(tmp_path: Path) -> None:
    config = copy.deepcopy(known_models()["Qwen3-VL-2B"])
    config["text_config"]["num_hidden_layers"] = 3
    folder = tmp_path / "qwen3-vl-8b"  # a folder that is there counts for more than its name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert read_sizes(folder).text.layers == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("williamljz/Video-opd-teacher-Qwen3-VL-32B-GRPO", "Qwen3-VL-32B"),
        ("checkpoints/qwen3-vl-32b-grpo", "Qwen3-VL-32B"),
        ("Qwen/Qwen3-VL-30B-A3B-Thinking", "Qwen3-VL-30B-A3B"),
        ("Qwen/Qwen3-VL-4B-Instruct-FP8", "Qwen3-VL-4B"),
    ],
)
def test_a_model_that_is_not_here_is_known_by_its_name(path: str, name: str) -> None:
    assert read_sizes(path).name == name


@pytest.mark.parametrize("path", ["nobody/nothing", "Qwen/Qwen3-VL-235B-A22B-Instruct", "Qwen3-VL-8Bit", ""])
def test_an_unknown_model_is_refused_with_the_known_ones(path: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Qwen3-VL-8B|no config\.json"):
        read_sizes(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": {"a": 16}}, "config.json is of a {'a': 16} model"),
        ({"text_config": None}, "no text_config"),
        ({"vision_config": {}}, "vision_config.spatial_merge_size None"),
    ],
)
def test_a_config_that_is_none_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sizes_of(copy.deepcopy(known_models()["Qwen3-VL-2B"]) | change, "m")


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "4096"])
def test_a_size_that_no_model_has_is_refused(size: Any) -> None:
    config = copy.deepcopy(known_models()["Qwen3-VL-2B"])
    config["text_config"]["hidden_size"] = size
    with pytest.raises(UserError, match=r"text_config.hidden_size"):
        sizes_of(config, "m")
