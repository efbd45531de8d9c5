"""The seconds that a step spends in each of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Stopwatch:
    """Adds up the seconds of each stage on this process. ``settle`` waits for a device's queued work."""

    settle: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.settle()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.settle()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self, stages: Sequence[str]) -> dict[str, float]:
        """``time/<stage>_s`` for each stage; the next stages start at 0."""
        row = {f"time/{name}_s": self.seconds.pop(name, 0.0) for name in stages}
        assert not self.seconds, f"a stage without a metric: {list(self.seconds)}"
        return row
