"""Checkpoints are complete or not there, also on a full disk; model folders stand alone."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from model_cases import model, processor
from safetensors.torch import load_file
from training_cases import make_recipe

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.files import discard_unfinished
from video_opd.models.inference import read_saved_settings
from video_opd.models.loading import load_model
from video_opd.training.checkpoint import (
    Checkpoint,
    _replacing,
    _save_state,
    find_checkpoints,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
    save_model_folder,
)
from video_opd.training.run_folder import FolderInUse, RunFolder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path / "run", run={"dir": str(tmp_path / "run"), "keep_checkpoints": 2})


def save(root: Path, step: int, recipe: Recipe, training: dict[str, Any] | None = None) -> Checkpoint:
    return save_checkpoint(
        root, step, model=model(step), processor=processor(), training=training or {"x": step}, recipe=recipe
    )


def test_the_newest_are_kept_and_found_newest_first(tmp_path: Path, recipe: Recipe):
    for step in (2, 4, 10):
        save(tmp_path, step, recipe)
    assert [found.step for found in find_checkpoints(tmp_path)] == [10, 4]
    newest = find_checkpoints(tmp_path)[0]
    assert load_training_state(newest) == {"x": 10}
    loaded, _ = load_model(newest.model, dtype="float32")
    mine = model(10).state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in loaded.state_dict().items())
    assert find_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("damage", ["no state", "half a state", "shorter weights", "no optimiser"])
def test_a_half_written_checkpoint_is_not_one(tmp_path: Path, recipe: Recipe, damage: str):
    save(tmp_path, 2, recipe)
    newest = save(tmp_path, 4, recipe).path
    if damage == "no state":
        (newest / "state.json").unlink()
    elif damage == "half a state":
        (newest / "state.json").write_text((newest / "state.json").read_text()[:20])
    elif damage == "shorter weights":
        weights = newest / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (newest / "training.pt").unlink()
    assert [found.step for found in find_checkpoints(tmp_path)] == [2]
    assert save(tmp_path, 4, recipe).step == 4  # and it can be written anew in its place
    assert [found.step for found in find_checkpoints(tmp_path)] == [4, 2]


def test_remains_are_removed(tmp_path: Path, recipe: Recipe):
    save(tmp_path, 2, recipe)
    shutil.copytree(tmp_path / "step-2", tmp_path / ".part-step-4")
    discard_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def save_with_little_room(root: Path, recipe: Recipe, limit: int, answer: Any) -> None:
    """No file may grow past ``limit`` bytes: the kernel itself refuses, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(root, 4, recipe, {"optimizer": torch.zeros(100_000)})
    except UserError as error:
        answer.send(str(error))
    except BaseException as error:
        answer.send(repr(error))
    else:
        answer.send("saved")


def test_torch_save_on_a_full_disk_is_told_so_wherever_it_stops(tmp_path: Path) -> None:
    """The kernel refuses at the head of the file, in each tensor, in the directory and in its last bytes."""
    tensors = {"a": torch.zeros(5000), "b": [torch.ones(100) for _ in range(20)]}
    torch.save(tensors, tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 63, 100, 1000, size // 2, *range(size - 6000, size, 500), size - 22, size - 1):
        with (
            pytest.raises(UserError, match="model: cannot be written"),
            _replacing(tmp_path / "model") as folder,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most[1]))
            try:
                _save_state(tensors, folder / "training.pt")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, most)


@pytest.mark.parametrize("limit", [1_000, 20_000, 300_000])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, recipe: Recipe, limit: int):
    """The limits stop a small JSON file, the weights, and the optimiser's state."""
    save(tmp_path, 2, recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "step-2").rglob("*") if path.is_file()}
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=save_with_little_room, args=(tmp_path, recipe, limit, theirs)
    )
    process.start()
    assert ours.poll(60)
    message = ours.recv()
    process.join()
    assert "step-4: cannot be written" in message and "free some space" in message and "\n" not in message
    assert [found.step for found in find_checkpoints(tmp_path)] == [2]
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_model_folder_says_how_it_was_shown_its_videos(tmp_path: Path):
    recipe = make_recipe(tmp_path, video={"max_video_tokens": 512}, prompt={"thinking": True})
    save_model_folder(model(3), processor(), tmp_path / "model", recipe)
    facts = read_saved_settings(tmp_path / "model")
    assert facts is not None and facts["video"]["max_video_tokens"] == 512
    assert "backend" not in facts["video"]  # how to decode is this machine's matter
    assert facts["prompt"] == {"style": "paper", "thinking": True, "video_form": "release"}
    assert facts["method"] == "video-opd"
    assert read_saved_settings(tmp_path) is None
    (tmp_path / "model" / "video_opd.json").write_text("{")
    with pytest.raises(UserError, match=r"video_opd\.json"):
        read_saved_settings(tmp_path / "model")


def test_a_model_folder_is_replaced_whole(tmp_path: Path):
    recipe = make_recipe(tmp_path)
    save_model_folder(model(1), processor(), tmp_path / "model", recipe)
    (tmp_path / "model" / "stale.txt").write_text("old")
    save_model_folder(model(2).bfloat16(), processor(), tmp_path / "model", recipe)
    assert not (tmp_path / "model" / "stale.txt").exists()
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    loaded, _ = load_model(tmp_path / "model", dtype="float32")
    assert torch.equal(loaded.lm_head.weight, model(2).lm_head.weight.bfloat16().float())


def test_random_states_come_back():
    state = random_state()
    first = (random.random(), np.random.random(), torch.rand(1).item())
    restore_random_state(state)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == first


def test_a_run_folder_belongs_to_one_recipe(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(make_recipe(tmp_path / "run", run={"dir": "x", "seed": 9}))  # which failed before a step
    folder.claim(make_recipe(tmp_path / "run"))
    folder.metrics.write_text('{"step": 1}\n')
    folder.claim(make_recipe(tmp_path / "elsewhere"))  # the folder was moved: run.dir may differ
    with pytest.raises(FolderInUse, match=r"run\.seed = 0, now it is 5") as caught:
        folder.claim(make_recipe(tmp_path / "run", run={"dir": str(tmp_path), "seed": 5}))
    assert (caught.value.key, caught.value.stored, caught.value.given) == ("run.seed", 0, 5)
    with pytest.raises(UserError, match="cannot be written"):
        (tmp_path / "file").write_text("")
        RunFolder(tmp_path / "file" / "run").claim(make_recipe(tmp_path))


@pytest.mark.parametrize("method", ["video-opd", "sft"])
def test_a_run_that_an_earlier_version_began_continues(tmp_path: Path, method: str):
    """Its recipe.yaml has the keys of every method, each with the value that changes nothing."""
    folder, recipe = RunFolder(tmp_path / "run"), make_recipe(tmp_path / "run", method)
    folder.claim(recipe)
    folder.metrics.write_text('{"step": 1}\n')
    tree = yaml.safe_load(folder.recipe.read_text())
    tree["loss"] |= {"kl_beta": 0.0, "estimator": "sampled", "clip_low": None}
    tree["sampling"] |= {"temperature": 1.0, "rollouts": 1}
    tree["reward"] = {"iou": "timestamp_aware", "function": None}
    folder.recipe.write_text(yaml.safe_dump(tree))
    folder.claim(recipe)
    with pytest.raises(UserError, match=r"optim\.lr = 0.001, now it is 0.5"):
        folder.claim(recipe.changed(**{"optim.lr": 0.5}))
    tree["loss"]["kl_beta"] = 0.1  # which the method never read
    folder.recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        UserError, match=r"recipe cannot be read: choose another run\.dir .*recipe\.yaml: loss\.kl"
    ):
        folder.claim(recipe)


def test_a_rewound_folder_ends_at_the_checkpoint(tmp_path: Path):
    folder = RunFolder(tmp_path)
    text = "".join(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in range(1, 6))
    folder.metrics.write_text(text[:-5])  # the last row was cut short
    folder.rollouts.write_text('{"step": 2}\n{"step": 3}\n{"step": 3}\n')
    folder.rewind(2, {})
    assert folder.metrics.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n'
    assert folder.rollouts.read_text() == '{"step": 2}\n'
    assert folder.last_metrics() == {"step": 2, "loss": 1.0}
    folder.rewind(0, {})
    assert folder.metrics.read_text() == "" and folder.last_metrics() == {}
