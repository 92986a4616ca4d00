"""A few rows times a large matrix, which is what a step that decodes several requests is made of.

A BLAS shares a product among the cores by the rows of its first matrix. Of ``x W^T`` those are few, so here it is asked
for ``W x^T``: from 2 to 8 rows that takes half the time, whatever the number of cores, and from 16 to 64 rows up to a
fifth less on two of them, turning the small result back included.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels.trial import pays


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for x ``[n, in]`` and W ``[out, in]``."""
    y = torch.mm(W, x.T).T.contiguous()
    if bias is not None:
        y += bias
    return y


def most(W: Tensor) -> int:
    """Up to how many rows `linear` is the faster way for this matrix on this machine; 0 if it never is."""
    fits = W.is_cpu and W.dtype == torch.float32 and W.is_contiguous() and W.numel() >= 1 << 16
    return _most(torch.get_num_threads()) if fits else 0


@functools.cache
def _most(threads: int) -> int:
    """Measured once for a number of threads, on matrices that are not in a core's cache: 0.1 to 0.5 s."""
    matrices = [torch.randn(1024, 768) for _ in range(8)]
    return next((rows for rows in (64, 32, 16, 8, 4) if _faster(torch.randn(rows, 768), matrices)), 0)


@torch.inference_mode()
def _faster(x: Tensor, matrices: list[Tensor], gain: float = 1.05) -> bool:
    return pays(lambda: [F.linear(x, W) for W in matrices], lambda: [linear(x, W) for W in matrices], gain)
