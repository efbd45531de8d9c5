"""Decoding by a CUDA graph: the forward of one token is recorded once, and repeated for the tokens after it.

One token of a few responses is little work for a GPU, but thousands of kernels, and the host takes longer to
launch each of them than the kernel itself. A CUDA graph launches all of them at once. It repeats the same
kernels on the same memory, so whatever differs between two tokens lies in tensors: the tokens, how many there
were before, and keys and values of a fixed length (:class:`~video_opd.models.kv_cache.FixedLayer`).

The numbers are those of :class:`~video_opd.models.decoding.PrefixDecoder`, but for the order of sums in the
attention.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from video_opd.models.prefix import Prefix

if TYPE_CHECKING:
    from video_opd.models.forward_passes import ForwardPasses

logger = logging.getLogger(__name__)

WORTH_RECORDING = 4  # tokens of a response at most: recording takes as long as about two


class CapturedDecoder:
    """A :class:`~video_opd.models.decoding.Decoder` on a cache of its own, which starts as ``prefix``.

    The first token warms up (libraries choose their kernels), the second is recorded, and all that follow are
    repetitions. Where responses outgrow the cache (``CACHE_ROOM`` tokens), it is lengthened, and a token is
    recorded anew. If the recording fails, or memory does not suffice for it, each token is computed on its
    own.
    """

    def __init__(self, passes: ForwardPasses, prefix: Prefix, n: int) -> None:
        assert passes.side_by_side, "responses to a prompt have one row"
        self.passes, self.width = passes, n
        self.prefix = prefix.repeated([1] * len(prefix))
        device = prefix.next_position_B.device
        self.ids_BG = torch.zeros(len(prefix), n, dtype=torch.long, device=device)
        self.done = torch.zeros((), dtype=torch.long, device=device)  # tokens of each response in the cache
        self.columns_G = torch.zeros(n, dtype=torch.long, device=device)
        self.written = self.room = 0  # tokens of each response: in the cache, and those it has columns for
        self._replay: Callable[[], torch.Tensor] | None = None
        self._warm = self._full = False

    def first(self) -> torch.Tensor:
        return self.prefix.last_hidden_BD.repeat_interleave(self.width, 0)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        if self.written == self.room:
            self._lengthen()
        self.ids_BG.copy_(token_B.view(-1, self.width))
        if self._replay is None and self._warm and self.passes.capture and not self._full:
            self._record()
        hidden_BGD = self._forward() if self._replay is None else self._replay()
        self._warm = True
        self.written += 1
        return hidden_BGD.flatten(0, 1)

    def _lengthen(self) -> None:
        from video_opd.models.kv_cache import CACHE_ROOM, lengthen

        self._replay, self._warm = None, False
        lengthen(self.prefix.cache, CACHE_ROOM * self.width, self.columns_G)
        self.room += CACHE_ROOM

    def _forward(self) -> torch.Tensor:
        """The hidden states [B, G, D] of ``ids_BG``, and one token more in the cache."""
        prompt = self.prefix.attention_mask_BP.shape[1]
        first = torch.arange(self.width, device=self.done.device) + prompt
        self.columns_G.copy_(first + self.done * self.width)
        mask = self.passes.response_mask(self.prefix, self.width, self.done, 1, self.room)
        hidden_BGD = self.passes.extend(self.prefix, self.ids_BG, mask, self.done, self.width)
        self.done += 1
        return hidden_BGD

    def _record(self) -> None:
        try:
            try:
                self._replay = record(self._forward, self.done.device)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # while it records, torch gives back nothing that it keeps unused
                self._replay = record(self._forward, self.done.device)
        except torch.OutOfMemoryError:
            self._full = True  # other responses may need less
        except RuntimeError as error:
            self.passes.capture = False
            logger.warning(
                "the forward of a token cannot be recorded as a CUDA graph (%s): sampling computes every "
                "token on its own, which is slower",
                str(error).strip().partition("\n")[0],
            )


def can_capture(model: torch.nn.Module) -> bool:
    """Whether this process alone holds the model, on one GPU, and no recording has failed."""
    weights = list(model.parameters())
    on_gpu = all(weight.is_cuda for weight in weights) and len({weight.device for weight in weights}) == 1
    return on_gpu and not in_shards(model) and not asks_host(model) and not _failed


def asks_host(model: torch.nn.Module) -> bool:
    """Whether a forward asks the GPU for numbers on the way: experts in float32 ask how many tokens each has,
    because grouped products are of 16-bit numbers. That cannot be recorded."""
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    return any(weight.dtype == torch.float32 for weight in experts)


def in_shards(model: torch.nn.Module) -> bool:
    """Whether FSDP2 manages a part of the model, be it whole at the moment: its hooks make other streams wait
    for this one, and a recording ends with an error if they do not come back."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def record(work: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """``work`` on ``device`` as a CUDA graph, which is not run yet: the result runs it, and returns what
    ``work`` did, whose memory the next run overwrites.

    Graphs share a pool of memory: one takes what the last one has left. ``torch.cuda.graph`` would give all
    unused memory back to the GPU first, for every graph.
    """
    with torch.cuda.device(device):
        stream, pool, _ = _kept(device)
        graph, result = _recorded(work, stream, pool)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


# Graphs whose recording failed. The memory allocator may go on asking them, and no other one is recorded.
_failed: list[Any] = []


def _recorded(work: Callable[[], torch.Tensor], stream: Any, pool: Any) -> tuple[Any, torch.Tensor]:
    """(the graph of ``work``, what it will write)."""
    graph: Any = torch.cuda.CUDAGraph()
    # The generator of this GPU is not recorded: a recording that fails would leave it unusable.
    generator: Any = torch.cuda.default_generators[torch.cuda.current_device()]
    usual = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            # Threads that decode videos or look after the teacher may go on meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
    except torch.OutOfMemoryError:
        raise  # the recording has ended as others do
    except RuntimeError:
        _failed.append(graph)
        # Versions of torch whose ``capture_end`` fails leave the allocator recording, in which it gives back
        # nothing for the rest of the process. Others have ended it, and say so.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    finally:
        generator.graphsafe_set_state(usual)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


@functools.cache
def _kept(device: torch.device) -> tuple[Any, Any, Any]:
    """(the stream on which graphs of this device, the current one, are recorded, their pool of memory, a
    graph that keeps it: with the last graph of a pool, the pool would go)."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    keeper, _ = _recorded(lambda: torch.zeros(1, device=device), stream, pool)
    return stream, pool, keeper
