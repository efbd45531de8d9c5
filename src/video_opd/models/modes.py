"""The states a model is run in: evaluation, reduced precision, through a wrapper's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each in the mode it had.

    Layers in training mode drop their key/value cache when gradient checkpointing is on.
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
    """Autocast to ``dtype``; None computes in the weights' own precision."""
    if dtype is None:
        yield
        return
    # Copies of the weights that were cast without gradients must not be taken up again with them.
    torch.clear_autocast_cache()
    with torch.autocast(device.type, dtype=dtype):
        yield


def call_through(wrapper: nn.Module, module: nn.Module, function: Callable[[], T]) -> T:
    """Run ``function`` as if it were ``module.forward`` while calling ``wrapper``, which wraps ``module``.

    DDP and FSDP prepare their work in the wrapper's forward, once. A step here is several forwards of the
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
        restore()  # what function calls is the real forward
        return function()

    module.__dict__["forward"] = redirected
    try:
        return wrapper()
    finally:
        restore()
