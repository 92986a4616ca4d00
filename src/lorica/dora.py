"""DoRA: ``y = g (W + s B A) x + b``, a magnitude per output beside the direction that B and A turn (arXiv 2402.09353).

    m  [out]    trained; starts at the norms of W, so that step zero is the base model
    g  [out]    m / ||W + s B A||, each row's norm; a constant to the gradient but for m (section 4.3)

The norm is had in two ways. `norms` forms ``W + s B A`` as PEFT does, to the bit; `quick_norms` never does: from

    ||W_i + s B_i A||^2 = ||W_i||^2 + 2 s <W_i A^T, B_i> + s^2 B_i A A^T B_i^T

it needs one product with A and no matrix of W's size, and is within 1e-5 of the other. Both are ||W|| to the bit where
B is zero, since the root of a square is exact, and so is m at the start: g is then exactly 1, and what it changes
exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorica import weights
from lorica.targets import Target


def norms(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``||W_i + scale B_i A||`` of every row ``[out]``, in PEFT's order of operations."""
    return torch.linalg.norm(W + scale * (B @ A), dim=1)


def quick_norms(W: Tensor, of_W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`norms` from those of W ``[out]``, without a matrix of W's size."""
    cross = (W @ A.T * B).sum(1)
    own = (B @ (A @ A.T) * B).sum(1)
    return (of_W * of_W + scale * (2 * cross + scale * own)).clamp_min(0).sqrt()


class Norms:
    """The norms of one layer's rows, those of W kept as long as W stays."""

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.of_W: Tensor | None = None

    @torch.no_grad()
    def __call__(self, layer: nn.Module, A: Tensor, B: Tensor, scale: float, exact: bool) -> Tensor:
        """``||W + scale B A||`` in fp32, by `norms` if `exact`, else by `quick_norms`."""
        storage = weights.storage_of(layer)
        W = storage.read(layer)
        A, B = A.detach().to(W.device), B.detach().to(W.device)
        if exact:
            return norms(W, A, B, scale)
        kept = layer.get_parameter(storage.parameter())
        key = (kept.data_ptr(), kept._version, kept.dtype, kept.device)
        if self.of_W is None or self.key != key:
            self.of_W, self.key = norms(W, A, torch.zeros_like(B), scale), key
        return quick_norms(W, self.of_W, A, B, scale)


def gain(m: Tensor, norms: Tensor) -> Tensor:
    """``m / norms``; of a row that is all zero, which has no direction, it is zero and no 0 / 0."""
    return m / norms.masked_fill(norms == 0, 1.0)


def output(layer: nn.Module, y: Tensor, update: Tensor, g: Tensor, scale: float) -> Tensor:
    """The output of a layer from the base's and ``B A x``, both ``[..., out]``, in PEFT's order of operations.

    Dropout is on the input of A alone. PEFT drops from the base's own product too, for which it makes it twice.
    """
    storage = weights.storage_of(layer)
    g = storage.per_output(layer, g)
    if storage.takes_ids:
        return g * y + g * update * scale
    bias = getattr(layer, "bias", None)
    unbiased = y if bias is None else y - storage.per_output(layer, bias)
    return y + ((g - 1) * unbiased + g * update * scale)


def unfit(target: Target) -> str | None:
    """Why a target cannot have magnitudes; None if it can."""
    if target.storage == "experts":
        return "DoRA of stacked experts is refused (PEFT has none either): leave dora away, or these targets"
    if target.rows:
        return f"DoRA of a slice has no place in PEFT's layout: take the whole layer ({target.path.rpartition('.')[2]})"
    if target.storage == "conv" and target.sizes[0] > 1:
        return "DoRA of a convolution in groups is refused: its update is no weight, so W + B A has no norm"
    return None
