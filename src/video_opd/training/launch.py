"""Joins the processes of a run, as a launcher started them, after the recipe was compared with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.processes import LONGEST_WAIT, Processes, follow_launcher, launched_count
from video_opd.training.sharding import sharding_asked

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_launch(recipe: Recipe) -> None:
    """Raises :class:`UserError` for settings that the launcher's number of processes, or its own sharding,
    rules out."""
    recipe.check_processes(launched_count())
    sharding_asked(recipe)


def check_trackers(recipe: Recipe) -> None:
    """Raises :class:`UserError` if one of ``run.trackers`` is not installed."""
    from accelerate.tracking import get_available_trackers

    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in recipe.run.trackers:
        if name not in available:
            raise UserError(
                f"run.trackers names {name}, which is not installed: pip install {name}, or leave it out"
            )


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Joins the processes that ``accelerate launch`` or torchrun started, or makes the single one ready."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import set_seed

    check_trackers(recipe)
    check_launch(recipe)
    follow_launcher()
    asked = launched_count()
    accelerator = Accelerator(
        # Without an accelerator, Accelerate would make each of torchrun's processes a run of its own.
        cpu=asked > 1 and not torch.accelerator.is_available(),
        # All processes wait while the first one saves a checkpoint or evaluates the finished model.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        # The policy casts by itself, so that sampling, scoring and training compute alike.
        mixed_precision="no",
        log_with=list(recipe.run.trackers) or None,
        project_dir=recipe.run.dir,
    )
    if accelerator.num_processes != asked:
        raise UserError(
            f"the launcher started {asked} processes, but Accelerate joined {accelerator.num_processes}; "
            "use torchrun, or accelerate launch --multi_gpu"
        )
    set_seed(recipe.run.seed)
    return accelerator


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes that ``accelerator`` joined."""
    return Processes(rank=accelerator.process_index, count=accelerator.num_processes)
