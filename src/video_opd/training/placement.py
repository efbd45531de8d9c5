"""Holds a teacher, or the reference, where the plan says: whole, sharded over the processes, or on the
CPU."""

from __future__ import annotations

from typing import Literal

import torch

from video_opd.config import Recipe
from video_opd.models.placed_teachers import OffloadedTeacher, ShardedTeacher
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.planning.setup import ResolvedPlacement


def placement_asked(recipe: Recipe) -> ResolvedPlacement:
    """The place that the recipe asks for. Without a plan, ``auto`` means whole."""
    asked = recipe.teacher.placement
    return "whole" if asked == "auto" else asked


def loading_device(place: ResolvedPlacement, device: torch.device) -> torch.device:
    """The device that a model is loaded on, before :func:`place`."""
    return device if place == "whole" else torch.device("cpu")


def place(
    policy: HFPolicy, place: ResolvedPlacement, device: torch.device, nonfinite: Literal["raise", "mask"]
) -> LocalTeacher:
    """The teacher around a model that was loaded on :func:`loading_device`."""
    if place == "sharded":
        return ShardedTeacher(policy, device=device, nonfinite=nonfinite)
    if place == "cpu":
        return OffloadedTeacher(policy, device=device, nonfinite=nonfinite)
    return LocalTeacher(policy, nonfinite=nonfinite)
