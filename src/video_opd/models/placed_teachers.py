"""Frozen models that do not fit whole beside what is trained: divided over processes, or on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from video_opd.models.collective_passes import CollectivePasses
from video_opd.models.interfaces import Responses
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher, Nonfinite
from video_opd.models.vocabulary import Vocabulary
from video_opd.types import EncodedPrompt, TokenLogprobs

T = TypeVar("T")


class ShardedPolicy(HFPolicy):
    """A frozen policy whose weights are divided over all processes, as :class:`CollectivePasses` does it.

    It is a :class:`~video_opd.models.interfaces.CollectivePolicy`: its other methods are called inside of
    :meth:`together` only, by each process as often as it likes. ``device`` is the one that the model runs on;
    ``model`` may have been loaded on the CPU.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        engine: Literal["prefix", "plain"] = "prefix",
        *,
        device: torch.device,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__(model, processor, engine, vocabulary=vocabulary)
        self._collective = CollectivePasses(model, device)

    def together(self, work: Callable[[], T]) -> T:
        """As :meth:`CollectivePolicy.together`."""
        return self._collective.together(work)


class ShardedTeacher(LocalTeacher):
    """A teacher whose weights are divided over all processes, as :class:`CollectivePasses` does it.

    All processes call :meth:`logprobs` or :meth:`attend` equally often. ``device`` is the one that the model
    runs on; ``policy`` may have been loaded on the CPU.
    """

    def __init__(self, policy: HFPolicy, *, device: torch.device, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(policy, nonfinite=nonfinite)
        self._passes = CollectivePasses(policy.model, device)

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Teacher.logprobs`; all processes call it together."""
        score = functools.partial(super().logprobs, prompts, responses, full=full, temperature=temperature)
        return self._passes.together(score)

    def attend(self) -> None:
        """Takes part in a call of :meth:`logprobs`, without prompts of its own."""
        self._passes.together(lambda: None)


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

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Teacher.logprobs`."""
        with self.turn():
            return super().logprobs(prompts, responses, full=full, temperature=temperature)
