"""A low-rank update added to a weight, in as few passes over memory as that takes: a task switch is little else."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 19  # summed at once where they have to be fp32 for a moment: they stay in the cache


class Sums:
    """Sums of weights and updates, one after the other through the same little memory.

    New memory for each weight would cost more than its sum: the kernel hands out pages one fault at a time.
    """

    def __init__(self) -> None:
        self._wide: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def into(self, out: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """``W + scale B A  [rows, columns]``, summed in fp32 and rounded once into `out`, which has the dtype of W."""
        A, B = (factor.to(W.device, torch.float32) for factor in (A, B))
        if W.dtype == torch.float32:
            return torch.addmm(W, B, A, alpha=scale, out=out)
        columns = W.shape[1]
        rows = max(1, _ELEMENTS // columns)
        sums = self._room(W.device, rows * columns).view(rows, columns)
        for stored, b, into in zip(W.split(rows), B.split(rows), out.split(rows), strict=True):
            into.copy_(sums[: len(b)].copy_(stored).addmm_(b, A, alpha=scale))
        return out

    def _room(self, device: torch.device, elements: int) -> Tensor:
        if device not in self._wide or len(self._wide[device]) < elements:
            self._wide[device] = torch.empty(max(elements, _ELEMENTS), device=device)
        return self._wide[device][:elements]
