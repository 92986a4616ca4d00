"""Many adapters in one batch, without gradients: ``y_t += s_a B_a A_a x_t`` where token t belongs to adapter a.

Four ways for four shapes of a batch, each exact: an adapter takes its own rank, nothing is padded to another's.

    segment   neighbouring tokens of one adapter: two products on slices, in place (prefill, one popular adapter)
    stacked   one token for each of several adapters of one shape: two batched products (decode)
    ragged    one token for each of several adapters of any ranks: pieces of some rows for the first product, which is
              batched; for the second, a token's rows are a weighted bag, as of an embedding. As many calls as stacked
    masked    any mix at once: all adapters' rows on top of each other, two plain products with a mask between them;
              more arithmetic, but always the same three calls, as a GPU wants it and a CUDA graph can hold

Factors are ``A [r, in]`` and ``B [r, out]`` with the scale folded into B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 8  # rows; where a rank is no multiple of it, the last piece of A has some that nobody reads
_FEW = 64


def reference(y: Tensor, x: Tensor, owners: Sequence[int], A: Sequence[Tensor], B: Sequence[Tensor]) -> Tensor:
    """Token by token: ``x [T, in]``, ``y [T, out]``; `owners` has an adapter's place for each token, -1 for none."""
    rows = [y[t] + (x[t] @ A[a].T) @ B[a] if a >= 0 else y[t] for t, a in enumerate(owners)]
    return torch.stack(rows)


def segment_down(x: Tensor, A: Tensor) -> Tensor:
    """``s = x A^T [n, r]`` for ``x [n, in]``; a few rows by ``A x^T``, as in `kernels.few`."""
    return torch.mm(A, x.T).T if x.is_cpu and 1 < len(x) <= _FEW else F.linear(x, A)


def segment_up(y: Tensor, s: Tensor, B: Tensor) -> None:
    """``y += s B`` in place for ``s [n, r]``, y a slice of the output."""
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


def ragged_down(x: Tensor, A: Tensor, owners: Tensor, rows: Tensor) -> Tensor:
    """``s [L, R]`` of the L layers that read ``x [n, in]``, for ``A [P, L * PIECE, in]``, pieces of all their rows.

    ``owners [P]`` has the token of each piece, ``rows [L, R]`` which of all ``P * L * PIECE`` rows are wanted.
    """
    return torch.bmm(x.index_select(0, owners).unsqueeze(1), A.transpose(1, 2)).take(rows)


def ragged_up(y: Tensor, s: Tensor, B: Tensor, rows: Tensor, starts: Tensor) -> None:
    """``y_t += sum s_i B_rows[i]`` in place, over the i of a token, which begin at ``starts [n]``.

    ``s`` and ``rows`` ``[R]``, ``B [.., out]``.
    """
    y.add_(torch.embedding_bag(B, rows, starts, False, 0, False, s)[0])  # 0: the sum


def masked(y: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> None:
    """``y += (x A^T * mask) B`` in place for the rows of all adapters, ``A [R, in]`` and ``B [R, out]``.

    ``mask [T, R]`` is 1 where a row belongs to a token's adapter, else 0. Another number scales the adapter.
    """
    y.addmm_(torch.mm(x, A.T).mul_(mask), B)


def mask_of(owners: Sequence[int], ranks: Sequence[int], like: Tensor) -> Tensor:
    """The mask of `masked` for adapters of these ranks, their rows in order."""
    rows = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
    return (torch.tensor(owners)[:, None] == rows).to(like)
