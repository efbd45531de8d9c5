"""Seconds and peak memory of the stages of a step, each for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from video_opd.bench.timing import settle
from video_opd.bench.work import Steps


class StageWatch:
    """Takes the place of a stepper's :class:`~video_opd.training.stopwatch.Stopwatch`.

    A stage within another one is counted for itself alone: between two borders everything belongs to the
    innermost stage. ``peaks`` are bytes allocated on the GPU at most, the models among them; empty on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []
        self._since_s = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._border()
        self._open.append(name)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as a stage of its own."""

        @wraps(function)
        def staged(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **named)

        return staged

    def _border(self) -> None:
        settle(self.device)
        now_s = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now_s - self._since_s
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peaks[name] = max(self.peaks.get(name, 0), peak)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._since_s = now_s


def watched(steps: Steps, device: torch.device) -> StageWatch:
    """A watch on the steps that follow: the loop's own stages, and within "update" those of the backward and
    the optimiser."""
    watch = StageWatch(device)
    stepper: Any = steps.stepper
    stepper.watch = watch
    stepper.accelerator.backward = watch.within("backward", stepper.accelerator.backward)
    optimizer: Any = stepper.components.optimizer
    optimizer.step = watch.within("optimiser", optimizer.step)
    return watch
