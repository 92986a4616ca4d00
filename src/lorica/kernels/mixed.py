"""Many adapters in one batch, without gradients: ``y_t += s_a B_a A_a x_t`` where token t belongs to adapter a.

Three ways for three shapes of a batch, each exact: an adapter takes its own rank, nothing is padded.

    segment   neighbouring tokens of one adapter: two products on slices, in place (prefill, one popular adapter)
    stacked   one token for each of several adapters of one shape: two batched products (decode)
    masked    any mix at once: all adapters' rows on top of each other, two plain products with a mask between them;
              more arithmetic, but always the same three calls, as a GPU wants it and a CUDA graph can hold

Factors are ``A [r, in]`` and ``B [r, out]`` with the scale folded into B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(y: Tensor, x: Tensor, owners: Sequence[int], A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
    """Token by token: ``x [T, in]``, ``y [T, out]``; `owners` has an adapter's place for each token, -1 for none."""
    rows = [y[t] + (x[t] @ A[a].T) @ B[a] if a >= 0 else y[t] for t, a in enumerate(owners)]
    return torch.stack(rows)


def segment(y: Tensor, s: Tensor, B: Tensor) -> None:
    """``y += s B`` in place for ``s = x A^T [n, r]``, y a slice of the output."""
    y.addmm_(s, B)


def gained(y: Tensor, gain: Tensor, bias: Tensor | None) -> None:
    """``y = gain (y - b) + b`` in place: DoRA's gain on the base's output, ``[out]`` or one per row, ``[n, out]``."""
    if bias is not None:
        y.sub_(bias)
    y.mul_(gain)
    if bias is not None:
        y.add_(bias)


def stacked_down(x: Tensor, A: Tensor) -> Tensor:
    """``s [n, 1, r]`` for ``x [n, in]`` and one ``A [r, in]`` per token, ``[n, r, in]``."""
    return torch.bmm(x.unsqueeze(1), A.transpose(1, 2))


def stacked_up(y: Tensor, s: Tensor, B: Tensor) -> None:
    """``y += s B`` in place for ``y [n, out]``, ``s [n, 1, r]`` and one B per token, ``[n, r, out]``."""
    y.unsqueeze(1).baddbmm_(s, B)


def masked(y: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> None:
    """``y += (x A^T * mask) B`` in place for the rows of all adapters, ``A [R, in]`` and ``B [R, out]``.

    ``mask [T, R]`` is 1 where a row belongs to a token's adapter, else 0. Another number scales the adapter.
    """
    y.addmm_(torch.mm(x, A.T).mul_(mask), B)


def mask_of(owners: Sequence[int], ranks: Sequence[int], like: Tensor) -> Tensor:
    """The mask of `masked` for adapters of these ranks, their rows in order."""
    rows = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    return (torch.tensor(owners)[:, None] == rows).to(like)
