"""Frozen models that do not fit whole beside what is trained: divided over processes, or on the CPU.

A *pass* is one run of prompts or responses through all decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from video_opd.models.interfaces import Responses
from video_opd.models.modes import call_through
from video_opd.models.policy import HFPolicy
from video_opd.models.prefix import Prefix
from video_opd.models.prompt_batch import shortest_prompt
from video_opd.models.teachers import LocalTeacher, Nonfinite
from video_opd.types import EncodedPrompt, TokenLogprobs

# FSDP gathers these modules one at a time.
UNITS = (
    *("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
    *("Qwen3VLMoeTextDecoderLayer", "Qwen3VLMoeVisionBlock"),
)


def units_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder and of the vision tower."""
    return [module for module in model.modules() if type(module).__name__ in UNITS]


class ShardedTeacher(LocalTeacher):
    """A teacher whose weights are divided over all processes.

    Each layer is gathered when its forward begins and freed when it has ended, so a process holds its share
    of the weights and one or two whole layers. Embeddings that ``lm_head`` does not share are gathered in the
    same way. The other weights (``lm_head``, norms, mergers) are whole during a call.

    All processes gather a layer at the same time. So they all call :meth:`logprobs` or
    :meth:`attend` equally often, and each call begins by agreeing on the number of passes: prompts on one
    video need one more than others, and responses of a single token one fewer. A process makes up for passes
    that it does not need by passes over a single token. ``device`` is the one that the model runs on;
    ``policy`` may have been loaded on the CPU.
    """

    def __init__(self, policy: HFPolicy, *, device: torch.device, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(policy, nonfinite=nonfinite)
        _shard_frozen(policy.model, device)
        self._device = device

    def prefill(self, prompts: Sequence[EncodedPrompt]) -> Prefix:
        raise NotImplementedError("the passes of a prefill alone are not agreed on")

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt] | Prefix,
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Teacher.logprobs`; all processes call it together."""
        assert not isinstance(prompts, Prefix), "a prefix was prefilled without the others"

        def score() -> TokenLogprobs:
            return super(ShardedTeacher, self).logprobs(
                prompts, responses, full=full, temperature=temperature
            )

        needed = self.policy.passes_needed(prompts, responses)
        return self._together(score, self._most(needed) - needed)

    def attend(self) -> None:
        """Takes part in a call of :meth:`logprobs`, with a row that nobody asked for."""
        most = self._most(0)
        if most == 0:  # nobody has a prompt
            return
        prompts = [shortest_prompt(self.policy.model)]
        eos = min(self.policy.vocabulary.eos_ids)
        responses = [[(eos,) * min(2, most)]]
        more = most - self.policy.passes_needed(prompts, responses)
        self._together(lambda: self.policy.logprobs(prompts, responses), more)

    def _most(self, passes: int) -> int:
        """The largest number of passes that any process needs."""
        most = torch.tensor(passes, device=self._device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return int(most)

    def _together(self, score: Callable[[], Any], more: int) -> Any:
        """The result of ``score``, which is followed by ``more`` passes, inside one forward of the root."""
        results: list[Any] = []

        def run() -> None:
            results.append(score())
            for _ in range(more):
                self.policy.passes.over_one_token()

        with torch.no_grad():
            call_through(self.policy.model, self.policy.model, run)
        return results[0]


class OffloadedTeacher(LocalTeacher):
    """A teacher whose weights are on the CPU, and copied to ``device`` for its turn.

    A call of :meth:`logprobs` is a turn, or all calls inside :meth:`turn` are one. ``policy`` was loaded on
    the CPU; on a machine with CUDA its weights are moved to pinned memory, from which copies are faster.
    """

    def __init__(self, policy: HFPolicy, *, device: torch.device, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(policy, nonfinite=nonfinite)
        self._device, self._present = device, False
        self._at_home: list[tuple[nn.Parameter, torch.Tensor]] = []
        for parameter in policy.model.parameters():
            if device.type == "cuda":
                parameter.data = parameter.data.pin_memory()
            self._at_home.append((parameter, parameter.data))
        for module in policy.model.modules():  # rotary frequencies: small, and they stay
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside, the weights are on the device."""
        if self._present:
            yield
            return
        for parameter, weight in self._at_home:
            parameter.data = weight.to(self._device, copy=True, non_blocking=True)
        self._present = True
        try:
            yield
        finally:
            self._present = False
            for parameter, weight in self._at_home:
                parameter.data = weight

    def prefill(self, prompts: Sequence[EncodedPrompt]) -> Prefix:
        with self.turn():
            return super().prefill(prompts)

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt] | Prefix,
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Teacher.logprobs`."""
        with self.turn():
            return super().logprobs(prompts, responses, full=full, temperature=temperature)


def _shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Divides weights that nobody trains over all processes, in place, and moves the shards to ``device``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner: Any = model
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    units = units_of(model)
    embedding = inner.model.language_model.embed_tokens
    if embedding.weight is not inner.lm_head.weight:
        units.append(embedding)
    for module in (*units, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
