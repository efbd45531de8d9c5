"""FSDP2: master weights, gradients and the optimiser's state in shards, one on each process.

The model is gathered once a step, not once a forward. A step here is many forwards of parts of the model, of
another number on each process (answers end when they end), and a gather inside a forward would make every
process wait for the same forward of all others: for each token, in each layer. So weights are whole while the
model is run and in shards while the optimiser works; in between, gradients are reduced once:

    whole: sample, score, differentiate, differentiate, … → reduce, in shards: clip, step → whole

What each process holds, for N weights and n processes: N numbers of the computation's type, N gradients until
they are reduced, and N/n of master weights and of Adam's two moments. That is less than DDP's 4·N by nearly
2·N numbers of float32, and another N where the computation is in bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.modes import call_through
from video_opd.models.parts import state_of

# Are gathered and reduced one at a time.
UNITS = (
    *("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    *("Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock"),
)


def shard(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Puts the weights into shards over all processes, in place, to be computed with in ``dtype``.

    By torch itself: Accelerate has FSDP2 for accelerators alone. Gradients are reduced in float32. Parameters
    are others afterwards, and an optimiser is made of these.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Autocast does what is to be done with inputs.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def sharding_asked(recipe: Recipe) -> bool:
    """Whether there are several processes, and ``model.sharding`` is set.

    Raises :class:`UserError` where ``accelerate launch`` would shard in its own way.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            "accelerate launch must not shard the model itself: leave --use_fsdp out, and set model.sharding "
            "to fsdp2 in the recipe"
        )
    return recipe.model.sharding == "fsdp2" and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


class Shards:
    """Turns a model that FSDP2 manages from whole to shards and back; every process together.

    It is whole at first. Of a model that is not sharded, all is left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.model = model
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._in_shards()
        #: What the optimiser updates: each process its part.
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for unit in self.units:
            unit.set_reshard_after_backward(False, recurse=False)
            unit.set_requires_gradient_sync(False, recurse=False)
        if self.units:
            with torch.no_grad():  # FSDP settles what is whose in the first forward of the whole model
                call_through(model, model, lambda: torch.zeros(()))
        self.gather()

    def gather(self) -> None:
        """Whole from here: the model's parameters are tensors that autograd writes gradients to."""
        for unit in self.units:
            unit.unshard()

    def reduce(self) -> None:
        """In shards from here, with the mean over processes of the gradients that each has added up."""
        if not self.units:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # every process gives a gradient for every weight, or all wait
                parameter.grad = torch.zeros_like(parameter)
        for unit in self.units:
            unit.set_requires_gradient_sync(True, recurse=False)
        # The end of any backward through the root reduces what is there.
        call_through(self.model, self.model, lambda: trained[0].sum() * 0.0).backward()
        for unit in self.units:
            unit.set_requires_gradient_sync(False, recurse=False)
        self._in_shards()

    def state(self) -> dict[str, torch.Tensor] | None:
        """The state dict of master weights, on the CPU of the first process (others get none of it); None
        where the model can give it by itself."""
        if not self.units:
            return None
        self._in_shards()
        parameters = dict(self.model.named_parameters())  # one that has two names, once
        gathered = {id(parameter): on_first(parameter.detach()) for parameter in parameters.values()}
        state = state_of(self.model)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            tensor = gathered[id(parameter)]
            if tensor is None:
                del state[name]
            else:
                state[name] = tensor
        self.gather()
        return state

    def dissolve(self) -> None:
        """Whole for good, on the first process with master weights: to be evaluated and saved there, and no
        longer trained."""
        masters: dict[int, nn.Parameter] = {}  # a tensor that has two names stays one
        for name, tensor in (self.state() or {}).items():
            prefix, _, own = name.rpartition(".")
            module = self.model.get_submodule(prefix)
            held = module._parameters.get(own)
            if held is not None:  # FSDP, which watches each forward, finds its own copy gathered
                if id(held) not in masters:
                    masters[id(held)] = nn.Parameter(tensor.to(held.device), held.requires_grad)
                module._parameters[own] = masters[id(held)]

    def _in_shards(self) -> None:
        for unit in self.units:
            unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Over all shards; every process together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first(tensor: torch.Tensor) -> torch.Tensor | None:
    """On the CPU of the first process; every process together."""
    value = whole(tensor)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return value.cpu() if first else None


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Of all weights, whoever holds the shards, on the CPU of the first process; every process together."""
    state = optimizer.state_dict()
    moments = {
        index: {
            key: on_first(value) if isinstance(value, torch.Tensor) else value
            for key, value in of_one.items()
        }
        for index, of_one in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """What :func:`optimizer_state` gave, to the same weights in whatever shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def mine(index: int, value: Any) -> Any:
        weight = weights[index]
        if not isinstance(weight, DTensor) or not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        # Each process has read the file, and takes its own part.
        return distribute_tensor(
            value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
        )

    moments = {
        index: {key: mine(index, value) for key, value in of_one.items()}
        for index, of_one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
