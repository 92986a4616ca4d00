"""How far an update goes: the scale of ``s B A`` and the rates of A and B, which are one thing.

Under Adam every element of a factor moves by about its rate, so that the first update changes the weight by about

    s sqrt(lr_B^2 out |A|^2 + lr_A^2 in |B|^2)          (Frobenius; the two parts are orthogonal on average)

and only that product counts: a larger alpha, a larger start of A and a larger rate of B are the same first update.
rsLoRA (arXiv 2312.03732) keeps s from shrinking as r grows; LoRA+ (arXiv 2402.12354) lets B learn faster than A; a
start from singular vectors (`spectral`) has large factors. `correction` says by how much each of them changes the
first update, so that a rate which suits the plain start suits them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, r: alpha / r,
    "alpha/sqrt(r)": lambda alpha, r: alpha / math.sqrt(r),
}


class Start(NamedTuple):
    """Where one matrix starts: factors ``A [r, in]``, ``B [out, r]`` and the scale of their product."""

    A: Tensor
    B: Tensor
    scale: float


def rate_factor(name: str, lr_ratio: float) -> float:
    """What multiplies the learning rate of a tensor: LoRA+'s ratio for a B, 1 for all else.

    Args:
        name: canonical, as in `patch.trainable`.
    """
    return lr_ratio if "#" in name and name.endswith(".B") else 1.0


def correction(starts: Iterable[Start], lr_ratio: float = 1.0) -> float:
    """What a rate that suits LoRA's own start is multiplied by for the first update to be as large as there.

    There B is zero and A as `nn.Linear` draws it, ``|A|^2 = r / 3``.

    Args:
        starts: of the matrices that start elsewhere; without any, only the ratio counts.
    """
    starts = list(starts)
    if not starts:
        return 1 / lr_ratio
    plain = ours = 0.0
    for A, B, scale in starts:
        *stack, r, into = A.shape
        out = B.shape[-2]
        plain += scale**2 * math.prod(stack) * out * r / 3
        ours += scale**2 * (lr_ratio**2 * out * A.square().sum().item() + into * B.square().sum().item())
    return math.sqrt(plain / ours)
