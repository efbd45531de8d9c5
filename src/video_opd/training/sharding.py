"""FSDP2: each process holds one shard of the master weights, the gradients and the optimiser's state.

The model is gathered once a step, not once a forward. A step here is many forwards of some of the modules,
and their number differs between processes because responses differ in length. A gather inside a forward would
make every process wait for the same forward of all others: for each token, in each layer. So the weights are
whole while the model is run and in shards while the optimiser works. In between, gradients are reduced, once
a step or (``model.reduce: micro_batch``) after each backward:

    whole: sample, score, differentiate, differentiate, … → reduce, in shards: clip, step → whole

With ``model.gather: layer`` that is said of embeddings, ``lm_head``, mergers and norms only. Layers are
gathered one at a time (:mod:`video_opd.models.gathered_layers`), for a student that does not fit whole.

With N weights and n processes, each process holds N numbers of the computation's type, N gradients until
they are reduced, and N/n of the master weights and of Adam's two moments. DDP holds 4·N numbers of float32;
this is less by nearly 2·N of them, and by another N if the computation is in bfloat16.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.collective_passes import units_of
from video_opd.models.gathered_layers import GatheredLayers
from video_opd.models.modes import call_through
from video_opd.models.parts import state_of
from video_opd.processes import launched_count
from video_opd.training.masters import Masters
from video_opd.training.optimizers import MOMENTS, LowPrecisionAdamW

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.checkpoint.state_dict import StateDictOptions


HeldType = Callable[[nn.Parameter], torch.dtype]
"""The type that a weight is held in; it may have been read in a narrower one."""


def hold(weights: Iterable[nn.Parameter], held: HeldType) -> None:
    """Gives weights the types that they are held in."""
    for weight in weights:
        weight.data = weight.data.to(held(weight))


def shard(model: nn.Module, dtype: torch.dtype, device: torch.device, held: HeldType) -> None:
    """Puts the weights into shards over all processes, in place; the model computes in ``dtype``.

    A layer's weights get the types that they are ``held`` in just before it is divided, so no process ever
    has the whole model in a wider one. Gradients are reduced in float32. ``fully_shard`` replaces the
    parameters, so create the optimiser afterwards. It is called directly because Accelerate offers FSDP2 on
    accelerators only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Autocast casts the inputs.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*units_of(model), model):
        hold((weight for weight in module.parameters() if not isinstance(weight, DTensor)), held)
        fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def sharding_asked(recipe: Recipe) -> bool:
    """Whether ``model.sharding`` is set and there are several processes.

    Raises :class:`UserError` if ``accelerate launch`` was told to shard in its own way.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise UserError(
            "accelerate launch must not shard the model itself: leave --use_fsdp out, and set model.sharding "
            "to fsdp2 in the recipe"
        )
    return recipe.model.sharding == "fsdp2" and launched_count() > 1


def gathers_by_layer(recipe: Recipe) -> bool:
    """Whether the layers of the student are gathered one at a time."""
    return recipe.model.gather == "layer" and sharding_asked(recipe)


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


class Shards:
    """Switches a model that FSDP2 manages between whole and in shards; all processes call it together.

    The model is whole at first. A model that is not sharded is left unchanged.

    With ``masters``, the optimiser works on these in place of the model's weights. ``each_micro_batch`` says
    that :meth:`reduce` follows each backward. A gradient is then held in the type of its weight, not in
    float32: at most a second one is added to it, where the backward is cut at the prefix.

    With ``by_layer``, what is said here of whole weights holds for those outside of layers only. The layers
    stay in shards; :meth:`gathered_layers` makes them whole one at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        masters: Masters | None = None,
        *,
        each_micro_batch: bool = False,
        by_layer: bool = False,
    ) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.model, self.masters = model, masters
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        layers = set(units_of(model)) if by_layer else set()
        self._layers = [unit for unit in self.units if unit in layers]
        self.each_micro_batch = each_micro_batch and (bool(self.units) or masters is not None)
        self.to_shards()
        self._held = _trained(model)
        #: The weights that the optimiser updates; of a sharded model, this process's shards.
        self.parameters = list((masters.weights if masters else self._held).values())
        for unit in self.units:
            unit.set_reshard_after_backward(False, recurse=False)
            unit.set_requires_gradient_sync(False, recurse=False)  # :meth:`reduce` does it
        if self.units:
            with torch.no_grad():  # FSDP initialises itself in the first forward of the whole model
                call_through(model, model, lambda: torch.zeros(()))
        self._in_layer: dict[nn.Module, dict[str, nn.Parameter]] = {
            layer: self._trained_in(layer) for layer in self._layers
        }
        self._unshard()
        in_layers = {name for names in self._in_layer.values() for name in names}
        self._whole = {name: weight for name, weight in _trained(model).items() if name not in in_layers}
        self._kept: dict[str, torch.Tensor] = {}
        if self.units or masters is not None:
            for name, weight in self._whole.items():
                weight.register_post_accumulate_grad_hook(functools.partial(self._keep, name))

    def gather(self) -> None:
        """Makes the model whole, with the weights that the optimiser has updated."""
        if self.masters is not None:
            self.masters.publish()
        self._unshard()

    def to_shards(self) -> None:
        """Puts the model into shards."""
        for unit in self.units:
            unit.reshard()

    def gathered_layers(self) -> GatheredLayers | None:
        """What gathers the layers one at a time, from now on; None without ``by_layer``."""
        if not self._layers:
            return None
        from torch.distributed.tensor import DTensor

        shard = next(iter(self._held.values()))
        assert isinstance(shard, DTensor)
        return GatheredLayers(self.model, shard.device_mesh, shard.device, self._reduce_layer)

    def reduce(self) -> None:
        """Adds the gradients of the whole weights to those of :attr:`parameters`, and frees them.

        Of a model in shards it is the mean over processes, in float32.
        """
        if self.units or self.masters is not None:
            self._reduce(self._whole)

    def _reduce_layer(self, layer: nn.Module) -> None:
        self._reduce(self._in_layer[layer])

    def _reduce(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, weight in weights.items():
            grad = self._kept.pop(name, None)
            if grad is None:
                grad, weight.grad = weight.grad, None
            if self.units:
                # A process without a gradient for a weight would block all others.
                grad = self._mean(name, torch.zeros_like(weight) if grad is None else grad)
            if grad is None:
                continue
            held = self._held[name]
            if self.masters is not None:
                self.masters.add_gradient(name, grad)
            elif held.grad is None:
                held.grad = grad
            else:
                held.grad += grad

    def clip(self, accelerator: Accelerator, max_norm: float) -> float:
        """Clips the gradients of :attr:`parameters` to a global norm, and returns the norm before."""
        if self.masters is not None:
            return self.masters.clip(max_norm).item()
        return whole(accelerator.clip_grad_norm_(self.parameters, max_norm)).item()

    def states(
        self, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        """(state dict of the master weights, state dict of the optimiser) on the CPU of the first process;
        other processes get empty ones. The weights are None if the model holds them itself."""
        self.to_shards()
        weights = self._weights() if self.units or self.masters else None
        moments = optimizer_state(self.model, optimizer, self.masters)
        self._unshard()
        return weights, moments

    def dissolve(self) -> None:
        """Makes the model whole for good: it can no longer be trained.

        The first process gets the master weights, to evaluate and save them.
        """
        if not self.units and self.masters is None:
            return
        masters: dict[int, nn.Parameter] = {}  # a tensor that has two names stays one
        self.to_shards()
        weights = self._weights()
        self._unshard()
        for name, tensor in weights.items():
            prefix, _, own = name.rpartition(".")
            module = self.model.get_submodule(prefix)
            held = module._parameters.get(own)
            if held is not None:  # FSDP still watches each forward, and finds its own copy gathered
                if id(held) not in masters:
                    # What was gathered by layer has no room on the device.
                    device = tensor.device if self._layers else held.device
                    masters[id(held)] = nn.Parameter(tensor.to(device), held.requires_grad)
                module._parameters[own] = masters[id(held)]

    def _trained_in(self, layer: Any) -> dict[str, nn.Parameter]:
        """The trained weights of a layer, as they are whenever it is whole."""
        layer.unshard()
        own = {id(weight) for weight in layer.parameters()}
        found = {name: weight for name, weight in _trained(self.model).items() if id(weight) in own}
        layer.reshard()
        return found

    def _unshard(self) -> None:
        for unit in self.units:
            if unit not in self._layers:
                unit.unshard()
        # FSDP puts the same tensors back each time; the hooks are on them.
        whole = getattr(self, "_whole", {})
        assert all(self.model.get_parameter(name) is weight for name, weight in whole.items())

    @torch.no_grad()
    def _keep(self, name: str, weight: torch.Tensor) -> None:
        """Takes the gradient that a backward left at a whole weight."""
        assert weight.grad is not None
        grad, weight.grad = weight.grad, None
        if name in self._kept:
            self._kept[name] += grad
        else:
            self._kept[name] = grad.to(weight.dtype if self.each_micro_batch else torch.float32)

    @torch.no_grad()
    def _mean(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Partial, Shard

        held = self._held[name]
        assert isinstance(held, DTensor)
        summands = DTensor.from_local(grad.float(), held.device_mesh, [Partial()], run_check=False)
        return summands.redistribute(placements=[Shard(0)]).div_(held.device_mesh.size())

    def _weights(self) -> dict[str, torch.Tensor]:
        """The state dict with the master weights; empty except on the first process."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state: dict[str, Any] = (
            get_model_state_dict(self.model, options=_on_first_process())
            if self.units
            else state_of(self.model)
        )
        if self.masters is not None:
            for name, weight in self.masters.weights.items():
                tensor = self.masters.whole(name, weight)
                if name in state:
                    state[name] = tensor
        first_names: dict[int, str] = {}  # a tensor that has two names stays one
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = first_names.setdefault(id(parameter), name)
            if first != name and name in state:
                state[name] = state[first]
        return state


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all of its shards; all processes call it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, masters: Masters | None = None
) -> dict[str, Any]:
    """The optimiser's state by the weights' names, on the CPU of the first process.

    All processes call it together. A sharded model must be in shards.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    plain = _plain(optimizer)
    if isinstance(plain, LowPrecisionAdamW):
        state = plain.named_state({parameter: name for name, parameter in model.named_parameters()})
        return state if _is_first_process() else {"state": {}, "param_groups": []}
    if not optimizer.state:  # no step was made; the library would make one to fill the state
        return {"state": {}, "param_groups": []}
    if masters is not None:
        return masters.optimizer_state(plain)
    return get_optimizer_state_dict(model, plain, options=_on_first_process())


def load_optimizer_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    masters: Masters | None = None,
) -> None:
    """Gives the optimiser what :func:`optimizer_state` returned, in whatever shards the weights are now.

    Every process has read the file. A sharded model must be in shards. Earlier versions numbered the weights
    in the order of the optimiser; such a state is read, too. Raises ``ValueError`` or ``KeyError`` for one
    of other weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    names: dict[torch.Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    if masters is not None:
        names = {weight: name for name, weight in masters.weights.items()}
    saved = _by_name(names, optimizer, state)
    if not saved["state"]:
        return
    plain = _plain(optimizer)
    if masters is not None:
        masters.load_optimizer_state(plain, saved)
        return
    if isinstance(plain, LowPrecisionAdamW):
        plain.load_named_state(names, saved)
        return
    _check_shapes(names, saved)
    options = StateDictOptions(full_state_dict=True, strict=False)
    # A trained weight that has had no gradient yet has no state, and torch 2.9 wants one of each.
    trained = [weight for group in plain.param_groups for weight in group["params"]]
    blank = {names[w]: _no_moments(w) for w in trained if names[w] not in saved["state"]}
    filled = {**saved, "state": {**saved["state"], **blank}}
    set_optimizer_state_dict(model, plain, filled, options=options)
    for parameter in list(optimizer.state):
        if names[parameter] in blank:
            del optimizer.state[parameter]


def _by_name(
    names: Mapping[torch.Tensor, str], optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """An optimiser's state with weights' names in place of their numbers, if it has numbers. The settings are
    the optimiser's own, which the recipe decides. Raises ``ValueError`` for what is no moment."""
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    ordered = [name for group in groups for name in group["params"]]

    def name(key: int | str) -> str:
        return ordered[key] if isinstance(key, int) else key

    found = {name(key): moments for key, moments in state["state"].items()}
    for each, moments in found.items():
        for key, value in moments.items():
            if not isinstance(value, torch.Tensor) or not (
                value.is_floating_point() or value.dtype == torch.uint8
            ):
                raise ValueError(f"{key} of {each} is no moment")
    return {"state": found, "param_groups": groups}


def _check_shapes(names: Mapping[torch.Tensor, str], saved: Mapping[str, Any]) -> None:
    shapes = {name: weight.shape for weight, name in names.items()}
    for name, moments in saved["state"].items():
        if moments.keys() != {"step", *MOMENTS}:  # what lacks would begin anew at 0
            raise ValueError(f"{name} has {', '.join(sorted(moments)) or 'no moments'}")
        for key, value in moments.items():
            if value.shape != (torch.Size(()) if key == "step" else shapes[name]):
                raise ValueError(f"{key} of {name} has shape {tuple(value.shape)}")


def _no_moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"step": torch.zeros(()), **{key: torch.zeros(weight.shape) for key in MOMENTS}}


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser that Accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _on_first_process() -> StateDictOptions:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)
