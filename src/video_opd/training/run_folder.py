"""The folder of a run: its files, the recipe that it belongs to, and its return to a checkpoint."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import video_opd
from video_opd.config import Recipe, dump_recipe, load_recipe
from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.files import discard_unfinished, write_text
from video_opd.jsonl import read_jsonl, repair_jsonl, write_jsonl

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

    def claim(self, recipe: Recipe) -> None:
        """Writes the recipe into the folder, unless a run of this recipe is already there.

        Raises :class:`FolderInUse` if the folder holds several rounds or a run of another recipe (the message
        names the first key that differs), and :class:`UserError` if it cannot be written. A start that failed
        before its first step leaves the folder free.
        """
        if self.round(1).exists():
            raise FolderInUse(self.path, "the rounds of video-opd rounds")
        if self.recipe.exists() and (self.metrics.exists() or self.model.exists()):
            self._check_same(recipe, ("tvdf.", "rounds."))  # train ignores these sections
            return
        write_text(self.recipe, dump_recipe(recipe))

    def claim_for_rounds(self, recipe: Recipe) -> None:
        """The same for several rounds; a start that failed before its first score leaves the folder free."""
        if self.metrics.exists() or self.model.exists():
            raise FolderInUse(self.path, "a run of video-opd train")
        if self.recipe.exists() and self.round(1).exists():
            self._check_same(recipe)
            return
        write_text(self.recipe, dump_recipe(recipe))

    def round(self, number: int) -> Path:
        """The folder of round ``number`` (from 1), which is a run folder itself."""
        return self.path / f"round-{number}"

    def _check_same(self, recipe: Recipe, ignored: tuple[str, ...] = ()) -> None:
        try:  # through the reader: an earlier version wrote the keys of other methods, too
            stored = load_recipe(self.recipe)
        except UserError as error:
            remedy = f"choose another run.dir ({error})"
            raise FolderInUse(self.path, "a run whose recipe cannot be read", remedy) from error
        before, now = dict(flatten(stored.to_dict())), dict(flatten(recipe.to_dict()))
        if "prompt.video_form" in now:  # before it was written, there was one form
            before.setdefault("prompt.video_form", "nested")
        for key in dict.fromkeys((*now, *before)):
            # The folder may have been moved, or be named from elsewhere; shards change no result.
            if key in ("run.dir", "model.sharding") or key.startswith(ignored):
                continue
            old, new = before.get(key, "not set"), now.get(key, "not set")
            if old != new:
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

    def rewind(self, step: int) -> None:
        """Removes the rows of all steps after ``step``; the run makes these steps again."""
        for path in (self.metrics, self.rollouts):
            if path.exists():
                repair_jsonl(path)
                rows = [row for _, row in read_jsonl(path)]
                kept = [row for row in rows if row["step"] <= step]
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
            "commit": _git_commit(Path(video_opd.__file__).parent),
            "python": platform.python_version(),
            "packages": dict(_versions()),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "command": sys.argv,
            **facts,
        }
        write_text(self.environment, json.dumps(environment, indent=2) + "\n")


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _git_commit(folder: Path) -> str | None:
    """The commit of the code that runs, with ``+`` when files were changed since; None outside a checkout."""

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
