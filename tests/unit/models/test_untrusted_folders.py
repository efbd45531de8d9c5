"""Folders from somebody else: nothing that is read runs code, and nobody is asked whether it may."""

from __future__ import annotations

import builtins
import io
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import model, processor

from video_opd.data.encode import PromptEncoder
from video_opd.errors import UserError
from video_opd.models.loading import load_model
from video_opd.models.lora import load_adapter

CODE = "import pathlib\npathlib.Path({!r}).write_text('ran')\n{}\n"


class Trap:
    """An object that leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    model().save_pretrained(path)
    processor().save_pretrained(path)
    return path


@pytest.fixture(params=["closed", "says y"], autouse=True)
def standard_input(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    asked: list[Any] = []
    real_input = builtins.input

    def watched(*prompt: Any) -> str:
        asked.append(prompt)
        return real_input(*prompt)

    monkeypatch.setattr(builtins, "input", watched)
    monkeypatch.setattr(sys, "stdin", io.StringIO("" if request.param == "closed" else "y\n" * 100))
    yield
    assert not asked


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def code(folder: Path, name: str, rest: str = "") -> None:
    (folder / name).write_text(CODE.format(str(folder.parent / "ran"), rest))


def unknown_config(folder: Path) -> None:
    code(folder, "theirs.py", "from transformers import PretrainedConfig\nclass C(PretrainedConfig): pass")
    edit(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.C"})


def known_config(folder: Path) -> None:
    code(
        folder,
        "theirs.py",
        "from transformers import Qwen3VLForConditionalGeneration as M, Qwen3VLConfig as C",
    )
    names = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    edit(folder / "config.json", auto_map={"AutoConfig": "theirs.C", **dict.fromkeys(names, "theirs.M")})


def processor_code(folder: Path) -> None:
    code(folder, "theirs.py", "from transformers import Qwen3VLProcessor as P")
    edit(folder / "processor_config.json", processor_class="Theirs", auto_map={"AutoProcessor": "theirs.P"})


def known_processor_code(folder: Path) -> None:
    code(folder, "theirs.py", "from transformers import Qwen3VLProcessor as P")
    edit(folder / "processor_config.json", auto_map={"AutoProcessor": "theirs.P"})


def tokenizer_code(folder: Path) -> None:
    code(folder, "theirs.py", "from transformers import Qwen2TokenizerFast as T")
    classes = {"AutoTokenizer": ["theirs.T", "theirs.T"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Theirs", auto_map=classes)


def known_tokenizer_code(folder: Path) -> None:
    code(folder, "theirs.py", "from transformers import Qwen2TokenizerFast as T")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.T", "theirs.T"]})


def part_of_processor(key: str, kind: str, auto: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        code(folder, "theirs.py", f"from transformers import {kind} as X")
        settings = json.loads((folder / "processor_config.json").read_text())
        part = {**settings.get(key, {}), f"{key}_type": "Theirs", "auto_map": {auto: "theirs.X"}}
        edit(folder / "processor_config.json", **{key: part})

    return change


def preprocessor_file(name: str, auto: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        code(folder, "theirs.py", "class X: pass")
        settings = json.loads((folder / "processor_config.json").read_text())
        settings.pop(key, None)
        (folder / "processor_config.json").write_text(json.dumps(settings))
        (folder / name).write_text(json.dumps({f"{key}_type": "Theirs", "auto_map": {auto: "theirs.X"}}))

    return change


def custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    code(folder / "custom_generate", "generate.py", "def generate(*a, **k): pass")
    (folder / "custom_generate" / "requirements.txt").write_text("")


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    trap = {"lm_head.weight": Trap(folder.parent / "ran")}
    torch.save(trap, folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    pickled_weights(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bare_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder.parent / "ran")))


def pickle_for_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(folder.parent / "ran")))


def pickled_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Trap(folder.parent / "ran")))


def tokenizer_of_any_kind(folder: Path) -> None:
    edit(folder / "tokenizer.json", model={"type": "Theirs", "vocab": {}})


def adapter_in_the_folder(folder: Path) -> None:
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 2, "lora_alpha": 2}
    trapped = {"target_modules": ["q_proj"], "megatron_config": {"a": 1}, "megatron_core": "theirs"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **trapped}))
    torch.save({"x": Trap(folder.parent / "ran")}, folder / "adapter_model.bin")
    code(folder, "theirs.py")


def quantization(folder: Path) -> None:
    code(folder, "theirs.py")
    edit(folder / "config.json", quantization_config={"quant_method": "theirs", "load_in_4bit": True})


def kernels(folder: Path) -> None:
    edit(folder / "config.json", _attn_implementation="somebody/kernel", use_kernels=True)


ATTEMPTS = {
    "config of an unknown type": unknown_config,
    "config of a known type": known_config,
    "processor": processor_code,
    "processor of a known class": known_processor_code,
    "tokenizer": tokenizer_code,
    "tokenizer of a known class": known_tokenizer_code,
    "image processor": part_of_processor(
        "image_processor", "Qwen2VLImageProcessorFast", "AutoImageProcessor"
    ),
    "video processor": part_of_processor("video_processor", "Qwen3VLVideoProcessor", "AutoVideoProcessor"),
    "image processor's file": preprocessor_file(
        "preprocessor_config.json", "AutoImageProcessor", "image_processor"
    ),
    "video processor's file": preprocessor_file(
        "video_preprocessor_config.json", "AutoVideoProcessor", "video_processor"
    ),
    "custom_generate": custom_generate,
    "pickled weights": pickled_weights,
    "pickled shards": pickled_shards,
    "bare pickle": bare_pickle,
    "pickle as safetensors": pickle_for_safetensors,
    "pickle as tokenizer": pickled_tokenizer,
    "tokenizer of any kind": tokenizer_of_any_kind,
    "adapter beside the model": adapter_in_the_folder,
    "quantization": quantization,
    "kernels": kernels,
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_code_of_a_model_folder_runs(folder: Path, attempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))  # as if the command were started inside it
    ATTEMPTS[attempt](folder)
    try:
        load_model(folder, dtype="float32")
    except UserError as error:
        assert "\n" not in str(error)
    assert not (folder.parent / "ran").exists()


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ self.__init__.__globals__.__builtins__.open('RAN', 'w') }}",
    "{{ messages.append(1) }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}",
    "{{ lipsum.__globals__['os'].popen('touch RAN') }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_code_of_a_chat_template_runs(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template.replace("RAN", str(folder.parent / "ran")))
    _, loaded = load_model(folder, dtype="float32")
    with pytest.raises(UserError, match="chat template"):
        PromptEncoder(loaded)
    assert not (folder.parent / "ran").exists()


def adapter(folder: Path, **settings: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **settings}))
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "theirs"},
        {"peft_type": "PROMPT_TUNING"},
        {"auto_mapping": {"base_model_class": "M", "parent_library": "theirs"}, "use_dora": True},
        {"init_lora_weights": "eva"},
        {"layer_replication": [[0, 1]]},
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8}},
        {"bias": "all"},
        {"r": "2"},
        {"r": 0},
        {"r": 10**12},
        {"target_modules": 3},
        {"target_modules": "("},
        {"target_modules": None},
        {"lora_alpha": None},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": -4},
        {"lora_alpha": True},
        {"lora_alpha": 10**400},
    ],
)
def test_an_adapter_of_more_than_rank_alpha_and_layers_is_refused(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft imports the module that ``megatron_core`` names."""
    monkeypatch.syspath_prepend(str(tmp_path))
    code(tmp_path, "theirs.py")
    (tmp_path / "theirs.py").write_text(CODE.format(str(tmp_path / "ran"), ""))
    with pytest.raises(UserError, match="the adapter"):
        load_adapter(model(), adapter(tmp_path / "adapter", **settings))
    assert not (tmp_path / "ran").exists() and "theirs" not in sys.modules


def test_pickled_adapters_are_not_read(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap(tmp_path / "ran")}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="the adapter cannot be read"):
        load_adapter(model(), folder)
    assert not (tmp_path / "ran").exists()
