"""The share of weights that a step changed, measured on a fixed random subset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.tensor import DTensor

SUBSET = 100_000


class WeightProbe:
    """Reads the same ``size`` weights before and after a step.

    ``seed`` draws their positions once, uniformly over all trained weights. All are read if the model has no
    more than ``size``. Each process reads its own shards of a sharded model.
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
        """(weights that changed as they are held, weights that changed in bfloat16, weights read)."""
        now = self.read()
        as_held = int((now != before).sum())
        as_bf16 = int((now.bfloat16() != before.bfloat16()).sum())
        return as_held, as_bf16, len(now)
