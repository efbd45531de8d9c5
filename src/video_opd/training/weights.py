"""Did the update arrive? The share of weights that a step changed, on a fixed random subset of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

SUBSET = 100_000


class WeightProbe:
    """Reads the same ``size`` weights before and after a step.

    The positions are drawn once, uniformly over all trainable weights, from ``seed``; of a model with no more
    than ``size`` weights, every one is read.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], seed: int, size: int = SUBSET) -> None:
        self.parameters = parameters
        ends = np.cumsum([parameter.numel() for parameter in parameters])
        total = int(ends[-1])
        positions = np.arange(total)
        if total > size:
            positions = np.sort(np.random.Generator(np.random.Philox(seed)).integers(total, size=size))
        owner = np.searchsorted(ends, positions, side="right")
        starts = ends - [parameter.numel() for parameter in parameters]
        self.picks = [
            (i, torch.from_numpy(positions[owner == i] - starts[i]).to(parameters[i].device))
            for i in np.unique(owner).tolist()
        ]

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        return torch.cat([self.parameters[i].detach().flatten()[where].cpu() for i, where in self.picks])

    def changed(self, before: torch.Tensor) -> tuple[float, float]:
        """Shares of the subset that differ now: as they are held, and as rounded to bfloat16."""
        now = self.read()
        as_held = (now != before).double().mean().item()
        as_bf16 = (now.bfloat16() != before.bfloat16()).double().mean().item()
        return as_held, as_bf16
