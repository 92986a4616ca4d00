"""The core of low-rank updates: sums, truncations and merges of ``scale B A`` that never form ``dW [out, in]``.

With ``B = Q R`` and ``A^T = P T`` (QR decompositions, Q and P with orthonormal columns),

    dW = Q (scale R T^T) P^T

so that all there is to know of dW lies in the core ``scale R T^T [r, r]``: its singular values, its norm, and what a
merge does to it (core space, arXiv 2509.17786). Several updates have a core each in the joint bases of all of them.

Everything is computed in fp64 and rounded once to fp32. The leading dimensions of a stack (experts, the groups of a
convolution) are carried along, each matrix for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Of the energy of an update: what lies below is the rounding of fp32 factors, not a direction that was learned.
_NOTHING = 2.0**-46


class Factors(NamedTuple):
    """``scale B A``: ``A [..., r, in]`` and ``B [..., out, r]`` in fp32."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def padded(self, r: int) -> Factors:
        """The same update at a rank of at least r, by zeros."""
        more = max(0, r - self.rank)
        return Factors(pad(self.A, (0, 0, 0, more)), pad(self.B, (0, more)), self.scale)

    def placed(self, rows: tuple[int, int], out: int) -> Factors:
        """The update of a slice of output rows as one of the whole matrix ``[out, in]``, zero elsewhere."""
        return Factors(self.A, pad(self.B, (0, 0, rows[0], out - rows[1])), self.scale)


class Spectrum(NamedTuple):
    """``dW = U S V^T``: ``U [..., out, k]`` and ``V [..., in, k]`` orthonormal, ``S [..., k]`` falling, in fp64."""

    U: Tensor
    S: Tensor
    V: Tensor

    def rank_for(self, energy: float) -> int:
        """The smallest rank, at least 1, that keeps this share of the squared norm of every matrix of a stack."""
        tails = self.S.square().flip(-1).cumsum(-1).flip(-1)
        allowed = tails[..., :1] * max(1 - energy, _NOTHING)
        return max(1, int((tails > allowed).sum(-1).max()))

    def cut(self, r: int | None = None) -> Factors:
        """The best approximation of rank r (Eckart, Young) at scale 1, each size shared by the two factors; or all."""
        root = self.S[..., :r].sqrt()
        B, A = self.U[..., :r] * root[..., None, :], (self.V[..., :r] * root[..., None, :]).mT
        return Factors(A.float().contiguous(), B.float().contiguous())


def stacked(terms: Sequence[Factors], scale: float | None = None) -> Factors:
    """The sum of updates, exactly, as one whose rank is the sum of theirs.

    Factors of terms that have the sum's scale (default: the largest) are taken over to the bit, so are those whose
    scale is plus or minus a power of two times it; of the others, B is rounded once.
    """
    if scale is None:
        scale = max(abs(term.scale) for term in terms)
    B = [term.B if term.scale == scale else (term.B.double() * (term.scale / scale)).float() for term in terms]
    return Factors(torch.cat([term.A for term in terms], -2), torch.cat(B, -1), scale)


def inner(a: Factors, b: Factors) -> float:
    """``<dW_a, dW_b>``, the sum of the products of their elements, from two products of ``[r_a, r_b]``."""
    left, right = a.B.double().mT @ b.B.double(), a.A.double() @ b.A.double().mT
    return a.scale * b.scale * float((left * right).sum())


def spectrum(term: Factors) -> Spectrum:
    """The singular value decomposition of an update; as many values as its rank, or as its smaller side."""
    Q, P, (core,) = _cores([term])
    return _spectrum(Q, core, P)


def ties(terms: Sequence[Factors], density: float) -> Spectrum:
    """TIES (arXiv 2306.01708) on the cores of several updates, in the singular bases that they have in common.

    The bases are the left singular vectors of all dW side by side and the right ones of all dW on top of each other:
    they depend on the updates alone and not on how each is divided into B and A.
    """
    Q, P, cores = _cores(terms)
    left = torch.linalg.svd(torch.cat(cores, -1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat(cores, -2), full_matrices=False)[2].mT
    merged = elected(torch.stack([left.mT @ core @ right for core in cores]), density)
    return _spectrum(Q @ left, merged, P @ right)


def elected(cores: Tensor, density: float) -> Tensor:
    """Trim, elect sign and disjoint mean (arXiv 2306.01708, section 3) over the first dimension: [n, ..., i, j].

    Of each matrix the share `density` that is largest in size stays; of each element the mean over those that have the
    sign of their sum.
    """
    flat = cores.flatten(-2)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept.scatter_(-1, flat.abs().topk(max(1, int(density * flat.shape[-1]))).indices, True)
    trimmed = (flat * kept).unflatten(-1, cores.shape[-2:])
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agrees = trimmed.sign() == sign
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def dare(term: Factors, density: float, generator: torch.Generator) -> Spectrum:
    """DARE (arXiv 2311.03099) on the core: elements dropped with probability ``1 - density``, the rest divided by it.

    In a random rotation of the core, so that no single element carries the update as it would between singular
    vectors. The expectation is the update, the expected squared error ``(1 / density - 1) |dW|^2``, both as on dW.
    """
    Q, P, (core,) = _cores([term])
    left, right = (_rotation(core, size, generator) for size in core.shape[-2:])
    turned = left.mT @ core @ right
    keep = torch.rand(turned.shape, generator=generator, dtype=turned.dtype) < density
    return _spectrum(Q @ left, turned * keep / density, P @ right)


def _cores(terms: Sequence[Factors]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Bases ``Q [..., out, m]`` and ``P [..., in, n]`` of all terms, and each term's core ``[..., m, n]`` in them."""
    Q, R = torch.linalg.qr(torch.cat([term.B.double() for term in terms], -1))
    P, T = torch.linalg.qr(torch.cat([term.A.double() for term in terms], -2).mT)
    sizes = [term.rank for term in terms]
    pairs = zip(terms, R.split(sizes, -1), T.split(sizes, -1), strict=True)
    return Q, P, [term.scale * (r @ t.mT) for term, r, t in pairs]


def _spectrum(Q: Tensor, core: Tensor, P: Tensor) -> Spectrum:
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return Spectrum(Q @ U, S, P @ Vh.mT)


def _rotation(core: Tensor, size: int, generator: torch.Generator) -> Tensor:
    shape = (*core.shape[:-2], size, size)
    Q, R = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=core.dtype))
    return (
        Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    )  # uniform over all rotations (Mezzadri, math-ph/0609050)
