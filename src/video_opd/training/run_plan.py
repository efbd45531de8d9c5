"""The plan of a run before anything is loaded: whether it fits, and what it decides."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.loading import read_config
from video_opd.planning.memory import GIB
from video_opd.planning.plan import SURE, Plan, RecipeSizes, make_plan
from video_opd.planning.sizes import ModelSizes, sizes_of
from video_opd.progress import log
from video_opd.types import Sample


def plan_of_run(
    recipe: Recipe,
    samples: Sequence[Sample],
    device: torch.device,
    processes: int,
    say: Callable[[str], object] = log,
) -> Plan | None:
    """The plan on this machine, or None if a model of the recipe cannot be read; the same on all processes.

    What it decides is said by ``say``. Raises :class:`UserError` on a GPU that is surely too small. On a CPU,
    and where the estimate is not sure, it is said that memory may not suffice.
    """
    try:
        sizes = RecipeSizes.of(recipe, _read_sizes)
    except UserError:  # a run that is continued needs its checkpoint alone
        return None
    cuda = device.type == "cuda"
    free, total = _least(free_bytes(device)), _least(total_bytes(device))
    plan = make_plan(recipe, processes, free, total_bytes=total, samples=samples, sizes=sizes, cuda=cuda)
    total -= round(recipe.vllm_share * total) if cuda else 0
    for reason in plan.reasons:
        say(reason)
    if plan.fits:
        return plan
    found = (
        f"a step needs about {plan.memory.peak / GIB:.1f} GiB on each of {processes} {device.type} "
        f"process{'es' * (processes > 1)}"
    )
    advice = "video-opd plan RECIPE --suggest says what can be changed"
    if cuda and SURE * plan.memory.peak > total:
        raise UserError(f"{found}, which has {total / GIB:.1f} GiB: it cannot fit; {advice}")
    say(f"{found}, and {free / GIB:.1f} GiB are free: memory may not suffice; {advice}")
    return plan


def _read_sizes(path: str) -> ModelSizes:
    return sizes_of(read_config(path).to_dict(), path)


def _least(count: int) -> int:
    """The smallest of all processes' counts, so that they decide alike."""
    from accelerate.utils import gather_object

    return min(gather_object([count]))


def free_bytes(device: torch.device) -> int:
    """The memory that this process can have: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    import psutil

    return psutil.virtual_memory().total
