"""The folder of a run: its files, the recipe that it belongs to, and its return to a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import video_opd
from video_opd.config import Recipe, dump_recipe, load_recipe, recipe_from_dict
from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.files import discard_unfinished, disk_errors, read_text, write_text
from video_opd.jsonl import read_jsonl, repair_jsonl, write_jsonl
from video_opd.progress import log
from video_opd.seals import Seal
from video_opd.training.checkpoint import check_model_folder, stated_recipes
from video_opd.training.digests import Damage, is_intact

ROUNDS_ONLY = ("tvdf.", "rounds.")  # sections of a recipe that train ignores
# Keys that say where weights are held and when they are exchanged. That changes no result, but for rounding
# where another engine answers in the teacher's place.
HOLDING = (
    *("model.sharding", "model.reduce", "model.gather", "optim.offload", "teacher.placement"),
    *("teacher.urls", "teacher.send", "teacher.wait_s", "teacher.receive", "teacher.overlap"),
)
PATIENCE = "data.max_failed_share"  # when a run stops: the message of one that has stopped says to raise it
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "torchvision", "av", "numpy")


class FolderInUse(UserError):
    """A run folder holds something that another recipe or another command made.

    ``holds`` says what it is. If the recipes differ, ``key`` is the first key that does, ``stored`` its value
    in the folder's recipe and ``given`` its value in the new one.
    """

    def __init__(
        self,
        path: Path,
        holds: str,
        remedy: str = "choose another run.dir",
        *,
        key: str | None = None,
        stored: Any = None,
        given: Any = None,
    ) -> None:
        super().__init__(f"{path} holds {holds}: {remedy}")
        self.holds, self.key, self.stored, self.given = holds, key, stored, given


class RunFolder:
    """The paths of a run. One folder belongs to one recipe."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"  # only a LoRA run writes it; model/ has it merged
        self.evaluations = self.path / "eval"
        self.done = self.path / "done.json"  # written last of all

    def predictions(self, data: str | Path) -> Path:
        """The trained student's predictions for a data file."""
        return self.evaluations / f"student-{Path(data).stem}.jsonl"

    def claim(self, recipe: Recipe) -> None:
        """Writes the recipe into the folder, unless a run of this recipe is already there.

        Raises :class:`FolderInUse` if the folder holds several rounds or a run of another recipe (the message
        names the first key that differs), and :class:`UserError` if it cannot be written. A start that failed
        before its first step leaves the folder free.
        """
        self._refuse_pipes()
        if self.round(1).exists():
            raise FolderInUse(self.path, "the rounds of video-opd rounds")
        # Checkpoints state their recipe: recipe.yaml and the metrics may have been lost.
        saved = stated_recipes(self.checkpoints)
        for tree in saved:
            self._check_same(recipe, self._parsed(partial(recipe_from_dict, tree)), ROUNDS_ONLY)
        if self.metrics.exists() or self.model.exists() or self._has_checkpoints():
            if self.recipe.exists():
                self._check_same(recipe, self._parsed(partial(load_recipe, self.recipe)), ROUNDS_ONLY)
                return
            if not saved:
                raise FolderInUse(self.path, f"a run whose {self.recipe.name} is gone")
        write_text(self.recipe, dump_recipe(recipe))

    def claim_for_rounds(self, recipe: Recipe) -> None:
        """The same for several rounds; a start that failed before its first answer leaves the folder free."""
        self._refuse_pipes()
        if self.metrics.exists() or self.model.exists():
            raise FolderInUse(self.path, "a run of video-opd train")
        if self.round(1).exists() or self._has_answers():  # base and teacher answer before there is a round
            if not self.recipe.exists():
                raise FolderInUse(self.path, f"rounds whose {self.recipe.name} is gone")
            self._check_same(recipe, self._parsed(partial(load_recipe, self.recipe)))
            return
        write_text(self.recipe, dump_recipe(recipe))

    def _refuse_pipes(self) -> None:
        """Raises :class:`UserError` for a pipe or a device: who reads it would wait, or never end."""
        for place in (self.path, self.checkpoints, self.evaluations, *self.path.glob("round-*")):
            for file in place.iterdir() if place.is_dir() else ():
                if file.exists() and not (file.is_file() or file.is_dir()):
                    raise UserError(f"{file}: not a plain file; remove it")

    def round(self, number: int) -> Path:
        """The folder of round ``number`` (from 1), which is a run folder itself."""
        return self.path / f"round-{number}"

    def _has_answers(self) -> bool:
        return self.evaluations.is_dir() and any(self.evaluations.glob("*.jsonl"))

    def _has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    def _parsed(self, read: Callable[[], Recipe]) -> Recipe:
        try:  # through the reader: an earlier version wrote the keys of other methods, too
            return read()
        except UserError as error:
            remedy = f"choose another run.dir ({error})"
            raise FolderInUse(self.path, "a run whose recipe cannot be read", remedy) from error

    def _check_same(self, recipe: Recipe, stored: Recipe, ignored: tuple[str, ...] = ()) -> None:
        before, now = dict(flatten(stored.to_dict())), dict(flatten(recipe.to_dict()))
        if "prompt.video_form" in now:  # before it was written, there was one form
            before.setdefault("prompt.video_form", "nested")
        for key in dict.fromkeys((*now, *before)):
            # The folder may have been moved, or be named from elsewhere.
            if key in ("run.dir", PATIENCE, *HOLDING) or key.startswith(ignored):
                continue
            old, new = before.get(key, "not set"), now.get(key, "not set")
            if old != new and not _moved_along(old, stored, new, recipe):
                raise FolderInUse(
                    self.path,
                    f"a run with {key} = {old}, now it is {new}",
                    "choose another run.dir, or repeat the first command to continue that run",
                    key=key,
                    stored=old,
                    given=new,
                )

    @property
    def finished(self) -> bool:
        return self.done.exists() and self.model.is_dir()

    def discard_unfinished(self) -> None:
        """Removes the unfinished files and folders that a kill left. Nothing may be writing in the folder."""
        for place in (self.path, self.checkpoints, self.model, self.evaluations):
            discard_unfinished(place)

    def damaged_folders(self) -> dict[Path, str]:
        """What is wrong with ``model/`` and ``adapter/`` if they are not as they were written. All their
        files are read."""
        listed = bool(stated_recipes(self.checkpoints))  # earlier versions stated none
        found = {}
        for path in (self.model, self.adapter):
            if path.is_dir():
                try:
                    check_model_folder(path, listed=listed)
                except Damage as damage:
                    found[path] = str(damage)
        return found

    def put_damage_aside(self) -> None:
        """Renames ``model/`` and ``adapter/`` if they are damaged, so that the run writes them again."""
        for path, reason in self.damaged_folders().items():
            aside = path.with_name(f"damaged-{path.name}")
            log(f"{path} is damaged, kept as {aside.name} and made again: {reason}")
            with disk_errors(path):
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                if self.model.is_dir():  # both come from the last step, which is made again
                    shutil.rmtree(self.model)

    def reported_steps(self) -> int:
        """How many steps have their row of metrics, counted from the first without a gap."""
        if not self.metrics.exists():
            return 0
        repair_jsonl(self.metrics)
        steps = {row["step"] for _, row in read_jsonl(self.metrics) if _is_step(row)}
        return next(step for step in itertools.count() if step + 1 not in steps)

    @property
    def rows(self) -> tuple[Path, Path]:
        """The files to which each step appends its rows."""
        return self.metrics, self.rollouts

    def changed_rows(self, seals: Mapping[str, Seal]) -> list[Path]:
        """The files of rows that do not begin with what was sealed, or are missing."""
        return [path for path in self.rows if path.name in seals and not seals[path.name].holds(path)]

    def rewind(self, step: int, seals: Mapping[str, Seal]) -> None:
        """Removes the rows of all steps after ``step``; the run makes these steps again.

        ``seals`` are those of that step. Without the seal of a file, or if its rows are not as they were
        sealed, its rows that can be read and are not later are kept.
        """
        for path in self.rows:
            seal = seals.get(path.name)
            if seal is not None and seal.holds(path):
                if path.exists():
                    with disk_errors(path):
                        os.truncate(path, seal.size)
            elif path.exists():
                repair_jsonl(path)
                rows = [row for _, row in read_jsonl(path)]
                kept = [row for row in rows if _is_step(row) and row["step"] <= step]
                if len(kept) < len(rows):
                    write_jsonl(path, kept)

    def last_metrics(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if self.metrics.exists():
            for _, row in read_jsonl(self.metrics):  # noqa: B007 (the last one is wanted)
                pass
        return row

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        """Writes versions, commit, machine and command of this start. A resume replaces them."""
        environment = {
            "video_opd": video_opd.__version__,
            "commit": git_commit(),
            "python": platform.python_version(),
            "packages": _versions(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "command": sys.argv,
            **facts,
        }
        write_text(self.environment, json.dumps(environment, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file that this program can write again; None if it is missing or damaged.

    A record with its own digest (:func:`~video_opd.training.digests.with_own_digest`) is read only if it is
    as it was written.
    """
    try:
        record = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and is_intact(record):
        return record
    if path.exists():
        log(f"{path} is damaged: it is made again")
    return None


def _moved_along(old: Any, stored: Recipe, new: Any, recipe: Recipe) -> bool:
    """Whether two values are one path inside the rounds' folder, which was moved with all its rounds."""
    places = Path(stored.run.dir), Path(recipe.run.dir)
    if not all(place.name.startswith("round-") for place in places):
        return False
    try:
        before, now = (Path(v).relative_to(p.parent) for v, p in zip((old, new), places, strict=True))
    except (TypeError, ValueError):
        return False
    return before == now


def _is_step(row: Mapping[str, Any]) -> bool:
    return type(row.get("step")) is int


@functools.cache
def _versions() -> Mapping[str, str]:
    """The versions of what is installed. A process has imported these, whatever is installed later."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the code that runs, with ``+`` when files were changed since; None outside a checkout.

    It is that of the first call: code that was imported before does not change later.
    """
    folder = Path(video_opd.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except OSError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
