"""Recipes: strict keys and types, overrides, refusals with a remedy, and the round trip through YAML."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.config import (
    METHODS,
    WITH_TEACHER,
    GRPORecipe,
    ModelConfig,
    PromptConfig,
    Recipe,
    VideoConfig,
    VideoOPDRecipe,
    dump_recipe,
    load_recipe,
    read_settings,
    recipe_from_dict,
)
from video_opd.config.tree import apply_overrides, flatten, override_words, parse_yaml
from video_opd.errors import UserError

SMALLEST = {"teacher": {"path": "teacher"}, "data": {"train": "train.jsonl"}}


def make(**sections: object) -> Recipe:
    tree: dict[str, object] = {name: dict(keys) for name, keys in SMALLEST.items()}
    for name, keys in sections.items():
        old = tree.get(name)
        tree[name] = {**old, **keys} if isinstance(old, dict) and isinstance(keys, dict) else keys
    return recipe_from_dict(tree)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_defaults_are_the_papers_values():
    recipe = make()
    assert isinstance(recipe, VideoOPDRecipe)
    assert recipe.optim.lr == 1e-6 and recipe.optim.batch_size == 32 and recipe.optim.epochs == 1
    assert recipe.sampling.rollouts == 1 and recipe.sampling.temperature == 1.0
    assert recipe.video.fps == 2.0 and recipe.video.max_frames == 768
    assert recipe.video.max_frame_tokens == 768 and recipe.video.max_video_tokens == 8192
    assert recipe.prompt.style == "paper" and not recipe.prompt.thinking
    assert recipe.loss.reduction == "sum"


def test_every_mistake_of_a_recipe_is_named_at_once():
    tree = {**SMALLEST, "optim": {"lr": -1, "betas": [2, 3]}, "model": {"dtype": "half"}}
    with pytest.raises(UserError) as refused:
        recipe_from_dict(tree)
    message = str(refused.value)
    assert message.startswith("recipe: model.dtype is 'half'") and "\n" not in message
    assert message.endswith("(also wrong: optim.lr, optim.betas[0], optim.betas[1])")


def test_unknown_keys_hide_other_mistakes():
    tree = {**SMALLEST, "optim": {"lrr": 1, "lr": -1}, "run": {"sed": 0}}
    with pytest.raises(UserError) as refused:
        recipe_from_dict(tree)
    message = str(refused.value)
    assert message.startswith("recipe: optim.lrr is not a known key; did you mean optim.lr?")
    assert message.endswith("(also wrong: run.sed)")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"optim": {"batchsize": 4}}, "optim.batchsize is not a known key; did you mean optim.batch_size?"),
        ({"optim": {"learning_rate": 4}}, "did you mean optim.lr?"),
        ({"lr": 1e-6}, "lr is not a known key; did you mean optim.lr?"),
        ({"optm": {}}, "did you mean optim?"),
        ({"video": {"max_new_tokens": 3}}, "did you mean sampling.max_new_tokens?"),
        ({"run": {"zzzz": 3}}, "known here: run.dir, run.seed"),
        ({"data": {"tran": "d"}}, "data.tran is not a known key; did you mean data.train?"),
        ({"optim": {1: 2}}, "optim.1 is not a known key; did you mean optim.lr?"),
        ({1: {}}, "1 is not a known key"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(tree: dict, expected: str):
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        recipe_from_dict({**SMALLEST, **tree})


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"optim": {"lr": "fast"}}, "optim.lr must be a number, not 'fast'"),
        ({"optim": {"lr": True}}, "optim.lr must be a number"),
        ({"optim": {"lr": ".nan"}}, "optim.lr must be a number"),
        ({"optim": {"batch_size": 1.5}}, "optim.batch_size must be a whole number"),
        ({"optim": {"batch_size": None}}, "optim.batch_size must be a whole number"),
        ({"optim": {"betas": [0.9]}}, "optim.betas needs 2 values"),
        ({"data": {"train": 3}}, "data.train must be text"),
        ({"data": {"train": "x", "shuffle": "yes"}}, "data.shuffle must be true or false"),
        ({"model": 3}, "model must be a section"),
        ({"model": {"dtype": "float16"}}, "model.dtype is 'float16'; choose one of"),
        ({"teacher": {}}, "teacher.path is missing"),
        ({"method": "grop"}, "method is 'grop'"),
        ({"method": None}, "method is empty; choose one of: video-opd, grpo"),
        ({"method": ["grpo"]}, r"method is \['grpo'\]; choose one of: .* did you mean grpo"),
        ({"optim": {"betas": [1, 2, 3]}}, "optim.betas needs 2 values, not 3"),
        ({"optim": {"betas": [0.9, "x"]}}, r"optim.betas\[1\] must be a number, not 'x'"),
        ({"video": {"fps": float("inf")}}, "video.fps must be a finite number, not inf"),
        ({"teacher": {"path": "t", "by_source": {"a": 3}}}, "teacher.by_source.a must be text, not 3"),
        ({"teacher": {"path": "t", "by_source": None}}, "teacher.by_source is empty; for none, write {}"),
        ({"data": []}, "data must be a section"),
        ({"teacher": {"path": None}}, "teacher.path must be text, but it is empty"),
        ({"model": {"dtype": None}}, "model.dtype is empty; choose one of: float32, bfloat16"),
        ({"lora": {"parts": None}}, r"lora.parts is empty; for none, write \[\]"),
        ({"lora": {"parts": "language,vision"}}, r"lora.parts is a list: write .\[language, vision\]."),
        ({"lora": {"parts": ["language,vision"]}}, r"lora.parts\[0\] is 'language,vision'; choose one of"),
        ({"optim": {"betas": "0.9,0.95"}}, r"optim.betas is a list: write .\[0.9, 0.95\]."),
    ],
)
def test_wrong_types_are_refused(tree: dict, expected: str):
    with pytest.raises(UserError, match=expected):
        recipe_from_dict({**SMALLEST, **tree})


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        ("sampling", {"top_p": 0.9}, "set sampling.top_p to 1.0"),
        ("sampling", {"top_k": 20}, "set sampling.top_k to 0"),
        ("sampling", {"temperature": 0.7}, "set sampling.temperature to 1.0"),
        ("sampling", {"temperature": 0.0}, "above 0"),
        ("sampling", {"rollouts": 0}, "at least 1"),
        ("optim", {"micro_batch_size": 5}, "not a multiple"),
        ("optim", {"warmup_steps": 9, "max_steps": 3}, "above optim.max_steps"),
        ("optim", {"lr": 0}, "above 0"),
        ("optim", {"epochs": 0}, "optim.max_steps"),
        ("optim", {"betas": [0.9, 1.0]}, "betas"),
        ("video", {"min_frames": 9, "max_frames": 8}, "min_frames <= max_frames"),
        ("video", {"min_frame_tokens": 9, "max_frame_tokens": 8}, "min_frame_tokens <= max_frame_tokens"),
        ("video", {"max_video_tokens": 1}, "cannot hold"),
        ("video", {"fps": 0}, "above 0"),
        ("data", {"max_failed_share": 5}, "between 0 and 1"),
        ("data", {"train": ""}, "data.train is empty"),
        ("run", {"keep_checkpoints": 0}, "at least 1"),
        ("loss", {"ratio_tolerance": 0}, "above 0"),
        ("evaluate", {"batch_size": 0}, "at least 1"),
        ("optim", {"updates_per_batch": 2, "max_steps": 5}, "half used"),
        ("teacher", {"reward_scale": 0.5}, "at least 1"),
        ("teacher", {"by_source": {"web": ""}}, "by_source.web is empty"),
        ("loss", {"clip_high": 0.3}, "clip_low alone"),
        ("loss", {"kl_beta": 0.1}, "means nothing to method video-opd"),
        ("loss", {"max_importance_weight": 0.5}, "at least 1"),
        ("reward", {"function": "mine.py:reward"}, "means nothing to method video-opd"),
        ("lora", {"rank": 0}, "at least 1"),
        ("model", {"reduce": "micro_batch"}, "needs model.sharding fsdp2"),
        ("model", {"gather": "layer"}, "needs model.sharding fsdp2"),
        ("model", {"gather": "layer", "sharding": "fsdp2", "engine": "plain"}, "needs model.engine prefix"),
        (
            "model",
            {"gather": "layer", "sharding": "fsdp2", "gradient_checkpointing": False},
            "gradient_checkpointing out, or set it to true",
        ),
    ],
)
def test_impossible_settings_fail_at_once_with_the_remedy(section: str, keys: dict, expected: str):
    with pytest.raises(UserError, match=expected):
        make(**{section: keys})


def test_overrides_are_yaml_and_win(tmp_path: Path):
    path = write(tmp_path, "teacher: {path: t}\ndata: {train: d}\noptim: {lr: 1e-5}\n")
    line = "--optim.lr 3e-4 --optim.betas=[0.8,0.95] --data.shuffle false --run.trackers []"
    line += " --optim.max_steps 7 --data.limit null --evaluate.data one.jsonl"
    recipe = load_recipe(path, line.split())
    assert recipe.optim.lr == 3e-4 and recipe.optim.betas == (0.8, 0.95) and recipe.optim.max_steps == 7
    assert recipe.data.shuffle is False and recipe.run.trackers == () and recipe.data.limit is None
    assert recipe.evaluate.data == ("one.jsonl",)  # one value stands for a list of one


def test_a_file_name_may_hold_a_comma():
    assert recipe_from_dict({**SMALLEST, "evaluate": {"data": "a,b.jsonl"}}).evaluate.data == ("a,b.jsonl",)


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path):
    path = write(tmp_path, "teacher: {path: t}\ndata: {train: d}\noptim: {lr: 1e-5}")
    assert load_recipe(path).optim.lr == 1e-5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optim.lr"], "has no value"),
        (["optim.lr", "3"], "--section.key value"),
        (["--optim.rl", "3"], "did you mean optim.lr"),
        (["--optim.lr.x", "3"], "is not a section"),
        (["--optim.betas", "[1"], "not valid YAML"),
    ],
)
def test_broken_overrides(tmp_path: Path, words: list[str], expected: str):
    path = write(tmp_path, "teacher: {path: t}\ndata: {train: d}\noptim: {lr: 1e-5}\n")
    with pytest.raises(UserError, match=expected):
        load_recipe(path, words)


def test_a_section_that_is_empty_in_the_file_can_be_filled(tmp_path: Path):
    path = write(tmp_path, "teacher: {path: t}\ndata: {train: d}\noptim:\n")
    assert load_recipe(path) == load_recipe(path, ["--optim.lr", "1e-6"])
    assert load_recipe(path, ["--optim.lr", "3e-4", "--optim.epochs", "2"]).optim.epochs == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("optim: [", "line 1"), ("just text", "expected sections"), ("", "data.train is missing")],
)
def test_broken_files_name_the_file(tmp_path: Path, text: str, expected: str):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=expected) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (b"\xff\xfem\x00", "not UTF-8 at byte 0"),
        (b"data: 2026-99-99", "cannot be read"),
        (b"run: {seed: " + b"9" * 5000 + b"}", "cannot be read"),
        (b"data: {train: x}\noptim: {lr: " + b"9" * 400 + b"}", r"optim\.lr must be a number"),
        (b"a: " + b"[" * 5000, "50 levels"),
        (b"a: " + b"[" * 60 + b"]" * 60, "50 levels"),
        (b"a: &a {b: *a}", "aliases that multiply"),
        # a billion values in a few lines
        (
            b"k0: &k0 {a: b}\n"
            + b"".join(b"k%d: &k%d {a: *k%d, b: *k%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 31)),
            "aliases that multiply",
        ),
        # the same by merges, which are written out while values are made
        (
            b"k0: &k0 {a: b}\n"
            + b"".join(b"k%d: &k%d {<<: [*k%d, *k%d]}\n" % (i, i, i - 1, i - 1) for i in range(1, 31)),
            "line 13: more than 10000 values",
        ),
        (b"optim: {lr: 0x" + b"f" * 5000 + b"}", "line 1: an integer of thousands of digits"),
        (b"a: &a {<<: *a}", "aliases that multiply"),
        # numbers of YAML 1.1 that no reader takes for what they are
        (b"data: {train: x}\noptim: {batch_size: 010}", "line 2: YAML 1.1 reads 010 as 8; .* plain digits"),
        (b"run: {seed: -0_17}", "reads -0_17 as -15"),
        (b"run: {seed: 1:30}", "reads 1:30 as 90; .* quotation marks around a text"),
        (b"optim: {lr: 1:30.5}", r"reads 1:30\.5 as 90\.5"),
        (b"- [" + b"1," * 20_000 + b"]", "more than 10000 values"),
    ],
)
def test_files_that_no_reader_should_follow(tmp_path: Path, blob: bytes, expected: str):
    path = tmp_path / "r.yaml"
    path.write_bytes(blob)
    with pytest.raises(UserError, match=rf"r\.yaml.*{expected}"):
        load_recipe(path)


def test_plain_numbers_are_read() -> None:
    numbers = "--run.seed 1_000 --optim.batch_size=0x10 --optim.lr +1.5e-6 --run.log_rollouts 00"
    texts = "--model.path '010' --teacher.path t --data.train d"
    recipe = recipe_from_dict(apply_overrides({}, [*numbers.split(), *texts.split()]))
    assert (recipe.run.seed, recipe.optim.batch_size, recipe.optim.lr) == (1000, 16, 1.5e-6)
    assert (recipe.model.path, recipe.run.log_rollouts) == ("010", 0)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("optim: {lr: 3e-4}\ndata: {train: d}\noptim: {lr: 1e-6}\n", "line 3: the key 'optim' .* line 1"),
        ("optim:\n  lr: 3e-4\n  lr: 1e-6\n", "line 3: the key 'lr' .* line 2"),
        ("optim:\n  lr: 3e-4\n  'lr': 3e-4\n", "line 3: the key 'lr'"),
        ("teacher: {paths: {1: a, '1': b}}\n", "line 1: the key '1'"),
        ("a: [{b: {c: 1,\n c: 1}}]\n", "line 2: the key 'c'"),
        ("a: &a {x: 1}\nb: &b {y: 1}\nc:\n  <<: *a\n  <<: *b\n", "line 5: the key '<<'"),
    ],
)
def test_a_repeated_key_is_named_at_every_level(tmp_path: Path, text: str, where: str):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=rf"recipe\.yaml {where}"):
        load_recipe(path)


def test_a_recipe_of_200_mb_is_refused_before_it_is_read(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("# a comment\n" * 10)
    with path.open("r+b") as file:
        file.truncate(200 << 20)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"r\.yaml: more than 1,048,576 letters"):
        load_recipe(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 50_000


def test_a_key_beside_a_merge_overrides_it(tmp_path: Path):
    text = "optim: &o {lr: 3e-4, warmup_steps: 7}\ndata: {train: d}\nteacher: {path: t}\n"
    assert parse_yaml(text + "x: {<<: *o, lr: 1}\n", "x")["x"] == {"lr": 1, "warmup_steps": 7}


def test_a_repeated_key_in_an_override_is_named(tmp_path: Path):
    path = write(tmp_path, "teacher: {path: t}\ndata: {train: d}\n")
    with pytest.raises(UserError, match="--optim line 1: the key 'lr'"):
        load_recipe(path, ["--optim", "{lr: 3e-4, lr: 1e-6}"])


def test_a_missing_file_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_recipe(tmp_path / "none.yaml")


@settings(max_examples=25)
@given(
    lr=st.floats(1e-12, 1e3),
    micro=st.integers(1, 8),
    times=st.integers(1, 8),
    tolerance=st.none() | st.floats(1e-9, 1),
    trackers=st.lists(st.sampled_from(["tensorboard", "wandb", "trackio"]), max_size=3),
    train=st.text(st.characters(categories=["L", "N", "P"]), min_size=1),
)
def test_a_recipe_survives_yaml(lr, micro, times, tolerance, trackers, train):
    recipe = make(
        optim={"lr": lr, "micro_batch_size": micro, "batch_size": micro * times},
        loss={"ratio_tolerance": tolerance},
        run={"trackers": trackers},
        data={"train": train},
    )
    assert recipe_from_dict(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_dumped_recipe_holds_every_key():
    recipe = make()
    keys = [key for key, _ in flatten(yaml.safe_load(dump_recipe(recipe)))]
    assert keys == [key for key, _ in flatten(recipe.to_dict())] and len(keys) > 50
    assert "optim.lr" in keys and "method" in keys


def test_float32_asks_for_a_tighter_ratio():
    assert make().ratio_tolerance == 1e-3
    assert make(model={"dtype": "bfloat16"}).ratio_tolerance == 0.1
    assert make(loss={"ratio_tolerance": 0.1}).ratio_tolerance == 0.1


OLD = """\
method: METHOD
model: {path: base, dtype: float32, attn: sdpa, engine: prefix, gradient_checkpointing: null, freeze: [], sharding: null}
lora: {parts: [], rank: 16, alpha: 32.0}
teacher: {path: teacher, by_source: {}, dtype: float32, micro_batch_size: null, distributions: true, reward_scale: 1.0}
data: {train: d, video_root: null, limit: null, shuffle: true, workers: 2, prefetch: null, max_failed_share: 0.05,
  cache_dir: null}
video: {fps: 2.0, min_frames: 4, max_frames: 768, min_frame_tokens: 128, max_frame_tokens: 768, max_video_tokens: 8192,
  backend: pyav}
prompt: {style: paper, thinking: false}
sampling: {temperature: 1.0, top_p: 1.0, top_k: 0, max_new_tokens: 64, rollouts: ROLLOUTS, micro_batch_size: null}
reward: {iou: timestamp_aware, iou_weight: 1.0, format_weight: 0.0, function: null, normalise_std: true}
optim: {lr: 1.0e-06, batch_size: 32, micro_batch_size: 1, epochs: 1, updates_per_batch: 1, max_steps: null,
  weight_decay: 0.0, betas: [0.9, 0.999], eps: 1.0e-08, max_grad_norm: .inf, warmup_steps: 0, schedule: constant}
loss: {reduction: sum, nonfinite: raise, ratio_tolerance: null, estimator: sampled, top_k: 64, baseline: none,
  clip_low: null, clip_high: null, kl_beta: 0.0, max_importance_weight: null}
run: {dir: run, seed: 0, save_every: 10, keep_checkpoints: 2, save_dtype: float32, log_rollouts: 4, analytic_kl: true,
  trackers: [tensorboard], check: true}
evaluate: {data: [], video_root: null, limit: null, batch_size: 8, max_new_tokens: 64}
tvdf: {k: 2500, strategy: topk, rank_by: iou_gap, min_teacher_iou: 0.5, buckets: 5, center: null, sigma: null,
  teacher_k: 4, student_k: null, temperature: 1.0, batch_size: 8}
rounds: {count: 3, reuse: false}
"""  # noqa: E501
SMALL = {
    "model": {"path": "base"},
    "teacher": {"path": "teacher"},
    "data": {"train": "d"},
    "run": {"dir": "run"},
}


def old_recipe(method: str) -> dict[str, Any]:
    """``recipe.yaml`` as it was when every recipe had the keys of every method."""
    text = OLD.replace("METHOD", method).replace("ROLLOUTS", "8" if method == "grpo" else "1")
    return yaml.safe_load(text)


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_with_the_neutral_keys_of_other_methods_is_the_same_recipe(method: str):
    new = recipe_from_dict({"method": method, **SMALL, "optim": {"max_grad_norm": math.inf}})
    assert recipe_from_dict(old_recipe(method)) == new
    kept, before = dict(flatten(new.to_dict())), dict(flatten(old_recipe(method)))
    later = ("teacher.other_template", "teacher.placement", "model.reduce", "model.gather")
    assert [kept.pop(key) for key in later] == [False, "auto", "step", "step"]
    assert (kept.pop("optim.offload"), kept.pop("data.memory_gib")) == (False, 1.0)
    servers = ("teacher.urls", "teacher.fingerprint", "teacher.send", "teacher.wait_s")
    assert [kept.pop(key) for key in servers] == [[], None, "value", 3600.0]
    if method in WITH_TEACHER:
        assert [kept.pop(key) for key in ("teacher.receive", "teacher.overlap")] == ["distributions", True]
    if method in ("video-opd", "grpo"):
        assert [kept.pop(key) for key in ("sampling.engine", "sampling.vllm_memory")] == ["hf", 0.3]
    types = ("model.weights", "optim.moments", "teacher.quantization", "lora.base_quantization")
    assert [kept.pop(key) for key in types] == ["float32", "float32", None, None]
    assert kept.items() <= before.items()
    assert ("reward.iou" in kept) == (method == "grpo")
    assert ("sampling.temperature" in kept) == (method in ("video-opd", "grpo"))
    assert ("teacher.reward_scale" in kept) == (method in ("video-opd", "op-rkd"))


@pytest.mark.parametrize(
    ("method", "key", "value", "expected"),
    [
        ("video-opd", "loss.kl_beta", 0.1, r"kl_beta means nothing to method video-opd \(only to grpo\)"),
        ("op-fkd", "loss.clip_low", 0.2, r"\(only to video-opd, grpo, op-rkd\)"),
        ("op-rkd", "loss.max_importance_weight", 2.0, r"\(only to video-opd, grpo\)"),
        ("grpo", "teacher.by_source", {"web": "w"}, r"\(only to video-opd, op-rkd, op-fkd\)"),
        ("op-fkd", "teacher.reward_scale", 2.0, r"\(only to video-opd, op-rkd\)"),
        ("sft", "reward.function", "a:b", r"reward.function means nothing to method sft \(only to grpo\)"),
        ("sft", "sampling.rollouts", 8, "an annotation is one trajectory"),
        ("sft", "reward.functoin", "a:b", "reward.functoin is not a known key; did you mean reward.function"),
        ("sft", "reward", 3, "reward must be a section of keys, not 3"),
    ],
)  # fmt: skip
def test_a_key_of_another_method_must_be_neutral(method: str, key: str, value: object, expected: str):
    tree = old_recipe(method)
    section, _, name = key.partition(".")
    tree[section] = {**tree[section], name: value} if name else value
    with pytest.raises(UserError, match=expected):
        recipe_from_dict(tree)


def test_settings_in_files_are_what_they_were():
    """Rows of a file are continued only under the same note: keys, their order, and the numbers' spelling."""
    model = ModelConfig(path="m", freeze=("vision",))
    assert json.dumps(model.as_run()) == (
        '{"path": "m", "dtype": "float32", "attn": "sdpa", "engine": "prefix", '
        '"gradient_checkpointing": null, "freeze": ["vision"], "sharding": null}'
    )
    video = read_settings(VideoConfig, {"fps": 1, "max_frames": 64})
    budget = (
        '{"fps": 1.0, "min_frames": 4, "max_frames": 64, "min_frame_tokens": 128, "max_frame_tokens": 768, '
        '"max_video_tokens": 8192'
    )
    assert json.dumps(video.model_dump()) == budget + ', "backend": "pyav"}'
    assert json.dumps(video.without_decoder()) == budget + "}"
    floor = video.changed(keep="min_frame_tokens")  # the one key that came later is written if it differs
    assert json.dumps(floor.without_decoder()) == budget + ', "keep": "min_frame_tokens"}'
    assert read_settings(VideoConfig, floor.model_dump()) == floor
    assert json.dumps(PromptConfig().model_dump()) == '{"style": "paper", "thinking": false}'


def test_a_change_is_checked():
    recipe = make()
    other = recipe.changed(**{"model.path": "m", "optim.betas": (0.5, 0.6), "data.limit": None})
    assert (other.model.path, other.optim.betas) == ("m", (0.5, 0.6)) and type(other) is type(recipe)
    assert other.changed(**{"model.path": recipe.model.path, "optim.betas": recipe.optim.betas}) == recipe
    assert VideoConfig().changed(fps=1).fps == 1.0
    with pytest.raises(UserError, match=r"optim.lr must be above 0, not -1.0 \(learning rate; sec. 4.1\)"):
        recipe.changed(**{"optim.lr": -1.0})
    with pytest.raises(UserError, match=r"did you mean optim.lr"):
        recipe.changed(**{"optim.rl": 1.0})


def test_the_settings_import_no_torch():
    code = "import sys, video_opd.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (
            {"method": "op-fkd", "teacher": {"path": "t", "distributions": False}},
            "op-fkd needs the teacher's dist",
        ),
        (
            {"loss": {"estimator": "full"}, "teacher": {"path": "t", "distributions": False}},
            "estimator full needs",
        ),
        (
            {"loss": {"estimator": "topk"}, "teacher": {"path": "t", "distributions": False}},
            "estimator topk needs",
        ),
        ({"loss": {"baseline": "kl"}, "teacher": {"path": "t", "distributions": False}}, "baseline kl needs"),
        ({"method": "grpo", "sampling": {"rollouts": 1}}, "needs at least 2; the paper takes 8"),
        ({"run": {"seed": -1}}, "run.seed must be at least 0, not -1"),
        ({"run": {"seed": 2**32}}, "run.seed must be at most 4294967295, not 4294967296"),
        ({"prompt": {"thinking": True}}, "set sampling.max_new_tokens"),
        ({"method": "grpo", "prompt": {"thinking": True}}, "set sampling.max_new_tokens"),
        ({"method": "sft", "prompt": {"thinking": True}}, "no reasoning"),
        ({"method": "sft", "sampling": {"rollouts": 8}}, "an annotation is one trajectory"),
        ({"method": "grpo", "sampling": {"top_p": 0.9}}, "set sampling.top_p to 1.0"),
        ({"method": "video-opd", "sampling": {"top_p": 0.9}}, "set sampling.top_p to 1.0"),
        ({"method": "video-opd", "teacher": {}}, "method video-opd learns from a teacher"),
        ({"method": "op-rkd", "teacher": {}}, "method op-rkd learns from a teacher"),
        ({"method": "sft", "loss": {"baseline": "kl"}}, "means nothing to method sft"),
        ({"method": "grpo", "loss": {"estimator": "full"}}, "means nothing to method grpo"),
        ({"method": "grpo", "reward": {"function": "mine"}}, "file.py:function"),
        ({"method": "grpo", "reward": {"iou_weight": 0.0}}, "not both 0"),
        ({"method": "grpo", "reward": {"iou_weight": -1.0}}, "reward.iou_weight must be at least 0"),
        ({"loss": {"estimator": "full", "clip_low": 0.2}}, "belongs to loss.estimator sampled"),
        (
            {"loss": {"baseline": "kl"}, "teacher": {"path": "t", "reward_scale": 2}},
            "needs teacher.reward_scale 1",
        ),
        (
            {"model": {"freeze": ["vision"]}, "lora": {"parts": ["vision"]}},
            "stands in lora.parts and in model.freeze",
        ),
        ({"teacher": {"path": "t", "by_source": ["a"]}}, "by_source must be a section"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_anything_is_loaded(tree: dict, expected: str):
    with pytest.raises(UserError, match=expected):
        recipe_from_dict({**SMALLEST, **tree})


def test_defaults_follow_the_method_and_the_prompt():
    grpo = recipe_from_dict({"method": "grpo", "data": {"train": "d"}})
    assert isinstance(grpo, GRPORecipe)
    assert grpo.sampling.rollouts == 8 and grpo.loss.kl_beta == 0 and grpo.loss.clip is None  # sec. 4.1
    assert grpo.reward.iou == "timestamp_aware" and grpo.reward.normalise_std
    assert recipe_from_dict({"method": "grpo", "data": {"train": "d"}, "sampling": {"temperature": 0.9}})
    thinking = make(prompt={"thinking": True}, sampling={"max_new_tokens": 512})
    assert thinking.evaluate.max_new_tokens == 512
    assert make(loss={"clip_low": 0.2}).loss.clip == (0.2, 0.2)
    assert make(loss={"clip_low": 0.2, "clip_high": 0.28}).loss.clip == (0.2, 0.28)
    routed = make(teacher={"by_source": {"web": "w"}})
    assert isinstance(routed, VideoOPDRecipe) and routed.teacher.by_source == {"web": "w"}
    assert recipe_from_dict(yaml.safe_load(dump_recipe(routed))) == routed


def test_a_copy_decides_anew_what_was_not_given():
    """Also a copy of a copy, and what the command line does with the same file."""
    for recipe in (make(), make().changed(**{"optim.lr": 1e-5})):
        with pytest.raises(UserError, match=r"set sampling\.max_new_tokens"):
            recipe.changed(**{"prompt.thinking": True})
        short = recipe.changed(**{"sampling.max_new_tokens": 16})
        assert short.evaluate.max_new_tokens == 16
        assert short.changed(**{"sampling.max_new_tokens": 32}).evaluate.max_new_tokens == 32
        random = recipe.changed(**{"tvdf.strategy": "random"})
        assert (recipe.tvdf.min_teacher_iou, random.tvdf.min_teacher_iou) == (0.5, 0.0)
        assert random.changed(**{"tvdf.strategy": "topk"}).tvdf.min_teacher_iou == 0.5
    given = make(evaluate={"max_new_tokens": 48}, tvdf={"min_teacher_iou": 0.4})
    copy = given.changed(**{"sampling.max_new_tokens": 16, "tvdf.strategy": "random"})
    assert (copy.evaluate.max_new_tokens, copy.tvdf.min_teacher_iou) == (48, 0.4)
    assert make().given() == {"method": "video-opd", **SMALLEST}


def test_a_run_is_not_made_to_think_with_the_limit_that_its_file_holds(tmp_path: Path):
    """recipe.yaml holds every key, so the default looks as if it had been set."""
    path = write(tmp_path, dump_recipe(make()))
    with pytest.raises(UserError, match=r"set sampling\.max_new_tokens"):
        load_recipe(path, ["--prompt.thinking", "true"])
    for limit in ("64", "128"):
        thinking = load_recipe(path, ["--prompt.thinking", "true", "--sampling.max_new_tokens", limit])
        path.write_text(dump_recipe(thinking))
        assert load_recipe(path, ["--optim.lr", "1e-5"]).prompt.thinking
        path.write_text(dump_recipe(make()))


@pytest.mark.parametrize(
    "text",
    ["2024", "yes", "null", "a #1", "a: b", "[x]", "0x10", "1:30", "it's", "\U0001f600\n", " a ", "-", ""],
)
def test_texts_and_paths_of_python_are_no_yaml(text: str):
    for value in (text, Path("runs") / text):
        (key, word) = override_words({"run.dir": value})
        assert apply_overrides({}, [key, word]) == {"run": {"dir": str(value)}}


def test_values_of_python_stay_what_they_are():
    class Half(float):
        pass

    values = {
        **{"a": 1e-6, "b": math.inf, "c": None, "d": True, "e": 3, "f": ["x, y", "2"], "g": {"web": "w"}},
        **{"h": (0.9, 0.999), "i": [Path("a #1")], "j": Half(0.5), "k": [], "l": -1.5},
    }
    expected = {**values, "h": [0.9, 0.999], "i": ["a #1"], "j": 0.5}
    assert apply_overrides({}, override_words(values)) == expected
    assert override_words({"optim.lr": 3e-4, "run.dir": Path("runs/a")}) == [
        *("--optim.lr", "0.0003", "--run.dir", "runs/a")
    ]
    with pytest.raises(UserError, match=r"optim\.lr: a recipe holds numbers, texts.*not a object"):
        override_words({"optim.lr": object()})
