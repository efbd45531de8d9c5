"""FSDP2: each process holds one shard of the master weights, the gradients and the optimiser's state.

The model is gathered once a step, not once a forward. A step here is many forwards of some of the modules,
and their number differs between processes because responses differ in length. A gather inside a forward would
make every process wait for the same forward of all others: for each token, in each layer. So the weights are
whole while the model is run and in shards while the optimiser works. In between, gradients are reduced once:

    whole: sample, score, differentiate, differentiate, … → reduce, in shards: clip, step → whole

With N weights and n processes, each process holds N numbers of the computation's type, N gradients until
they are reduced, and N/n of the master weights and of Adam's two moments. DDP holds 4·N numbers of float32;
this is less by nearly 2·N of them, and by another N if the computation is in bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.modes import call_through

if TYPE_CHECKING:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

# FSDP gathers and reduces these modules one at a time.
UNITS = (
    *("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    *("Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock"),
)


def shard(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Puts the weights into shards over all processes, in place; the model computes in ``dtype``.

    Gradients are reduced in float32. ``fully_shard`` replaces the parameters, so create the optimiser
    afterwards. It is called directly because Accelerate offers FSDP2 on accelerators only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Autocast casts the inputs.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(model.modules()):
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def sharding_asked(recipe: Recipe) -> bool:
    """Whether ``model.sharding`` is set and there are several processes.

    Raises :class:`UserError` if ``accelerate launch`` was told to shard in its own way.
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
    """Switches a model that FSDP2 manages between whole and in shards; all processes call it together.

    The model is whole at first. A model that is not sharded is left unchanged.
    """

    def __init__(self, model: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.model = model
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._in_shards()
        #: The weights that the optimiser updates; of a sharded model, this process's shards.
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        for unit in self.units:
            unit.set_reshard_after_backward(False, recurse=False)
            unit.set_requires_gradient_sync(False, recurse=False)
        if self.units:
            with torch.no_grad():  # FSDP initialises itself in the first forward of the whole model
                call_through(model, model, lambda: torch.zeros(()))
        self.gather()

    def gather(self) -> None:
        """Makes the model whole: its parameters are now tensors that autograd writes gradients to."""
        for unit in self.units:
            unit.unshard()

    def reduce(self) -> None:
        """Puts the model into shards, with the mean over processes of the gradients that each added up."""
        if not self.units:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # a process without a gradient for a weight would block all others
                parameter.grad = torch.zeros_like(parameter)
        for unit in self.units:
            unit.set_requires_gradient_sync(True, recurse=False)
        # FSDP reduces gradients at the end of any backward through the root module.
        call_through(self.model, self.model, lambda: trained[0].sum() * 0.0).backward()
        for unit in self.units:
            unit.set_requires_gradient_sync(False, recurse=False)
        self._in_shards()

    def states(
        self, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        """(state dict of the master weights, state dict of the optimiser) on the CPU of the first process;
        other processes get empty ones. The weights are None if the model holds them itself."""
        self._in_shards()
        weights = self._weights() if self.units else None
        moments = optimizer_state(self.model, optimizer)
        self.gather()
        return weights, moments

    def _weights(self) -> dict[str, torch.Tensor]:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(self.model, options=_on_first_process())
        first_names: dict[int, str] = {}  # a tensor that has two names stays one
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = first_names.setdefault(id(parameter), name)
            if first != name and name in state:
                state[name] = state[first]
        return state

    def dissolve(self) -> None:
        """Makes the model whole for good: it can no longer be trained.

        The first process gets the master weights, to evaluate and save them.
        """
        if not self.units:
            return
        masters: dict[int, nn.Parameter] = {}  # a tensor that has two names stays one
        self._in_shards()
        weights = self._weights()
        self.gather()
        for name, tensor in weights.items():
            prefix, _, own = name.rpartition(".")
            module = self.model.get_submodule(prefix)
            held = module._parameters.get(own)
            if held is not None:  # FSDP still watches each forward, and finds its own copy gathered
                if id(held) not in masters:
                    masters[id(held)] = nn.Parameter(tensor.to(held.device), held.requires_grad)
                module._parameters[own] = masters[id(held)]

    def _in_shards(self) -> None:
        for unit in self.units:
            unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all of its shards; all processes call it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by the weights' names, on the CPU of the first process.

    All processes call it together. A sharded model must be in shards.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not optimizer.state:  # no step was made; the library would make one to fill the state
        return {"state": {}, "param_groups": []}
    return get_optimizer_state_dict(model, _plain(optimizer), options=_on_first_process())


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Gives the optimiser what :func:`optimizer_state` returned, in whatever shards the weights are now.

    Every process has read the file. A sharded model must be in shards. Earlier versions numbered the weights
    in the order of the optimiser; such a state is read, too.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    saved = _by_name(model, optimizer, state)
    if not saved["state"]:
        return
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, _plain(optimizer), saved, options=options)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in list(optimizer.state):
        if names[parameter] not in saved["state"]:  # it has had no gradient yet
            del optimizer.state[parameter]


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with weights' names in place of their numbers, if it has numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

    def name(key: int | str) -> str:
        return ordered[key] if isinstance(key, int) else key

    return {
        "state": {name(key): moments for key, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [name(key) for key in group["params"]]} for group in state["param_groups"]
        ],
    }


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser that Accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _on_first_process() -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)
