"""A pretended GPU for machines that have none: tensors are marked as being on it, and mixing is an error.

The numbers stay in the memory of the CPU. The marks check that code moves every tensor to the device on which
it is used, as a GPU would demand. They live on tensor objects and follow every call of a torch function from
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
_MARK = "_on_pretended_gpu"
# These functions take a CPU tensor together with one on a GPU: as an index, or as the source of a copy.
_MIXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_)
_TO_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)


def is_there(tensor: torch.Tensor) -> bool:
    return getattr(tensor, _MARK, False)


def put_there(module: nn.Module) -> None:
    """Marks parameters and buffers as being on the pretended GPU."""
    for tensor in (*module.parameters(), *module.buffers()):
        setattr(tensor, _MARK, True)


class PretendedGpu(TorchFunctionMode):
    """While it is active, results are marked, and mixing devices raises ``RuntimeError``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors([args, kwargs]))
        there = [tensor for tensor in tensors if is_there(tensor)]
        if func == torch.Tensor.device.__get__:
            return GPU if there else func(*args, **kwargs)
        if func in _TO_NUMPY and there:
            raise RuntimeError("a tensor on the GPU was asked for as a NumPy array")
        asked, args, kwargs = _asked_device(func, args, kwargs)
        moves = func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda)
        here = [tensor for tensor in tensors if not is_there(tensor) and tensor.ndim > 0]
        if there and here and not moves and not (func in _MIXING and is_there(tensors[0])):
            shapes = [(tuple(tensor.shape), "GPU" if is_there(tensor) else "CPU") for tensor in tensors]
            raise RuntimeError(f"{getattr(func, '__name__', func)} mixes devices: {shapes}")
        result = func(*args, **kwargs)
        target = bool(there) if asked is None else asked.type == GPU.type
        return _marked(result, target, tensors)


def _asked_device(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[torch.device | None, Sequence[Any], dict[str, Any]]:
    """(the device that a call names, the arguments with the CPU in its place)."""
    if func is torch.Tensor.cpu:
        return torch.device("cpu"), args, kwargs
    if func is torch.Tensor.cuda:
        raise AssertionError("the project names devices, not cuda()")
    asked = None
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        kwargs["device"] = "cpu"
    elif func is torch.Tensor.to and len(args) > 1:
        if isinstance(args[1], torch.Tensor):
            asked = GPU if is_there(args[1]) else torch.device("cpu")
        elif isinstance(args[1], str | torch.device):
            asked = torch.device(args[1])
            args = [args[0], "cpu", *args[2:]]
    return asked, args, kwargs


def _marked(result: Any, target: bool, given: Sequence[torch.Tensor]) -> Any:
    if isinstance(result, torch.Tensor):
        if any(result is tensor for tensor in given):
            if is_there(result) == target:
                return result
            result = result.view_as(result)  # moved: another object, the same gradient
        setattr(result, _MARK, target)
        return result
    if isinstance(result, tuple | list) and any(True for _ in _tensors(result)):
        marked = [_marked(value, target, given) for value in result]
        return type(result)(marked)
    return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
