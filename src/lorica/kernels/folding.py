"""A low-rank update added to a weight, in as few passes over memory as that takes: a task switch is little else."""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 1 << 20  # summed at once where they have to be fp32 for a moment: they stay in the cache


@torch.no_grad()
def added(W: Tensor, A: Tensor, B: Tensor, scale: float, out: Tensor) -> Tensor:
    """``W + scale B A  [out, in]``, summed in fp32 and rounded once into `out`, which has the dtype of W."""
    A, B = (factor.to(W.device, torch.float32) for factor in (A, B))
    if W.dtype == torch.float32:
        return torch.addmm(W, B, A, alpha=scale, out=out)
    rows = max(1, _ELEMENTS // W.shape[1])
    sums = torch.empty(min(rows, len(W)), W.shape[1], dtype=torch.float32, device=W.device)
    for stored, b, into in zip(W.split(rows), B.split(rows), out.split(rows), strict=True):
        into.copy_(sums[: len(b)].copy_(stored).addmm_(b, A, alpha=scale))
    return out
