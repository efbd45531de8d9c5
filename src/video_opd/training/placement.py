"""Where a teacher, or the reference, is held: whole, sharded over the processes, or on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch

from video_opd.config import Recipe
from video_opd.models.loading import DTYPES, count_weights
from video_opd.models.placed_teachers import OffloadedTeacher, ShardedTeacher
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.progress import log
from video_opd.training.memory import free_bytes

Place = Literal["whole", "sharded", "cpu"]
# The share of the free memory that a whole model may take beside what training adds.
SHARE = 0.4


def choose_placement(recipe: Recipe, paths: Sequence[str], dtype: str, device: torch.device) -> Place:
    """``teacher.placement`` or, where it is ``auto``, a placement that fits; the log says why.

    ``paths`` are the models that it is decided for; they are held in ``dtype``.
    """
    asked = recipe.teacher.placement
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "whole"
    size = sum(count_weights(path) for path in paths) * torch.finfo(DTYPES[dtype]).bits // 8
    free, count = free_bytes(device), _processes()
    found = f"{size / 2**30:.1f} GiB of weights, {free / 2**30:.1f} GiB are free"
    if size <= SHARE * free:
        return _logged("whole", found)
    if count > 1:
        return _logged("sharded", f"{found}, and {count} processes share them")
    return _logged("cpu", f"{found}, and there is one process")


def loading_device(place: Place, device: torch.device) -> torch.device:
    """The device that a model is loaded on, before :func:`place`."""
    return device if place == "whole" else torch.device("cpu")


def place(
    policy: HFPolicy, place: Place, device: torch.device, nonfinite: Literal["raise", "mask"]
) -> LocalTeacher:
    """The teacher around a model that was loaded on :func:`loading_device`."""
    if place == "sharded":
        return ShardedTeacher(policy, device=device, nonfinite=nonfinite)
    if place == "cpu":
        return OffloadedTeacher(policy, device=device, nonfinite=nonfinite)
    return LocalTeacher(policy, nonfinite=nonfinite)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _logged(place: Place, why: str) -> Place:
    log(f"teacher.placement is {place}: {why}")
    return place
