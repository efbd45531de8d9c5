"""Model folders that load, folders that do not, and students and teachers whose tokens differ."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import encode, model, processor
from process_cases import needs_proc
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from video_opd.errors import UserError
from video_opd.models import checkpoint_files
from video_opd.models.checkpoint_files import check_model_files
from video_opd.models.inference import read_inference_config, read_saved_settings, trained_video_form
from video_opd.models.loading import load_model, load_teacher, read_config
from video_opd.models.parts import cast_weights
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.policy import HFPolicy
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.vision_attention import NAME
from video_opd.models.vocabulary import Vocabulary


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


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_in_16_bits_is_widened_to_what_the_library_reads(
    tmp_path: Path, stored: torch.dtype
) -> None:
    made = model(0, sharpness=8.0)
    cast_weights(made, stored)
    made.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    assert checkpoint_files.stored_type(tmp_path) == {torch.bfloat16: "BF16", torch.float16: "F16"}[stored]
    expected = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    use_linear_patches(expected)
    loaded, _ = load_model(tmp_path, dtype="float32")
    as_stored, _ = load_model(tmp_path, dtype="float32", as_stored=True)
    for each, dtype in ((loaded, torch.float32), (as_stored, stored)):
        assert {weight.dtype for weight in each.parameters()} == {dtype}
        for kind in ("named_parameters", "named_buffers"):
            theirs, ours = dict(getattr(expected, kind)()), dict(getattr(each, kind)())
            assert theirs.keys() == ours.keys() and theirs
            for name, tensor in theirs.items():
                assert torch.equal(ours[name].to(tensor.dtype), tensor), name
                assert kind == "named_parameters" or ours[name].dtype == tensor.dtype, name
        for of in (lambda m: m.config, lambda m: m.config.text_config, lambda m: m.config.vision_config):
            assert of(each).dtype == of(expected).dtype  # what becomes of them


@needs_proc
def test_what_is_read_as_it_is_stored_stays_in_the_file(tmp_path: Path) -> None:
    """Processes share the pages of a file; what was copied, each has for itself."""
    made = model()
    cast_weights(made, torch.bfloat16)
    made.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, dtype="float32", as_stored=True)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    file = str(tmp_path / "model.safetensors")
    ranges = [[int(end, 16) for end in row[0].split("-")] for row in maps if row[-1] == file]
    # Private: what a run writes into its weights is not written into the checkpoint.
    assert ranges and all(row[1].endswith("p") for row in maps if row[-1] == file)
    copied = [
        name
        for name, weight in loaded.named_parameters()
        if not any(first <= weight.data_ptr() < last for first, last in ranges)
    ]
    assert copied == []


def test_the_type_of_a_checkpoint_with_several_files(folder: Path) -> None:
    assert checkpoint_files.stored_type(folder) == "F32"
    weights = load_file(folder / "model.safetensors")
    first, *others = weights
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {first: weights[first]}, "b.safetensors": {n: weights[n] for n in others}}
    for name, tensors in parts.items():
        save_file(tensors, folder / name)
    index = {"weight_map": {n: name for name, tensors in parts.items() for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_files.stored_type(folder) == "F32"
    save_file({first: weights[first].bfloat16()}, folder / "a.safetensors")
    assert checkpoint_files.stored_type(folder) is None  # two types
    save_file({n: 2 * weight.half() for n, weight in weights.items()}, folder / "model.safetensors")
    assert checkpoint_files.stored_type(folder) == "F16"
    read = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    assert torch.equal(read.lm_head.weight, 2 * weights["lm_head.weight"].half())  # the library reads it, too
    (folder / "model.safetensors").unlink()
    (folder / "a.safetensors").unlink()
    assert checkpoint_files.stored_type(folder) is None
    for text in ("[]", "{", ""):
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode())
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        assert checkpoint_files.stored_type(folder) is None
    assert checkpoint_files.stored_type("nobody/nothing") is None


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True, 10**9, 10**400])
@pytest.mark.parametrize(
    "key",
    ["text_config.num_attention_heads", "text_config.num_key_value_heads", "text_config.hidden_size",
     "text_config.vocab_size", "vision_config.num_heads", "vision_config.patch_size",
     "vision_config.spatial_merge_size", "vision_config.depth"],
)  # fmt: skip
def test_a_size_that_no_model_has_is_refused(folder: Path, key: str, size: Any) -> None:
    part, name = key.split(".")
    config = json.loads((folder / "config.json").read_text())
    config[part][name] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(folder)


@pytest.mark.parametrize(
    "section", [[4, 2], [4.0, 2, 2], [True, 2, 2], [9, 1, -2], "422", [4, 2, 3], [24, 20, 20]]
)
def test_heads_that_time_height_and_width_do_not_share_are_refused(folder: Path, section: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["rope_parameters"]["mrope_section"] == [4, 2, 2]
    config["text_config"]["rope_parameters"]["mrope_section"] = section
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="mrope_section"):
        read_config(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_folder_of_an_impossible_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        read_config(Path(name))


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


def cut_half(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((40).to_bytes(8, "little") + b"?" * 100)


def point(folder: Path, name: str) -> None:
    """As a clone without git-lfs leaves it."""
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def rename_weights(folder: Path) -> None:
    """Half of the names of Qwen2.5-VL's releases, without the ones that transformers converts."""
    weights = load_file(folder / "model.safetensors")
    other = {name.replace("model.visual.", "visual.tower."): value for name, value in weights.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def only_an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def quantise(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "weight_block_size": [16, 16]})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.safetensors"
    blob = file.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    text = json.dumps(change(json.loads(blob[8 : 8 + size]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + size :])


def index_of(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def other_patches(folder: Path) -> None:
    """32 px a token, as the encoder needs, and not as the vision tower reads them."""
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["video_processor"] |= {"patch_size": 32, "merge_size": 1}
    (folder / "processor_config.json").write_text(json.dumps(settings))


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
        (truncate, r"model\.safetensors is cut off \(1,000 bytes, and its header needs [\d,]+"),
        (cut_half, r"model\.safetensors is cut off"),
        (garble, "the weights cannot be loaded"),
        (lambda f: point(f, "model.safetensors"), r"model\.safetensors is a git-lfs pointer"),
        (lambda f: point(f, "tokenizer.json"), r"tokenizer\.json is a git-lfs pointer"),
        (rename_weights, r"other names.*'visual\..* is unknown and 'model\.visual\..* is missing \(\d+ in"),
        (lose_shard, r"model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index"),
        (drop_template, "no chat template in it"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in it"),
        (only_an_adapter, r"an adapter for some/base, not a model; merge it into that"),
        (lambda f: quantise(f, "awq"), r"quantised \(awq\).*video-opd reads fp8 alone; give the checkpoint"),
        (lambda f: quantise(f, "bitsandbytes"), r"quantised \(bitsandbytes\)"),
        (drop_weight, "1 weights are missing, first 'lm_head.weight'"),
        (drop_processor, "processor"),
        (lambda f: edit_header(f, lambda header: []), "the weights cannot be loaded"),
        (
            lambda f: edit_header(f, lambda header: {**header, "lm_head.weight": 3}),
            "weights cannot be loaded",
        ),
        (
            lambda f: edit_header(f, lambda header: {**header, "lm_head.weight": {"data_offsets": ["a"]}}),
            "the weights cannot be loaded",
        ),
        (lambda f: index_of(f, ["a"]), "does not say which file each weight is in"),
        (lambda f: index_of(f, {"a": [1]}), "does not say which file each weight is in"),
        (other_patches, "its processor has patch_size 32, and config.json has patch_size 16"),
        (lambda f: os.mkfifo(f / "notes"), "notes is not a plain file"),
    ],
)
def test_a_damaged_folder_is_named(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, dtype="float32")
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_damaged_folder_is_one_line_of_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rename_weights(folder)
    with pytest.raises(UserError):
        load_model(folder, dtype="float32")
    assert capsys.readouterr() == ("", "")


def to_fp8(folder: Path, scale: float = 0.01) -> dict[str, torch.Tensor]:
    """Quantises the language model as Qwen's FP8 copies are; returns the weights that it stands for."""
    weights, meant = load_file(folder / "model.safetensors"), {}
    for name in [n for n in weights if "language_model.layers" in n and n.endswith("proj.weight")]:
        rows, columns = (-(-size // 16) for size in weights[name].shape)
        eighth = (weights[name].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        meant[name] = eighth.float() * scale
        weights[name], weights[name + "_scale_inv"] = eighth, torch.full((rows, columns), scale)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    quantise(folder, "fp8")
    return meant


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp8_teacher_is_dequantised(folder: Path, dtype: str) -> None:
    meant = to_fp8(folder)
    loaded, _ = load_model(folder, dtype=dtype)
    found = dict(loaded.named_parameters())
    assert {p.dtype for p in found.values()} == {getattr(torch, dtype)} and meant
    for name, value in meant.items():
        torch.testing.assert_close(found[name].float(), value, atol=0, rtol=2**-8)  # bfloat16 rounds so


def test_a_quantised_student_is_refused_by_the_name_of_what_is_wanted(folder: Path) -> None:
    to_fp8(folder)
    with pytest.raises(UserError, match=r"quantised \(fp8\) and cannot be trained; give the checkpoint in"):
        load_model(folder, trained=True)
    named = folder / "Qwen3-VL-8B-Instruct-FP8"
    named.mkdir()
    for file in folder.glob("*.*"):
        (named / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"give Qwen3-VL-8B-Instruct, the checkpoint that it was made from"):
        load_model(named, trained=True)


def test_settings_of_generation_that_are_not_followed_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "min_new_tokens": 0, "top_p": 0.8, "top_k": 20}
    file.write_text(json.dumps(settings | neutral))
    load_model(folder, "float32")
    assert "generation_config" not in capsys.readouterr().err
    file.write_text(json.dumps(settings | {"repetition_penalty": 1.3, "suppress_tokens": [5]}))
    load_model(folder, "float32")
    said = (
        "its generation_config.json sets repetition_penalty, suppress_tokens; responses are written without"
    )
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_weight_without_a_place_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"extra.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    load_model(folder)
    assert "1 weights have no place in the model, first 'extra.weight'" in capsys.readouterr().err


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    content = {"base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert trained_video_form(tmp_path) == "release"
    with pytest.raises(UserError, match="an adapter, and its base cannot be read"):
        load_teacher(tmp_path, "float32", "cpu")


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


def unspecial(_: Any, changed: Any) -> None:
    """The teacher's <|im_start|> becomes text that decoding shows."""
    state = json.loads(changed.tokenizer.backend_tokenizer.to_str())
    next(token for token in state["added_tokens"] if token["id"] == 483)["special"] = False
    changed.tokenizer._tokenizer = type(changed.tokenizer.backend_tokenizer).from_str(json.dumps(state))


@pytest.mark.parametrize(
    "change",
    [
        lambda m, p: setattr(p, "chat_template", "{# fixed by another tool #}\n" + p.chat_template),
        lambda m, p: setattr(p.tokenizer, "pad_token", "<|im_end|>"),  # fills what is masked
        lambda m, p: p.tokenizer.add_tokens(["<answer>", "</answer>"]),  # the student never writes them
    ],
)
def test_what_makes_no_difference_is_no_obstacle(change: Callable[[Any, Any], None]) -> None:
    check_same_tokens(*pair(change))


def test_a_teacher_without_a_token_of_the_student_is_refused() -> None:
    student, teacher = pair(lambda m, p: p.tokenizer.add_tokens(["<extra>"]))
    with pytest.raises(UserError, match=r"is '<extra>', the teacher's None"):
        check_same_tokens(teacher, student)


def test_another_template_can_be_accepted() -> None:
    student, teacher = pair(lambda m, p: setattr(p, "chat_template", p.chat_template + "<think>\n"))
    check_same_tokens(student, teacher, other_template=True)


def test_a_teacher_with_more_tokens_scores_over_the_students() -> None:
    """Its own tokens get no probability: the distributions of both are over what the student can write."""
    _, (larger, its_processor) = pair(lambda m, p: p.tokenizer.add_tokens(["<answer>", "</answer>"]))
    own = Vocabulary.of(model(), processor())
    teacher = HFPolicy(larger, its_processor, vocabulary=own)
    alone = HFPolicy(larger, processor())
    prompts, responses = [encode("when?")], [[[9, 10, 11]]]
    got, expected = (p.logprobs(prompts, responses, full=True) for p in (teacher, alone))
    assert got.full_BTV is not None and expected.full_BTV is not None
    assert got.full_BTV.shape[-1] == own.size
    assert torch.equal(got.full_BTV, expected.full_BTV)
    assert HFPolicy(larger, its_processor).vocabulary.size == own.size + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two_tokens, "token 200 is"),
        (unspecial, "special tokens: added token 483"),
        (
            set_eos,
            r"token 17 .* ends one of the teacher's only .*; add 17 to eos_token_id in the student's "
            r"generation_config\.json",
        ),
        (lambda m, p: setattr(m.config, "video_token_id", 3), "video_token_id"),
        (
            lambda m, p: setattr(p, "chat_template", p.chat_template + "<think>\n"),
            r"do not write a prompt alike: behind '.*assistant\\n' the student's goes on with '', the "
            r"teacher's with '<think>.*set teacher\.other_template",
        ),
        (lambda m, p: setattr(p.video_processor, "image_mean", [0.1, 0.5, 0.5]), "image_mean"),
        (lambda m, p: setattr(m.config.vision_config, "patch_size", 14), "patch_size"),
    ],
)
def test_a_difference_is_named(change: Callable[[Any, Any], None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same_tokens(*pair(change))


def test_a_missing_generation_config_is_to_be_copied() -> None:
    """transformers makes one up, with fewer tokens that end a response."""
    student, (teacher, its_processor) = pair(lambda m, p: None)
    student[0].generation_config.eos_token_id = [17, processor().tokenizer.eos_token_id]
    teacher.generation_config = GenerationConfig.from_model_config(teacher.config)
    with pytest.raises(UserError, match=r"the teacher has no generation_config\.json: copy it from"):
        check_same_tokens(student, (teacher, its_processor))
    with pytest.raises(UserError, match=r"the student has no generation_config\.json: copy it from"):
        check_same_tokens((teacher, its_processor), student)


HUB_FILES = [
    ({"prompt": {"video_form": "nested"}}, "nested"),
    ({"prompt": {"style": "paper"}}, "nested"),  # before the form was written
    (None, "release"),  # Qwen's own checkpoints
]


@pytest.mark.parametrize(("settings", "form"), HUB_FILES)
def test_the_settings_of_a_model_on_a_hub_are_read(
    settings: Any, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache as ``hf download`` leaves it; ``config.json`` of the same name is found there."""
    snapshot = tmp_path / "hub" / "models--someone--tuned" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    config = {"model_type": "qwen3_vl", "text_config": {}, "vision_config": {}}
    (snapshot / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (snapshot / "video_opd.json").write_text(json.dumps(settings))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint_files._file_on_hub.cache_clear()
    assert read_config("someone/tuned").model_type == "qwen3_vl"
    assert read_saved_settings("someone/tuned") == settings
    assert read_inference_config("someone/tuned", []).prompt.video_form == form
    assert trained_video_form("someone/unknown") == "release"
    checkpoint_files._file_on_hub.cache_clear()


def test_a_hub_is_asked_once_for_settings_and_never_about_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached_file(model: str, name: str, **options: Any) -> str | None:
        asked.append((model, name))
        raise OSError("is not a valid model identifier")

    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    checkpoint_files._file_on_hub.cache_clear()
    for path in ("models", "models/studnt", "studnt", "./a/b", "someone/tuned", "someone/tuned"):
        assert read_saved_settings(path) is None
    assert asked == [("someone/tuned", "video_opd.json")]
    checkpoint_files._file_on_hub.cache_clear()


def test_a_hub_is_not_asked_about_a_name_in_a_folder_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    cached = {"models/known": str(tmp_path / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: cached.get(name))
    with pytest.raises(UserError, match=r"^models/studnt: no such folder in models, .*hf download") as error:
        check_model_files("models/studnt")
    assert "\n" not in str(error.value)
    check_model_files("models/known")  # downloaded before
    check_model_files("Qwen/Qwen3-VL-2B-Instruct")  # no folder Qwen is here: a hub may know it
    for path in ("./models/studnt", "~/studnt", "/studnt", "a/b/studnt", "studnt"):
        with pytest.raises(UserError, match="no such model folder"):
            check_model_files(path)


def test_a_name_that_no_hub_knows_might_have_been_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"models/studnt: there is no such folder, and as a name on a hub: "):
        load_model("models/studnt")


@pytest.mark.parametrize("ids", [[[3]], 1.5, -1, True, "</s>", 10**400, [None], 1e300])
def test_what_is_no_token_ends_no_response(ids: Any) -> None:
    ended = model()
    ended.generation_config.eos_token_id = ids
    with pytest.raises(UserError, match=r"eos_token_id is .*, and no token has such an id"):
        Vocabulary.of(ended, processor())


@pytest.mark.parametrize("token", [-1, 2**40])
def test_what_is_no_token_stands_for_no_pixels(token: int) -> None:
    pictured = model()
    pictured.config.video_token_id = token
    with pytest.raises(UserError, match=r"video_token_id is .*, and no token has such an id"):
        Vocabulary.of(pictured, processor())


def test_a_token_that_stands_for_pixels_ends_no_response() -> None:
    ended = model()
    ended.generation_config.eos_token_id = ended.config.video_token_id
    with pytest.raises(UserError, match="stands for pixels"):
        Vocabulary.of(ended, processor())


@pytest.mark.parametrize("base", ["x" * 5000, "\x00", "/"])
def test_an_adapter_for_what_cannot_be_a_folder_is_refused(tmp_path: Path, base: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert trained_video_form(tmp_path) == "release"
    with pytest.raises(UserError, match="an adapter, and its base cannot be read"):
        load_teacher(tmp_path, "float32", "cpu")


def test_a_config_is_read_again_when_its_file_has_changed(tmp_path: Path) -> None:
    """And whoever changes the config that they were given changes nobody else's."""
    model().save_pretrained(tmp_path / "m")
    first = read_config(tmp_path / "m")
    first.text_config.vocab_size = 1
    assert read_config(tmp_path / "m").text_config.vocab_size == model().config.text_config.vocab_size
    file = tmp_path / "m" / "config.json"
    content = json.loads(file.read_text())
    content["text_config"]["num_hidden_layers"] = 9
    file.write_text(json.dumps(content))
    assert read_config(tmp_path / "m").text_config.num_hidden_layers == 9
