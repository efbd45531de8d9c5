"""Did the update arrive? The share of weights that a step changed, on a fixed random subset of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

SUBSET = 100_000


class WeightProbe:
    """Reads the same ``size`` weights before and after a step.

    The positions are drawn once, uniformly over all trainable weights, from ``seed``; of a model with no more
    than ``size`` weights, every one is read. Of weights in shards, each process has its own.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], seed: int, size: int = SUBSET) -> None:
        self.weights = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        ends = np.cumsum([weight.numel() for weight in self.weights])
        total = int(ends[-1])
        positions = np.arange(total)
        if total > size:
            positions = np.sort(np.random.Generator(np.random.Philox(seed)).integers(total, size=size))
        owner = np.searchsorted(ends, positions, side="right")
        starts = ends - [weight.numel() for weight in self.weights]
        self.picks = [
            (i, torch.from_numpy(positions[owner == i] - starts[i]).to(self.weights[i].device))
            for i in np.unique(owner).tolist()
        ]

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        return torch.cat([self.weights[i].detach().flatten()[where].cpu() for i, where in self.picks])

    def changed(self, before: torch.Tensor) -> tuple[int, int, int]:
        """How many of the subset differ now: as they are held, and as rounded to bfloat16; how many there
        are."""
        now = self.read()
        as_held = int((now != before).sum())
        as_bf16 = int((now.bfloat16() != before.bfloat16()).sum())
        return as_held, as_bf16, len(now)
