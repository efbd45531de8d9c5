"""Master weights on the CPU: what the optimiser updates, while the device holds what the model computes with.

The device then has no float32 weights and no moments. After the last backward of a step the gradients are
copied to the CPU, the optimiser works there, and the updated weights are copied back in the type of the
computation. Of a model in shards, a process has the masters and the moments of its own shards only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard


class Masters:
    """The trained weights of a model in float32 on the CPU, by name.

    It is made before the model is put into shards over ``processes`` processes, of which this one is number
    ``rank``. The model's trained weights are held in ``dtype`` from then on. :meth:`bind` tells it which
    tensors of the device belong to the masters.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, rank: int = 0, processes: int = 1) -> None:
        self._rank, self._processes = rank, processes
        self.weights: dict[str, nn.Parameter] = {}
        self._on_device: dict[str, nn.Parameter] = {}
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                mine = self._shard(weight.detach())
                self.weights[name] = nn.Parameter(mine.to("cpu", torch.float32, copy=True))
                weight.data = weight.data.to(dtype)

    def bind(self, model: nn.Module) -> None:
        """Takes the trained weights of ``model``, which is in shards or not sharded at all."""
        self._on_device = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        assert self._on_device.keys() == self.weights.keys()

    @torch.no_grad()
    def add_gradient(self, name: str, grad: torch.Tensor) -> None:
        """Adds a gradient from the device. For a sharded model it is this process's shard of the mean over
        processes."""
        master, mine = self.weights[name], _local(grad).to("cpu", torch.float32)
        if master.grad is None:
            master.grad = mine.clone() if mine is grad else mine
        else:
            master.grad += mine

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scales the gradients to a global norm of at most ``max_norm``; the norm before is returned."""
        grads = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if self._processes > 1:
            device = next(iter(self._on_device.values())).device
            square = norm.double().square().to(device)
            distributed.all_reduce(square)
            norm = square.sqrt().to("cpu", torch.float32)
        nn.utils.clip_grads_with_norm_(list(self.weights.values()), max_norm, norm)
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copies the masters to the device; a sharded model must be resharded first."""
        for name, weight in self._on_device.items():
            _local(weight).copy_(self.weights[name])

    def whole(self, name: str, mine: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor like master ``name``, of which this process has ``mine``, on the CPU. All
        processes call it together."""
        weight = self._on_device[name]
        if not isinstance(weight, DTensor):
            return mine.detach().clone()
        joined = DTensor.from_local(
            mine.detach().to(weight.device),
            weight.device_mesh,
            [Shard(0)],
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
        return joined.full_tensor().cpu()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state, whole, by the weights' names. All processes call it together."""
        names: dict[torch.Tensor, str] = {weight: name for name, weight in self.weights.items()}
        state = {
            names[weight]: {
                key: self.whole(names[weight], value) if _is_like(value, weight) else value
                for key, value in moments.items()
            }
            for weight, moments in optimizer.state.items()
        }
        groups = [
            # Another run's weights may be where there is no fused step.
            {**group, "params": [names[weight] for weight in group["params"]], "fused": None}
            for group in optimizer.param_groups
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Gives the optimiser its part of what :meth:`optimizer_state` returned; its settings stay.

        Raises ``ValueError`` for a state of weights of other shapes.
        """
        names: dict[torch.Tensor, str] = {weight: name for name, weight in self.weights.items()}
        ordered = [names[weight] for group in optimizer.param_groups for weight in group["params"]]
        mine: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(ordered):
            if name in state["state"]:
                mine[number] = {}
                for key, value in state["state"][name].items():
                    part = self._shard(value) if value.ndim else value
                    if value.ndim and part.shape != self.weights[name].shape:
                        raise ValueError(f"{key} of {name} has shape {tuple(value.shape)}")
                    mine[number][key] = part
        own = optimizer.state_dict()
        optimizer.load_state_dict({"state": mine, "param_groups": own["param_groups"]})

    def _shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's rows of a tensor, divided as FSDP divides it."""
        if self._processes == 1:
            return tensor
        pieces = tensor.chunk(self._processes)
        return pieces[self._rank] if self._rank < len(pieces) else tensor[:0]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_like(value: Any, weight: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == weight.shape
