"""Starts at singular vectors that leave the base as it is: ``y + s (B A - B0 A0) x``, where A = A0 and B = B0 at first.

| init     | A0 and B0 are of                            | after                                                    |
|----------|---------------------------------------------|----------------------------------------------------------|
| pissa    | W itself, the largest triplets              | PiSSA (arXiv 2404.02948)                                 |
| gradient | dL/dW over some rows, the largest triplets  | LoRA-GA (arXiv 2407.05000), LoRA-One (arXiv 2502.01235)  |

Both papers subtract ``B0 A0`` from the base. Here it is a constant part of the patch, so that the base stays what it is
for everyone else, and step zero is the base but for the rounding of the difference. A file holds ``[B, -B0]`` and
``[A; A0]``, an ordinary LoRA of twice the rank on the untouched base.

Only the span of a start matters, since its product is taken away again; its size is a learning rate (`geometry`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorica import weights
from lorica.targets import Target

SPECTRAL = ("pissa", "gradient")


def best_factors(D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]`` in fp32 of which ``B A`` is the best approximation of ``D [out, in]``.

    As the singular value decomposition gives it (Eckart, Young), each rank's size shared between the factors; but from
    the eigenvectors of the smaller Gram matrix, at a third of the cost. r is at most the smaller side of D, which may
    be a stack.
    """
    D = D.float()
    if D.shape[-2] < D.shape[-1]:
        B, A = best_factors(D.mT, r)
        return A.mT, B.mT
    V = torch.linalg.eigh(D.mT @ D).eigenvectors[..., -r:].flip(-1)
    U = D @ V
    root = U.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(U.dtype).tiny).sqrt()
    return (V * root).mT, U / root


def principal(layer: nn.Module, target: Target, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A and B of which ``scale B A`` is the best approximation of a target's matrix."""
    W = weights.storage_of(layer).read(layer, target.part)
    W = W[slice(*target.rows)] if target.rows else W
    return best_factors(W / scale, r)


def equally_far(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]`` from orthonormal ``U [out, r]`` and ``V [r, in]``.

    Rows of A are as long as those that LoRA draws, and B so long that both move the weight equally far (`geometry`).
    """
    return V / math.sqrt(3), U * math.sqrt(U.shape[-2] / (3 * V.shape[-1]))


def unfit(target: Target, r: int) -> str | None:
    """Why a target cannot start at singular vectors; None if it can."""
    if target.storage == "conv" and target.sizes[0] > 1:
        return "a convolution in groups has no matrix whose singular vectors it could start at"
    out = target.rows[1] - target.rows[0] if target.rows else target.shape[0]
    if r > (most := min(out, target.shape[1])):
        return f"the rank is {r}, and it has {most} singular vectors"
    return None
