"""Whether work grows with the size of its input, or with its square. No limit in seconds: machines differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TIMES_LARGER = 8  # linear work takes 8 times as long on the larger input, quadratic work 64 times
BOUND = 24
ATTEMPTS = 5  # what disturbs a measurement passes; a square stays


def is_linear(make: Callable[[int], T], work: Callable[[T], object], size: int) -> bool:
    """Compares ``work`` on ``make(size)`` with that on an input eight times as large."""
    small, large = make(size), make(TIMES_LARGER * size)
    return any(_shortest(work, large) <= BOUND * _shortest(work, small) for _ in range(ATTEMPTS))


def _shortest(work: Callable[[T], object], value: T) -> float:
    """Seconds of processor time, the least of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        work(value)
        found.append(time.process_time() - start)
    return min(found)
