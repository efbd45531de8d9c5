"""Broken files of model and adapter folders (see ``fuzz_cases.py``)."""

from __future__ import annotations

import functools
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_cases import broken_json, mutate, odd_bytes, odd_number, odd_tree, outcome
from model_cases import model, processor
from safetensors.torch import load_file, save_file

from video_opd.config import LoraConfig
from video_opd.data.encode import PromptEncoder
from video_opd.models.inference import choose_video_form, read_inference_config
from video_opd.models.loading import load_model, load_teacher, read_model_configs
from video_opd.models.lora import adapted_layers, add_adapters, load_adapter, save_adapter
from video_opd.models.policy import HFPolicy
from video_opd.models.same_tokens import check_same_tokens
from video_opd.planning.sizes import read_sizes
from video_opd.types import Clip

SETTINGS = {
    "method": "video-opd",
    "dtype": "float32",
    "video": {"fps": 2.0, "min_frame_tokens": 4, "max_frame_tokens": 16, "max_video_tokens": 64},
    "prompt": {"style": "paper", "thinking": False, "video_form": "release"},
}


@functools.cache
def good_folder(folder: Path, published: bool) -> Path:
    """A model folder as transformers 5 saves it, or in the files that Qwen's folders on the hub have."""
    path = folder / ("published" if published else "saved")
    model().save_pretrained(path)
    processor().save_pretrained(path)
    (path / "video_opd.json").write_text(json.dumps(SETTINGS, indent=2))
    if published:
        both = json.loads((path / "processor_config.json").read_text())
        (path / "processor_config.json").unlink()
        for key, name in (("image_processor", "preprocessor"), ("video_processor", "video_preprocessor")):
            content = {**both[key], "processor_class": both["processor_class"]}
            (path / f"{name}_config.json").write_text(json.dumps(content, indent=2))
        template = (path / "chat_template.jinja").read_text()
        (path / "chat_template.jinja").unlink()
        (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    use(path)  # imports are not a case's time
    return path


def copy_of(rng: random.Random, folder: Path) -> Path:
    good, path = good_folder(folder, rng.random() < 0.5), folder / "broken"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    return path


@functools.cache
def clip() -> Clip:
    return Clip(
        path=Path("v.mp4"),
        frames=np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8),
        times_s=np.arange(4) / 2,
        frame_indices=np.arange(4),
        source_fps=2.0,
        duration_s=2.0,
        source_size_px=(64, 64),
        digest="clip",
    )


def use(path: Path) -> None:
    """Loads the folder and lets the model answer. The weights must be those of the file, bit for bit."""
    config = read_inference_config(str(path), [])
    read_sizes(path)
    loaded, its_processor = load_model(path, dtype="float32")
    held = loaded.state_dict()
    for name, tensor in load_file(path / "model.safetensors").items():
        if name in held:
            assert torch.equal(held[name].view(torch.uint8), tensor.float().view(torch.uint8)), (
                f"{name} is another"
            )
    encoder = PromptEncoder(its_processor, config.prompt)
    policy = HFPolicy(loaded, its_processor, "prefix")
    prompt = encoder.encode(clip(), "the cup falls", "a")
    prefix = policy.prefill([prompt], grad=False)
    policy.sample(prefix, n=1, max_new_tokens=2, temperature=1.0, top_p=1.0, top_k=0, seeds=[[0]])
    check_same_tokens((loaded, its_processor), (read_model_configs(path), its_processor))


def break_json(rng: random.Random, file: Path) -> None:
    file.write_bytes(broken_json(rng, file.read_text(encoding="utf-8")))


# --- config and weights ------------------------------------------------------------------------------


def break_weights(rng: random.Random, file: Path) -> None:
    """Breaks the header of a safetensors file, its bytes, or its tensors' names and types."""
    blob = file.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    blow = rng.randrange(5)
    if blow == 0:
        file.write_bytes(mutate(rng, blob))
    elif blow == 1:
        head = mutate(rng, blob[: 8 + size])
        file.write_bytes(head + blob[8 + size :])
    elif blow == 2:
        header = odd_tree(rng, json.loads(blob[8 : 8 + size]))
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + size :])
    else:
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        changed: dict[int, Callable[[], torch.Tensor]] = {
            0: lambda: tensor.to(
                rng.choice((torch.int8, torch.int64, torch.float64, torch.bool, torch.bfloat16))
            ),
            1: lambda: tensor.flatten(),
            2: lambda: torch.cat([tensor, tensor]),
            3: lambda: tensor[:0],
            4: lambda: tensor[None],
        }
        kind = rng.randrange(7)
        if kind in changed:
            tensors[name] = changed[kind]().contiguous()
        elif kind == 5:
            tensors[f"{name}.x"] = tensor
        save_file(tensors, file, metadata={"format": "pt"})


def model_case(rng: random.Random, folder: Path) -> str:
    path = copy_of(rng, folder)
    name = rng.choice(("config.json", "config.json", "generation_config.json", "model.safetensors", "index"))
    if name == "model.safetensors":
        break_weights(rng, path / name)
    elif name == "index":
        weights = load_file(path / "model.safetensors")
        total = sum(tensor.numel() * 4 for tensor in weights.values())
        content = {
            "metadata": {"total_size": total},
            "weight_map": dict.fromkeys(weights, "model.safetensors"),
        }
        (path / "model.safetensors.index.json").write_bytes(broken_json(rng, json.dumps(content)))
    else:
        break_json(rng, path / name)
    return outcome(lambda: use(path))


# --- what makes a prompt -----------------------------------------------------------------------------


def processor_case(rng: random.Random, folder: Path) -> str:
    path = copy_of(rng, folder)
    file = rng.choice(sorted(path.glob("*processor_config.json")))
    tree = json.loads(file.read_text())
    if rng.random() < 0.4:
        file.write_bytes(broken_json(rng, file.read_text()))
    else:  # a number that decides how pixels are made
        part = tree.get(rng.choice(("image_processor", "video_processor")), tree)
        key = rng.choice(
            (*(key for key, value in part.items() if not isinstance(value, str)), "fps", "max_pixels")
        )
        if isinstance(part.get(key), dict | list) and rng.random() < 0.7:
            part[key] = odd_tree(rng, part[key], odd_number)
        else:
            part[key] = odd_number(rng)
        file.write_text(json.dumps(tree))
    return outcome(lambda: use(path))


VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TEMPLATES = (
    "", "{{", "{% for m in messages %}", "{{ messages[9] }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}",
    "{{ x.y.z }}", VIDEO, VIDEO * 2, "<|video_pad|>", "{{ messages }}", "{{ '%s' % messages }}",
    "{{ messages | tojson }}", "{{ range(9) | list }}", "{{ 'x'.encode('utf-8') }}", "\x00", "{% raw %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
)  # fmt: skip


def tokenizer_case(rng: random.Random, folder: Path) -> str:
    path = copy_of(rng, folder)
    names = [
        "tokenizer.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.json",
        "chat_template.jinja",
    ]
    names += ["special_tokens_map.json", "added_tokens.json", "vocab.json"]
    name = rng.choice(names)
    file = path / name
    if name == "chat_template.jinja":
        text = rng.choice((*TEMPLATES, None))
        good = (good_folder(folder, False) / name).read_text()
        file.write_bytes(odd_bytes(rng, good) if text is None else text.encode())
    elif name == "chat_template.json" and rng.random() < 0.5:
        file.write_text(json.dumps({"chat_template": rng.choice(TEMPLATES)}))
    elif name == "vocab.json":
        whole = json.loads((path / "tokenizer.json").read_text())["model"]
        (path / "tokenizer.json").unlink()
        file.write_bytes(broken_json(rng, json.dumps(whole["vocab"])))
        (path / "merges.txt").write_bytes(odd_bytes(rng, "#version: 0.2\na b\nab c\n"))
    elif file.exists():
        break_json(rng, file)
    else:
        small = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>", "special": True}}
        content: Any = small if name == "special_tokens_map.json" else {"<|new|>": 100}
        file.write_bytes(broken_json(rng, json.dumps(content)))
    return outcome(lambda: use(path))


def settings_case(rng: random.Random, folder: Path) -> str:
    """``video_opd.json``: what it says of the inputs is read without the weights."""
    path = folder / "settings"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "video_opd.json").write_bytes(broken_json(rng, json.dumps(SETTINGS)))

    def read() -> None:
        config = read_inference_config(str(path), [])
        assert config.prompt.video_form == choose_video_form(config.prompt, path)

    return outcome(read)


# --- adapters ----------------------------------------------------------------------------------------


@functools.cache
def good_adapter(folder: Path) -> Path:
    base = good_folder(folder, False)
    adapted = model()
    add_adapters(adapted, LoraConfig(parts=("language",), rank=2, alpha=4), 0, str(base))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("lm_head"))
    path = folder / "adapter"
    save_adapter(adapted, path)
    return path


def use_adapter(path: Path, as_teacher: bool) -> None:
    """What is loaded is what the files hold: every A and B, every weight in full, alpha ÷ rank."""
    if as_teacher:
        load_teacher(path, "float32", "cpu")
        return
    adapted = model()
    load_adapter(adapted, path)
    said = json.loads((path / "adapter_config.json").read_text())
    scales = {layer.scaling["default"] for _, layer in adapted_layers(adapted)}
    assert scales == {said["lora_alpha"] / said["r"]} and all(np.isfinite(list(scales)))
    held = adapted.state_dict()
    for name, tensor in load_file(path / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(held[name].view(torch.uint8), tensor.float().view(torch.uint8)), (
            f"{name} is another"
        )
    if (path / "trained_in_full.safetensors").exists():
        for name, tensor in load_file(path / "trained_in_full.safetensors").items():
            assert torch.equal(held[name].view(torch.uint8), tensor.float().view(torch.uint8)), (
                f"{name} is another"
            )


def adapter_case(rng: random.Random, folder: Path) -> str:
    good, path = good_adapter(folder), folder / "broken-adapter"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    name = rng.choice(
        ("adapter_config.json", "adapter_config.json", "adapter_model", "trained_in_full", "base")
    )
    if name == "base":
        file = path / "adapter_config.json"
        bases = (
            "",
            ".",
            str(path),
            str(folder),
            "/",
            "\x00",
            "a/b",
            "x" * 5000,
            3,
            None,
            [str(path)],
            {"a": 1},
        )
        content = json.loads(file.read_text()) | {"base_model_name_or_path": rng.choice(bases)}
        file.write_text(json.dumps(content))
    elif name.endswith(".json"):
        break_json(rng, path / name)
    else:
        break_weights(rng, path / f"{name}.safetensors")
    as_teacher = name == "base" or rng.random() < 0.2

    def use_it() -> None:
        if as_teacher:
            choose_video_form(read_inference_config(str(path), []).prompt, path)
        use_adapter(path, as_teacher)

    return outcome(use_it)


CASES: dict[str, Callable[[random.Random, Path], str]] = {
    "model": model_case,
    "processor": processor_case,
    "tokenizer": tokenizer_case,
    "settings": settings_case,
    "adapter": adapter_case,
}
