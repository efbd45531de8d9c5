"""Seeds that depend on what is drawn, never on when: the same in any order, batch, process or resume."""

from __future__ import annotations

import hashlib
import json


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶³) from the run's seed, a purpose, and whatever else names the draw.

    Example: ``derive_seed(0, "predict", "sample-17", 2)`` is the third answer to a sample.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_uniform(*parts: int | str) -> float:
    """A number in (0, 1), uniform over the draws that different parts name."""
    return ((derive_seed(*parts) >> 10) + 0.5) / (1 << 53)
