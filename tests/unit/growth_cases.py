"""Whether work grows with the size of its input, or with its square. No limit in seconds: machines differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TIMES_LARGER = 16  # linear work takes 16 times as long on the larger input, quadratic work 256 times
BOUND = 32
ATTEMPTS = 5  # what disturbs a measurement passes; a square stays


def is_linear(make: Callable[[int], T], work: Callable[[T], object], size: int) -> bool:
    """Compares ``work`` on ``make(size)`` with that on an input 16 times as large."""
    small, large = make(size), make(TIMES_LARGER * size)
    shortest = min(_seconds(work, small) for _ in range(3))
    return any(_seconds(work, large) <= BOUND * shortest for _ in range(ATTEMPTS))


def _seconds(work: Callable[[T], object], value: T) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    work(value)
    return time.process_time() - start
