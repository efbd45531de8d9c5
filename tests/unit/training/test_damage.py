"""Damage to a run folder: every file, cut off, zeroed, changed by one bit, replaced by something else, gone.

A run that is repeated ends with the weights of an undisturbed run, or it is refused in one line. It never
continues in silence to other weights, and never ends in a traceback.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_runs import adamw, good_checkpoints, net, resume_from
from training_cases import Build, make_recipe, rows_of, weights_of

from video_opd.errors import UserError
from video_opd.files import UNFINISHED
from video_opd.training import loop
from video_opd.training.checkpoint import STATE, find_checkpoints, intact_checkpoints, save_checkpoint
from video_opd.training.digests import read_list, write_list
from video_opd.training.loop import train
from video_opd.training.run_folder import RunFolder
from video_opd.training.sharding import load_optimizer_state

ADAPTED: dict[str, Any] = {"parts": ["language"], "rank": 2}
OTHER = {".json": b"[]", ".jsonl": b'"text"\n', ".yaml": b"- 1\n", ".pt": b"\x80\x04N."}


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    return bytes(len(content))


def one_bit(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def null(content: bytes, rng: random.Random) -> bytes:
    return b"null"


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": cut, "zeroed": zeroed, "one bit": one_bit, "null": null,
}  # fmt: skip


def damage(file: Path, kind: str, rng: random.Random) -> None:
    if kind == "gone":
        file.unlink()
    elif kind == "other type":
        file.write_bytes(OTHER.get(file.suffix, b"[1]"))
    else:
        file.write_bytes(DAMAGES[kind](file.read_bytes(), rng))


KINDS = (*DAMAGES, "other type", "gone")


def settings(path: Path, adapted: bool, **sections: Any) -> Any:
    if adapted:
        sections["lora"] = ADAPTED
    return make_recipe(path, optim={"epochs": 2}, **sections)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "adapters"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool]:
    """Four steps with checkpoints after the second and the fourth."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(path, request.param), Build())
    return path, request.param


@pytest.fixture
def cut_off(undisturbed: tuple[Path, bool], tmp_path: Path) -> tuple[Path, bool]:
    """The same before its model was written."""
    path = tmp_path / "run"
    shutil.copytree(undisturbed[0], path)
    (path / "done.json").unlink()
    shutil.rmtree(path / "model")
    shutil.rmtree(path / "adapter", ignore_errors=True)
    return path, undisturbed[1]


def same_weights(a: Path, b: Path) -> bool:
    mine, theirs = weights_of(a), weights_of(b)
    return all(torch.equal(mine[key], theirs[key]) for key in mine | theirs)


def ends(path: Path, adapted: bool, undisturbed: Path) -> str:
    """How the repeated run ends: "same" or the refusal."""
    try:
        train(settings(path, adapted), Build())
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    assert same_weights(path, undisturbed)
    assert [row["step"] for row in rows_of(path / "metrics.jsonl")] == [1, 2, 3, 4]
    return "same"


# ------------------------------------------------------------------------------------------ the checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    cut_off: tuple[Path, bool], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weights are loaded here: that the right checkpoint is chosen is what counts."""
    root, rng = cut_off[0] / "checkpoints", random.Random(kind)
    files = [file for file in (root / "step-4").rglob("*") if file.is_file()]
    assert len(files) >= 4
    for file in files:
        before = file.read_bytes()
        damage(file, kind, rng)
        capsys.readouterr()
        assert [found.step for found in intact_checkpoints(root)] == [2], file
        told = capsys.readouterr().err
        assert "step-4 is damaged and left out: " in told and file.name in told
        file.write_bytes(before)
    assert [found.step for found in intact_checkpoints(root)] == [4, 2]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "training.pt"])
def test_a_run_goes_on_from_the_checkpoint_before(
    undisturbed: tuple[Path, bool], cut_off: tuple[Path, bool], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, adapted = cut_off
    (file,) = (path / "checkpoints" / "step-4").rglob(
        f"adapter_{name}" if adapted and "model" in name else name
    )
    damage(file, "one bit", random.Random(1))
    assert ends(path, adapted, undisturbed[0]) == "same"
    told = " ".join(capsys.readouterr().err.split())
    assert "step-4 is damaged" in told and "continuing after step 2" in told


def test_a_run_without_an_intact_checkpoint_says_so_and_begins_anew(
    undisturbed: tuple[Path, bool], cut_off: tuple[Path, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    path, adapted = cut_off
    for step in (2, 4):
        damage(path / "checkpoints" / f"step-{step}" / "training.pt", "zeroed", random.Random(0))
    assert ends(path, adapted, undisturbed[0]) == "same"
    assert "the run begins anew" in " ".join(capsys.readouterr().err.split())


def test_a_file_or_folder_that_was_added_is_damage(cut_off: tuple[Path, bool]) -> None:
    root = cut_off[0] / "checkpoints"
    (root / "step-4" / "model").mkdir(exist_ok=True)
    (root / "step-4" / "model" / "pytorch_model.bin").write_bytes(b"x")
    (root / "step-2" / "adapter").mkdir(exist_ok=True)  # empty: it changes nothing
    (intact,) = intact_checkpoints(root)
    assert intact.step == 2 and any((intact.weights).iterdir())


def test_folders_of_other_names_are_no_checkpoints(cut_off: tuple[Path, bool]) -> None:
    root = cut_off[0] / "checkpoints"
    for name in ("step-", "step-x", "step-04", "step-9", "step--1", "step-1e3", f"{UNFINISHED}step-8"):
        shutil.copytree(root / "step-4", root / name)
    (root / "step-7").write_text("a file")
    assert [found.step for found in find_checkpoints(root)] == [4, 2]
    assert [found.step for found in intact_checkpoints(root)] == [4, 2]


def test_retention_does_not_count_damaged_checkpoints_of_later_steps(tmp_path: Path) -> None:
    from model_cases import model, processor

    recipe = make_recipe(tmp_path, run={"dir": str(tmp_path), "keep_checkpoints": 1})
    for step in (6, 4):
        save_checkpoint(
            tmp_path, step, model=model(), processor=processor(), training={"x": step}, recipe=recipe
        )
    assert [found.step for found in find_checkpoints(tmp_path)] == [6, 4]


# --------------------------------------------------------------------------- which recipe a folder belongs to


@pytest.mark.parametrize("gone", [["metrics.jsonl"], ["recipe.yaml"], ["metrics.jsonl", "recipe.yaml"]])
def test_checkpoints_of_another_recipe_are_refused(cut_off: tuple[Path, bool], gone: list[str]) -> None:
    path, adapted = cut_off
    for name in gone:
        (path / name).unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"optim\.lr = 0\.001, now it is 0\.5"):
        train(settings(path, adapted).changed(**{"optim.lr": 0.5}), Build())
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_lost_recipe_is_written_again_from_the_checkpoints(
    undisturbed: tuple[Path, bool], cut_off: tuple[Path, bool]
) -> None:
    path, adapted = cut_off
    (path / "recipe.yaml").unlink()
    assert ends(path, adapted, undisturbed[0]) == "same"
    assert (path / "recipe.yaml").exists()


def test_a_run_whose_recipe_nobody_states_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"a run whose recipe\.yaml is gone"):
        RunFolder(tmp_path).claim(make_recipe(tmp_path))


@pytest.mark.parametrize("place", ["metrics.jsonl", "recipe.yaml", "eval/x", "checkpoints/x", "round-1/x"])
def test_a_pipe_in_a_run_folder_is_refused_before_it_is_waited_for(tmp_path: Path, place: str) -> None:
    pipe = tmp_path / place
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    folder = RunFolder(tmp_path)
    for claim in (folder.claim, folder.claim_for_rounds):
        with pytest.raises(UserError, match=f"{pipe.name}: not a plain file; remove it"):
            claim(make_recipe(tmp_path))


def test_rounds_that_moved_with_their_folder_go_on(tmp_path: Path) -> None:
    def recipe(place: Path) -> Any:
        own = place / "round-2"
        return make_recipe(
            own, model={"path": str(place / "round-1" / "model")}, data={"train": str(own / "selected.jsonl")}
        )

    folder = RunFolder(tmp_path / "b" / "round-2")
    folder.claim(recipe(tmp_path / "a"))
    folder.metrics.write_text('{"step": 1}\n')
    folder.claim(recipe(tmp_path / "b"))
    with pytest.raises(UserError, match=r"data\.train"):
        folder.claim(recipe(tmp_path / "b").changed(**{"data.train": str(tmp_path / "b" / "other.jsonl")}))


# ------------------------------------------------------------------------------------ metrics and the others


@pytest.mark.parametrize("kind", ["no last row", "half a last row", "no rows", "gone"])
def test_lost_rows_of_metrics_are_made_again_or_named(
    undisturbed: tuple[Path, bool], cut_off: tuple[Path, bool], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, adapted = cut_off
    metrics = path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    if kind == "gone":
        metrics.unlink()
    else:
        kept = {"no last row": lines[:3], "half a last row": [*lines[:3], lines[3][:100]], "no rows": []}[
            kind
        ]
        metrics.write_bytes(b"".join(kept))
    train(settings(path, adapted), Build())
    assert same_weights(path, undisturbed[0])
    steps = [row["step"] for row in rows_of(metrics)] if metrics.exists() else []
    told = " ".join(capsys.readouterr().err.split())
    assert "metrics.jsonl: rows up to step 4 were changed or lost" in told
    if "last" in kind:
        assert steps == [1, 2, 3, 4] and "the steps after 2 are made again" in told
    else:
        assert steps == [] and "the rows that are lost stay lost" in told


def changed_at(step: int, rows: list[bytes]) -> bytes:
    """The row of a step is another, of the same length, and still JSON."""
    number = next(i for i, row in enumerate(rows) if json.loads(row)["step"] == step)
    other = rows[number].replace(b"1", b"2").replace(b"0.", b"1.")
    assert other != rows[number]
    return b"".join([*rows[:number], other, *rows[number + 1 :]])


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_rows_are_as_they_were_at_the_checkpoint_that_is_continued(
    cut_off: tuple[Path, bool], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows after it are cut, whatever they hold; a change before it takes the checkpoint before."""
    folder = RunFolder(cut_off[0])
    file, whole = folder.path / name, (folder.path / name).read_bytes()
    rows = whole.splitlines(keepends=True)
    until_2 = b"".join(row for row in rows if json.loads(row)["step"] <= 2)
    cases: dict[str, tuple[bytes, int, bytes]] = {
        "rows of later steps": (whole + rows[-1].replace(b'"step": 4', b'"step": 5'), 4, whole),
        "a later row that is no JSON": (whole + b"nonsense\n{half", 4, whole),
        "a lost last row": (b"".join(rows[:-1]), 2, until_2),
        "half a last row": (whole[:-9], 2, until_2),
        "a changed last row": (changed_at(4, rows), 2, until_2),
        "a last row of zeros": (whole[:-40] + bytes(40), 2, until_2),
        "a changed first row": (changed_at(1, rows), 4, changed_at(1, rows)),
        "a row twice": (rows[0] + whole, 4, rows[0] + whole),
    }
    others = {path: path.read_bytes() for path in folder.rows}
    for case, (content, step, kept) in cases.items():
        for path, before in others.items():
            path.write_bytes(before)
        file.write_bytes(content)
        capsys.readouterr()
        found = loop._checkpoint_to_continue(folder)
        assert found is not None and found.step == step, case
        folder.rewind(found.step, found.rows)
        assert file.read_bytes() == kept, case
        told = " ".join(capsys.readouterr().err.split())
        assert (f"{name}: rows up to step 4 were changed or lost" in told) == ("later" not in case), case
        assert ("those that were changed stay as they are" in told) == ("first" in case or "twice" in case)
    file.write_bytes(b"nonsense\n" + whole)
    found = loop._checkpoint_to_continue(folder)
    with pytest.raises(UserError, match=rf"{name}:1: not JSON"):
        folder.rewind(found.step, found.rows)  # type: ignore[union-attr]


def test_checkpoints_of_earlier_versions_have_no_seals(cut_off: tuple[Path, bool]) -> None:
    folder = RunFolder(cut_off[0])
    for step in (2, 4):
        state = folder.checkpoints / f"step-{step}"
        facts = read_list(state, STATE)
        assert set(facts.pop("rows")) == {"metrics.jsonl", "rollouts.jsonl"}
        write_list(state, STATE, {key: facts[key] for key in ("step", "recipe")})
    rows = folder.metrics.read_bytes().splitlines(keepends=True)
    for kept, step in ((4, 4), (3, 2), (2, 2), (0, 4)):
        folder.metrics.write_bytes(b"".join(rows[:kept]))
        found = loop._checkpoint_to_continue(folder)
        assert found is not None and found.step == step and not found.rows
        folder.rewind(found.step, found.rows)
        assert len(rows_of(folder.metrics)) == min(kept, step)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "recipe.yaml", "environment.json"])
def test_a_damaged_file_of_a_run_is_refused_or_changes_nothing(
    undisturbed: tuple[Path, bool], cut_off: tuple[Path, bool], name: str, kind: str
) -> None:
    path, adapted = cut_off
    damage(path / name, kind, random.Random(name))
    try:
        train(settings(path, adapted), Build())
    except UserError as error:
        assert name in str(error) or "optim" in str(error) or "now it is" in str(error)
    else:
        assert same_weights(path, undisturbed[0])


def model_files(path: Path) -> Iterator[Path]:
    for folder in ("model", "adapter"):
        for file in sorted((path / folder).rglob("*")):
            if file.is_file() and file.name != "README.md":
                yield file


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_model_is_put_aside_and_made_again(
    undisturbed: tuple[Path, bool], tmp_path: Path, kind: str, evaluated: bool
) -> None:
    path, adapted = tmp_path / "run", undisturbed[1]
    shutil.copytree(undisturbed[0], path)
    if not evaluated:
        (path / "done.json").unlink()
    rng = random.Random(kind)
    file = rng.choice(list(model_files(path)))
    damage(file, kind, rng)
    assert ends(path, adapted, undisturbed[0]) == "same"
    assert (path / f"damaged-{file.parent.name}").is_dir()
    assert ends(path, adapted, undisturbed[0]) == "same"  # and the next start finds it finished


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("VIDEO_OPD_DAMAGES", "100"))))
def test_damage_at_random_never_continues_to_other_weights(
    undisturbed: tuple[Path, bool], tmp_path: Path, seed: int
) -> None:
    rng, path, adapted = random.Random(seed), tmp_path / "run", undisturbed[1]
    shutil.copytree(undisturbed[0], path)
    if rng.random() < 0.7:
        shutil.rmtree(path / "model")
        (path / "done.json").unlink()
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and "tensorboard" not in file.parts]
    for file in rng.sample(files, rng.choice((1, 1, 2, 3))):
        damage(file, rng.choice(KINDS), rng)
    try:
        train(settings(path, adapted), Build())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert same_weights(path, undisturbed[0])


def test_the_list_of_a_folder_names_what_sha256sum_prints(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / ".hidden").write_text("x")
    write_list(tmp_path, "list.json", {"step": 3})
    read = read_list(tmp_path, "list.json")
    expected = hashlib.sha256(bytes(range(256)) * 10_000).hexdigest()
    assert read == {"step": 3, "files": {"a/b.bin": [2_560_000, expected]}}
    text = json.loads((tmp_path / "list.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps({**text, "step": 4}))
    with pytest.raises(UserError, match="does not match its own digest"):
        read_list(tmp_path, "list.json")


class Trap:
    """An object that leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("place", ["alone", "optimizer", "random", "bare pickle", "no state", "wrong shapes"])
def test_a_training_state_of_somebody_else_runs_nothing(cut_off: tuple[Path, bool], place: str) -> None:
    """Its list of digests is right: whoever writes a checkpoint can write that, too."""
    path, adapted = cut_off
    saved = path / "checkpoints" / "step-4"
    state: Any = torch.load(saved / "training.pt", weights_only=True)
    trap = Trap(path / "ran")
    if place == "bare pickle":
        (saved / "training.pt").write_bytes(pickle.dumps(trap))
    else:
        if place == "wrong shapes":
            state["random"] = [{"python": (3, (), None), "numpy": 5, "torch": torch.zeros(3)}]
        given = {"alone": trap, "no state": {}, "wrong shapes": state}
        torch.save(given.get(place, {**state, place: trap}), saved / "training.pt")
    facts = read_list(saved, STATE)
    write_list(saved, STATE, {"step": 4, "recipe": facts["recipe"]})
    with pytest.raises(UserError, match=r"step-4.* delete .*step-4|step-4.*delete the folder"):
        train(settings(path, adapted), Build())
    assert not (path / "ran").exists()


OTHER_MOMENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda moments: moments.update(exp_avg=torch.zeros(4, 4)),
    "type": lambda moments: moments.update(exp_avg=torch.zeros(4, 3, dtype=torch.bool)),
    "number": lambda moments: moments.update(exp_avg_sq=3.0),
    "several steps": lambda moments: moments.update(step=torch.ones(3)),
    "lost": lambda moments: moments.pop("exp_avg"),
}


@pytest.mark.parametrize("change", OTHER_MOMENTS)
def test_a_training_state_of_other_weights_is_refused(tmp_path: Path, change: str) -> None:
    path = good_checkpoints(tmp_path)
    saved = path / "checkpoints" / "step-4"
    state = torch.load(saved / "training.pt", weights_only=True)
    OTHER_MOMENTS[change](state["optimizer"]["state"]["0.weight"])
    facts = read_list(saved, STATE)
    torch.save(state, saved / "training.pt")
    write_list(saved, STATE, {key: facts[key] for key in ("step", "recipe", "rows")})
    with pytest.raises(UserError, match=r"step-4: its training state does not fit the model"):
        resume_from(path)


def test_the_settings_of_an_optimiser_are_those_of_the_recipe(tmp_path: Path) -> None:
    """Whatever a training state says."""
    path = good_checkpoints(tmp_path)
    state = torch.load(path / "checkpoints" / "step-4" / "training.pt", weights_only=True)["optimizer"]
    trained = net()
    optimizer = adamw(trained)

    def settings() -> list[dict[str, Any]]:
        return [
            {key: list(value) if key == "betas" else value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    own = settings()
    for group in state["param_groups"]:
        group |= {"betas": (0.1, 0.1), "weight_decay": 7.0, "lr": "x"}
    load_optimizer_state(trained, optimizer, state)
    assert settings() == own
    moments = optimizer.state[trained[0].weight]
    assert torch.equal(moments["exp_avg"], state["state"]["0.weight"]["exp_avg"]) and moments["step"] == 4


@pytest.mark.parametrize("recipe", ["text", [1], 3])
def test_a_state_whose_recipe_is_none_is_damage(tmp_path: Path, recipe: Any) -> None:
    root = good_checkpoints(tmp_path) / "checkpoints"
    write_list(root / "step-4", STATE, {"step": 4, "recipe": recipe, "rows": {}})
    assert [found.step for found in intact_checkpoints(root)] == [2]
