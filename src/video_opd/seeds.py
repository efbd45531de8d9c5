"""Seeds that depend on the name of a draw alone, so that order, batch, process and resume do not matter."""

from __future__ import annotations

import hashlib
import json

LARGEST_SEED = 2**32 - 1  # of a run: numpy's generator takes none that is larger, or below 0


def derive_seed(*name: int | str) -> int:
    """A seed in [0, 2⁶³) from the run's seed, a purpose, and whatever else names the draw.

    Example: ``derive_seed(0, "predict", "sample-17", 2)`` is the seed of the third response to a sample.
    """
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_uniform(*name: int | str) -> float:
    """A number in (0, 1); over different names it is uniform."""
    return ((derive_seed(*name) >> 10) + 0.5) / (1 << 53)
