"""`init="gradient"`: the largest singular triplets of dL/dW over some rows, measured through the patches themselves.

A patch whose B is zero changes nothing, and neither does one whose A is, but their gradients are ``dL/dB = s G A^T``
and ``dL/dA = s B^T G`` with ``G = dL/dW``. So each pass over the rows multiplies every G with a few vectors from one
side or the other, and two passes to and fro (subspace iteration) find its largest triplets: without a matrix of W's
size, on any storage, in whatever way the model gives its loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorica import patch
from lorica.data import Example
from lorica.data.pack import micro_tokens, packs
from lorica.evaluate.causal import evaluating
from lorica.lowrank import LowRank
from lorica.spectral import equally_far
from lorica.train.examples import cut, labels_in
from lorica.train.settings import TrainSettings

ROWS = 32
TIMES = 2


def wants(model: nn.Module) -> bool:
    """Whether the active adapter is to start at the gradient's singular vectors."""
    return getattr(patch.installed(model).method, "init", "") == "gradient"


def at_gradient(model: Any, passes: Any, examples: Sequence[Example], settings: TrainSettings) -> None:
    """Let the active adapter of a model start there. The same rows and numbers for the same seed (law 8).

    `passes` are those of the model's task.
    """
    patches = [each for each in patch.installed(model).patches.values() if isinstance(each, LowRank)]
    rows = random.Random(f"{settings.seed}:start").sample(range(len(examples)), min(ROWS, len(examples)))
    batch = [examples[row] for row in sorted(rows)]
    generator = torch.Generator().manual_seed(settings.seed)
    right = [_orthonormal(torch.randn(each.A.shape, generator=generator).to(each.A)) for each in patches]
    with evaluating(model):
        for _ in range(TIMES):
            for each, V in zip(patches, right, strict=True):
                each.start_at(V, torch.zeros_like(each.B))
            left = [_orthonormal(Y.mT).mT for Y in _gradients(model, passes, batch, settings, patches, "B")]
            for each, Q in zip(patches, left, strict=True):
                each.start_at(torch.zeros_like(each.A), Q)
            projected = _gradients(model, passes, batch, settings, patches, "A")
            right = [_orthonormal(Z) for Z in projected]
    for each, Q, Z in zip(patches, left, projected, strict=True):
        P, _, V = torch.linalg.svd(Z, full_matrices=False)
        each.start_at(*equally_far(Q @ P, V))


def _gradients(
    model: Any,
    passes: Any,
    batch: Sequence[Example],
    settings: TrainSettings,
    patches: Sequence[LowRank],
    factor: str,
) -> list[Tensor]:
    """The gradient of one factor of every patch over a batch."""
    device = next(model.parameters()).device
    pieces = (packs if passes.quick else cut)(batch, settings.micro, 1, micro_tokens(device, passes.dtype))
    total = labels_in(batch)
    for places in pieces:
        piece = [batch[place] for place in places]
        with passes(model, piece) as (mean, _):
            (mean * (labels_in(piece) / total)).backward()
    factors = [getattr(each, factor) for each in patches]
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in factors]
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _orthonormal(V: Tensor) -> Tensor:
    """Orthonormal rows that span those of ``V [r, n]``."""
    return torch.linalg.qr(V.mT).Q.mT
