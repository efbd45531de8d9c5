"""The modes in which a model is run: evaluation, reduced precision, through the forward of a wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; afterwards each is back in the mode it had.

    In training mode with gradient checkpointing, layers drop their key/value cache.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def computing_in(dtype: torch.dtype | None, device: torch.device) -> Iterator[None]:
    """Autocasts to ``dtype``; None computes in the weights' own precision."""
    if dtype is None:
        yield
        return
    # The cache may hold weights that were cast without gradients; they must not be used with gradients.
    torch.clear_autocast_cache()
    with torch.autocast(device.type, dtype=dtype):
        yield


def call_through(wrapper: nn.Module, module: nn.Module, function: Callable[[], T]) -> T:
    """Calls ``wrapper``, which wraps ``module``, with ``function`` in the place of ``module.forward``.

    DDP and FSDP prepare the backward in the wrapper's forward, once. An update runs several forwards of the
    inner module (videos, prompts, responses), so all of them run inside one call of the wrapper. The
    technique is Lightning's forward redirection, which TRL uses too.
    """
    own = module.__dict__.get("forward")  # Accelerate puts an autocasting forward here

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    def redirected() -> T:
        restore()  # ``function`` must call the real forward
        return function()

    module.__dict__["forward"] = redirected
    try:
        return wrapper()
    finally:
        restore()
