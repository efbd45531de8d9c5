"""What a run reads, by content: a run that is continued must find what it began with.

A recipe names files and folders, and something else may stand there by the time a killed run is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.fingerprint import model_fingerprint
from video_opd.training.digests import file_digest


def input_digests(recipe: Recipe) -> dict[str, str]:
    """The digest of the training rows, and the fingerprints of the initial student and of the teachers that
    the run holds, by the recipe's key and the path. What is not here has none: who needs it says so.
    """
    teachers = [("teacher.path", path) for path in recipe.teacher.local_paths]
    models = [("model.path", recipe.model.path), *teachers]
    found = {f"{key} {path}": model_fingerprint(path) for key, path in models if Path(path).is_dir()}
    if Path(recipe.data.train).is_file():
        found[f"data.train {recipe.data.train}"] = file_digest(recipe.data.train)
    return found


def check_same_inputs(before: Mapping[str, str], now: Mapping[str, str], run: Path) -> None:
    """Raises :class:`UserError` if something is not what it was. ``before`` is empty in earlier versions'
    checkpoints, and paths that were named otherwise have no value to compare with."""
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise UserError(
                f"{name} has changed since {run} was begun: put back what was there, or choose another "
                "run.dir"
            )
