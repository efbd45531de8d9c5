"""The Muon optimiser in float32. ``torch.optim.Muon`` computes in bf16, which a CPU only emulates."""

from __future__ import annotations

from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. Matrices of one shape are orthogonalised together, in float32."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(tuple(p.shape), []).append((p, p.grad.lerp(buffer, group["momentum"])))
            for shape, members in shapes.items():
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                updates = orthogonalise(torch.stack([u for _, u in members]))
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximates the nearest semi-orthogonal matrices by Newton–Schulz iteration: [N, rows, columns]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
