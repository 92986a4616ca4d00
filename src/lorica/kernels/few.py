"""A few rows times a large matrix, which is what a step that decodes many requests is made of.

torch gives fp32 products to MKL. oneDNN, which torch has too, takes the matrix as it lies in memory, and is up to twice
as fast for a few rows on some CPUs (no faster on others, nor for one row or for many).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels.trial import pays

MOST = 48  # rows


def linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` by oneDNN: x ``[..., in]``, W ``[out, in]``, both fp32 on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, W, bias, "none", [], "")


def fits(W: Tensor) -> bool:
    """Whether `linear` is for this matrix, and faster on this CPU."""
    return W.is_cpu and W.dtype == torch.float32 and W.is_contiguous() and W.numel() >= 1 << 16 and _pays()


@functools.cache
def _pays(rows: int = 16, gain: float = 1.1) -> bool:
    """Measured once, on matrices that are not in a core's cache: about 0.2 s."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, matrices = torch.randn(rows, 768), [torch.randn(1024, 768) for _ in range(8)]
    with torch.inference_mode():
        try:
            linear(x, matrices[0])
        except (RuntimeError, NotImplementedError, AttributeError):  # a torch without it
            return False
        return pays(lambda: [F.linear(x, W) for W in matrices], lambda: [linear(x, W) for W in matrices], gain)
