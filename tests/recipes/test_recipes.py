"""Every recipe in the repository, found by itself: it reads, it is complete, and its first steps run.

The steps are taken on random tiny models and two generated videos, with everything else as the recipe says.
Recipes that then say the same take the same steps, so one of them is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from torchao_cases import torchao  # noqa: F401

from video_opd.config import MethodName, Recipe, dump_recipe, load_recipe, recipe_from_dict
from video_opd.config.__main__ import schema
from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.planning.plan import make_plan
from video_opd.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
# A link to a recipe of this folder is an older name of it.
RECIPES = [path for path in FILES if path == path.resolve() or not path.resolve().is_relative_to(FOLDER)]
NAMES = [path.relative_to(FOLDER).as_posix() for path in RECIPES]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models and two videos with a few questions each."""
    from video_opd.world.make import make_world
    from video_opd.world.tiny import build_model, build_processor

    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("base", "teacher")):
        build_model("test", seed=seed).save_pretrained(folder / name)
        build_processor().save_pretrained(folder / name)
    make_world(folder, videos={"train": 1, "short": 1}, workers=1)
    return folder


def test_there_are_recipes():
    methods = get_args(MethodName)
    for size in ("tiny", "qwen3-vl-8b"):
        for method in methods:
            assert load_recipe(FOLDER / size / f"{method}.yaml").method == method
    for path in FILES:  # a recipe that is called by a method is of that method
        assert load_recipe(path).method == next((m for m in methods if path.stem.startswith(m)), "video-opd")
    for size in ("tiny", "qwen3-vl-8b"):
        load_recipe(FOLDER / size / "rounds.yaml").check_rounds()


def test_the_schema_that_editors_complete_recipes_by_is_current():
    assert (FOLDER / "schema.json").read_text() == schema(), "run make schema"
    properties = json.loads(schema())["$defs"]["OptimConfig"]["properties"]
    assert properties["lr"] == {
        "default": 1e-6,
        "description": "learning rate; sec. 4.1",
        "exclusiveMinimum": 0,
        "title": "Lr",
        "type": "number",
    }


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_it_names_the_schema(path: Path):
    first, _ = path.read_text().split("\n", 1)
    mark, _, name = first.partition("$schema=")
    assert mark == "# yaml-language-server: " and (path.parent / name).samefile(FOLDER / "schema.json")


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_it_reads_and_survives_yaml(path: Path):
    recipe = load_recipe(path)
    assert recipe_from_dict(yaml.safe_load(dump_recipe(recipe))) == recipe


# What a GPU that is sold with so many GB has for a program, GiB.
GPU_GIB = {80: 78, 141: 139}
COUNTS = {"one GPU": 1, "two machines of eight GPUs": 16, "eight GPUs": 8}


def machine_of(path: Path) -> tuple[int, int]:
    """(GPUs, GB of each) that a recipe's first comment names."""
    comment = path.read_text().partition("\nmodel")[0].replace("\n# ", " ")
    ((count, gigabytes),) = set(re.findall(rf"\b({'|'.join(COUNTS)}) of (\d+) GB", comment))
    return COUNTS[count], int(gigabytes)


OF_THE_PAPER = [path for path in RECIPES if path.parent.name not in ("tiny", "reproduce")]


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_it_fits_the_machine_that_it_names(path: Path):
    """By plan, which leaves a part of the card to the allocator, and with 5 GB to spare."""
    gpus, gigabytes = machine_of(path)
    recipe = load_recipe(path)
    if made := re.fullmatch(r"runs/qwen3-vl-(\d+)b-grpo/model", recipe.teacher.path):  # table 5
        recipe = recipe.changed(**{"teacher.path": f"Qwen/Qwen3-VL-{made[1]}B-Instruct"})
    card = GPU_GIB[gigabytes] * 2**30
    plan = make_plan(recipe, gpus, card)
    assert plan.fits and plan.memory.peak + 5 * 10**9 <= card


# A teacher in shards needs several processes; the steps are the same wherever it is held.
ONE_PROCESS = {"teacher.placement": "auto"}


def small(path: Path, world: Path, run: Path, **changes: object) -> Recipe:
    """Two steps of the recipe on the tiny world."""
    return load_recipe(path, small_words(world, run, **ONE_PROCESS, **changes))


def small_words(world: Path, run: Path, **changes: object) -> list[str]:
    """The words that make two steps on the tiny world of a recipe."""
    values = {
        "model.path": world / "base",
        "teacher.path": world / "teacher",
        "data.train": world / "train.jsonl",
        "data.video_root": "null",
        "evaluate.data": f"[{world / 'short.jsonl'}]",
        "evaluate.video_root": "null",
        "evaluate.max_new_tokens": 4,
        "video.max_video_tokens": 64,
        "sampling.max_new_tokens": 4,
        "optim.batch_size": 2,
        "optim.micro_batch_size": 1,
        "optim.max_steps": 2,
        "run.dir": run,
        **changes,
    }
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def find_torchao(recipe: Recipe, request: pytest.FixtureRequest) -> None:
    """Skips the test of a recipe with 8-bit weights or moments where torchao is not installed."""
    settings = (recipe.teacher.quantization, recipe.optim.moments, recipe.lora.base_quantization)
    if not {"int8", "float8"}.isdisjoint(settings) or recipe.model.weights == "bfloat16":
        request.getfixturevalue("torchao")


def structures() -> dict[str, Path]:
    """The recipes that take different steps once their paths and sizes are those of the tiny world."""
    found: dict[str, Path] = {}
    for path in RECIPES:
        found.setdefault(dump_recipe(small(path, Path("world"), Path("run"))), path)
    return {path.relative_to(FOLDER).as_posix(): path for path in found.values()}


STRUCTURES = structures()


@pytest.mark.parametrize("path", STRUCTURES.values(), ids=STRUCTURES)
def test_its_first_steps_run(path: Path, world: Path, tmp_path: Path, request: pytest.FixtureRequest):
    recipe = small(path, world, tmp_path / "run")
    find_torchao(recipe, request)
    result = train(recipe)
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2]
    rollouts = 2 * recipe.rollouts
    assert all(row["update/done"] == 1 and row["rollouts"] == rollouts for row in rows)
    assert result.model.joinpath("config.json").exists()
    record = json.loads((tmp_path / "run" / "eval" / "student-short.json").read_text())
    assert record["n"] > 0 and record["missing"] == 0 and record["best_constant"]["mIoU"] > 0


@pytest.mark.slow
def test_the_recipe_of_eight_gpus_runs_in_four_processes(world: Path, tmp_path: Path):
    """Two steps of two rows, so that two of the processes have none; one process has the same losses."""
    path = FOLDER / "qwen3-vl-8b" / "8x80gb.yaml"
    plain = {"model.dtype": "float32", "teacher.dtype": "float32", "optim.lr": 1e-3}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    words = small_words(world, tmp_path / "four", **plain)
    done = subprocess.run(
        [*launcher, "-m", "video_opd", "train", str(path), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "four" / "environment.json").read_text())["processes"] == 4
    train(small(path, world, tmp_path / "one", **plain))
    four, one = (
        [row for _, row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("four", "one")
    )
    assert [row["step"] for row in four] == [row["step"] for row in one] == [1, 2]
    for a, b in zip(four, one, strict=True):
        assert a["rollouts"] == b["rollouts"] == 2 and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["tiny/video-opd-lora.yaml", "qwen3-vl-8b/video-opd-lora.yaml"])
def test_adapters_continue_where_they_were_cut_off(
    name: str, world: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """After a step, and again when only the evaluation is left, where the model needs no adapters."""
    run = tmp_path / "run"
    recipe = small(FOLDER / name, world, run, **{"run.save_every": 1})
    find_torchao(recipe, request)
    train(recipe)
    kept = [run / "model" / "model.safetensors", run / "adapter" / "adapter_model.safetensors"]
    kept += [run / "eval" / "student-short.jsonl", run / "eval" / "student-short.json"]
    before = [path.read_bytes() for path in kept]
    shutil.rmtree(run / "checkpoints" / "step-2")
    for gone in (["model", "adapter", "eval"], ["eval"]):
        (run / "done.json").unlink()
        for folder in gone:
            shutil.rmtree(run / folder)
        train(recipe)
        assert [path.read_bytes() for path in kept] == before


def test_a_model_that_was_trained_in_full_is_evaluated_when_the_run_is_repeated(world: Path, tmp_path: Path):
    """The model is in run.save_dtype then, in which its weights could not be trained."""
    run = tmp_path / "run"
    recipe = small(FOLDER / "qwen3-vl-8b" / "sft.yaml", world, run)
    assert recipe.run.save_dtype == "bfloat16" and recipe.model.weights == "float32"
    train(recipe)
    figures = (run / "eval" / "student-short.json").read_bytes()
    (run / "done.json").unlink()
    shutil.rmtree(run / "eval")
    train(recipe)
    assert (run / "eval" / "student-short.json").read_bytes() == figures


def test_an_evaluation_that_could_not_be_made_is_refused_at_once(world: Path, tmp_path: Path):
    words = [f"--model.path={world / 'base'}", f"--teacher.path={world / 'teacher'}"]
    words += [f"--data.train={world / 'train.jsonl'}", f"--run.dir={tmp_path / 'run'}"]
    for files, expected in (
        (str(tmp_path / "nowhere.jsonl"), r"nowhere\.jsonl"),
        (f"[{world / 'short.jsonl'}, other/short.jsonl]", "two files of one name"),
    ):
        with pytest.raises(UserError, match=expected):
            train(load_recipe(RECIPES[0], [*words, f"--evaluate.data={files}"]))
    assert not (tmp_path / "run" / "model").exists()
