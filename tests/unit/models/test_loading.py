"""Model folders that load, folders that do not, and students and teachers whose tokens differ."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import encode, model, processor
from safetensors.torch import load_file, save_file

from video_opd.errors import UserError
from video_opd.models.loading import check_same_tokens, load_model
from video_opd.models.policy import HFPolicy
from video_opd.models.vision_attention import NAME


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_saved_folder_loads_as_it_was(saved: Path) -> None:
    loaded, loaded_processor = load_model(saved, dtype="float32")
    assert not loaded.training and loaded.model.visual.config._attn_implementation == NAME
    prompt, responses = encode("when?"), [[[9, 10, 11]]]
    got = HFPolicy(loaded, loaded_processor).logprobs([prompt], responses).logprobs_BT
    expected = HFPolicy(model(), processor(), "plain").logprobs([prompt], responses).logprobs_BT
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_precision_and_attention_are_chosen(saved: Path) -> None:
    loaded, _ = load_model(str(saved), dtype="bfloat16", attn="eager")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.visual.config._attn_implementation == "eager"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def drop_processor(folder: Path) -> None:
    for pattern in ("*processor*", "token*", "chat_template*", "special*"):
        for file in folder.glob(pattern):
            file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be loaded"),
        (lambda f: edit_config(f, model_type="qwen2"), "'qwen2' model"),
        (lambda f: (f / "model.safetensors").unlink(), "the weights cannot be loaded"),
        (truncate, "the weights cannot be loaded"),
        (drop_weight, "1 weights are missing, first 'lm_head.weight'"),
        (drop_processor, "processor"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, dtype="float32")
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", "missing"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(UserError, match=f"{path}: no such model folder"):
        load_model(path)


def test_a_file_is_not_a_folder(saved: Path) -> None:
    with pytest.raises(UserError, match="a file, not a model folder"):
        load_model(saved / "config.json")


@pytest.mark.parametrize(
    ("option", "message"), [({"dtype": "int3"}, "dtype is 'int3'"), ({"device": "tpu9"}, "tpu9")]
)
def test_impossible_options_are_refused(saved: Path, option: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(saved, **option)


# ------------------------------------------------------------------------------------------- the same tokens


def pair(change: Callable[[Any, Any], None]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    other_model, other_processor = model(1), copy.deepcopy(processor())
    change(other_model, other_processor)
    return (model(), processor()), (other_model, other_processor)


def test_padded_embeddings_may_differ() -> None:
    check_same_tokens(*pair(lambda m, p: m.resize_token_embeddings(640)))


def swap_two_tokens(_: Any, changed: Any) -> None:
    from tokenizers import Tokenizer

    tokenizer = json.loads(changed.tokenizer.backend_tokenizer.to_str())
    vocab = tokenizer["model"]["vocab"]
    a, b = (next(token for token, i in vocab.items() if i == index) for index in (200, 207))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    changed.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))


def set_eos(changed: Any, _: Any) -> None:
    changed.generation_config.eos_token_id = [changed.config.text_config.eos_token_id, 17]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two_tokens, "token 200 is"),
        (lambda m, p: p.tokenizer.add_tokens(["<extra>"]), "is None, the teacher's '<extra>'"),
        (lambda m, p: setattr(p.tokenizer, "pad_token", "<|im_end|>"), "special tokens: pad_token"),
        (set_eos, r"token 17 .* ends a response of only one"),
        (lambda m, p: setattr(m.config, "video_token_id", 3), "video_token_id"),
        (lambda m, p: setattr(p, "chat_template", p.chat_template + " "), "chat templates, from character"),
        (lambda m, p: setattr(p.video_processor, "image_mean", [0.1, 0.5, 0.5]), "image_mean"),
        (lambda m, p: setattr(m.config.vision_config, "patch_size", 14), "patch_size"),
    ],
)
def test_a_difference_is_named(change: Callable[[Any, Any], None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same_tokens(*pair(change))


def test_a_name_that_no_hub_knows_might_have_been_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"models/studnt: there is no such folder, and as a name on a hub: "):
        load_model("models/studnt")
