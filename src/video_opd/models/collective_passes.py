"""The forward passes of a model that processes hold together: a process has only a share of each layer.

A layer is gathered when its forward begins and freed when it has ended. All processes gather a layer at the
same time, but they have other prompts, and write responses of other lengths. So they agree before each run of
a part of the model on which part it is, and a process that does not need this run makes one of the smallest
size:

    process 0:  vision tower, decoder, decoder, (decoder), (vision tower), …
    process 1:  vision tower, decoder, decoder,  decoder,   vision tower,  …     (…): nobody needs the result
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from video_opd.models.modes import call_through
from video_opd.processes import collective

T = TypeVar("T")

# FSDP gathers these modules one at a time.
UNITS = (
    *("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    *("Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock"),
)
DONE = 0  # in the place of a run's number: this process has no further run


class Agreement:
    """Lets processes make the same runs in the same order, though each knows only of its own.

    A kind of run has a number, and a stand-in: what a process does that does not need this run. Of the runs
    that processes have reached, the one with the largest number is next.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._group, self._device = mesh.get_group(), device
        self._stand_ins: list[Callable[[], Any]] = []
        self._standing_in = self._inside = False

    def add(self, stand_in: Callable[[], Any]) -> int:
        """The number of another kind of run."""
        self._stand_ins.append(stand_in)
        return len(self._stand_ins)

    def reach(self, number: int) -> None:
        """Comes before each run. It returns when this one is next."""
        assert self._inside, "weights are gathered inside of together() only"
        if not self._standing_in:
            while (first := self._first_of_all(number)) != number:
                self._stand_in(first)

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which makes as many runs as it likes.

        All processes call it together. It returns when the work of all has ended. Raises :class:`UserError`
        if one of them has stopped.
        """
        self._inside = True
        try:
            result = work()
            while first := self._first_of_all(DONE):
                self._stand_in(first)
        finally:
            self._inside = False
        return result

    def _first_of_all(self, number: int) -> int:
        """The largest number with which a process came here."""
        most = torch.tensor(number, device=self._device)
        collective(lambda: distributed.all_reduce(most, distributed.ReduceOp.MAX, self._group))
        return int(most)

    def _stand_in(self, number: int) -> None:
        self._standing_in = True
        try:
            self._stand_ins[number - 1]()
        finally:
            self._standing_in = False


def units_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder and of the vision tower. FSDP gives modules classes of its own."""
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in UNITS]


class CollectivePasses:
    """Divides the weights of a frozen ``model`` over all processes, in place, and runs it with them.

    A process holds its share of the weights, one or two whole layers, and during :meth:`together` also the
    weights outside of layers (``lm_head``, norms, mergers). Embeddings that ``lm_head`` does not share are
    gathered like a layer. The model may have been loaded on the CPU; the shares are moved to ``device``.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model.requires_grad_(False).eval(), device
        inner: Any = model
        decoder, embedding = inner.model.language_model, inner.model.language_model.embed_tokens
        whole: list[nn.Module] = [] if embedding.weight is inner.lm_head.weight else [embedding]
        mesh = _mesh_of(device)
        _divide([*units_of(model), *whole, model], mesh)
        self._agreement = Agreement(mesh, device)
        for part, smallest in (
            *((embedding, self._one_token) for embedding in whole),
            (inner.model.visual, self._one_frame_pair),
            (decoder, self._one_state),
        ):
            number = self._agreement.add(functools.partial(smallest, part))
            before_each_run(part, functools.partial(self._agreement.reach, number))

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, in which this process runs the model as often as it likes.

        All processes call it together. It returns when the work of all has ended. Raises :class:`UserError`
        if one of them has stopped.
        """
        results: list[T] = []

        def run() -> None:
            results.append(self._agreement.together(work))

        with torch.no_grad():
            call_through(self._model, self._model, run)
        return results[0]

    def _one_token(self, embedding: nn.Module) -> None:
        embedding(torch.zeros(1, 1, dtype=torch.long, device=self._device))

    def _one_frame_pair(self, tower: Any) -> None:
        vision = tower.config
        side, dtype = vision.spatial_merge_size, tower.pos_embed.weight.dtype
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]], device=self._device)
        tower(torch.zeros(side**2, pixels, dtype=dtype, device=self._device), grid_thw=grid)

    def _one_state(self, decoder: Any) -> None:
        state_11D = torch.zeros(
            1, 1, decoder.config.hidden_size, dtype=decoder.norm.weight.dtype, device=self._device
        )
        positions = torch.zeros(3, 1, 1, dtype=torch.long, device=self._device)
        decoder(inputs_embeds=state_11D, position_ids=positions, use_cache=False)


def before_each_run(part: nn.Module, do: Callable[[], None]) -> None:
    """Calls ``do`` before each forward of ``part``, and before what FSDP does there."""

    def hook(*_: Any) -> None:
        do()

    part.register_forward_pre_hook(hook, prepend=True)


def _mesh_of(device: torch.device) -> DeviceMesh:
    """All processes. Those that gloo connects exchange the weights of GPUs through NCCL."""
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cuda" and distributed.get_backend() == "gloo":
        torch.cuda.set_device(device)
        return DeviceMesh.from_group(_nccl_group(), device.type)
    return init_device_mesh(device.type, (distributed.get_world_size(),))


@functools.cache
def _nccl_group() -> distributed.ProcessGroup:
    group = distributed.new_group(backend="nccl")
    assert isinstance(group, distributed.ProcessGroup), "every process is in it"
    return group


def _divide(modules: list[nn.Module], mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard

    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
