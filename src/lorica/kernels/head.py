"""Output head and cross-entropy as one operation on the labelled rows, with its gradient made in the forward pass.

The logits of a few hundred rows at a time are written to one buffer and turned, a few rows at a time in fp32, into the
gradient's factor ``softmax - target``; its product with the head's matrix is all that is kept. Two products per
labelled row instead of three, and no tensor of tokens times vocabulary.

It runs inside the model's own forward, which may be wrapped by others: `bare` lets the head return the hidden rows that
it was given, and the model's `loss_function` then finishes the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lorica.kernels import gpu
from lorica.kernels.precision import mm_columns, mm_rows, on_gpu

BUFFER = 1 << 24  # logits of one product: few rows of any vocabulary fit, and the head's matrix is read seldom
GPU_BUFFER = 1 << 28  # a GPU multiplies faster than it reads that matrix until there are thousands of rows
CACHED = 1 << 19  # logits that a CPU turns into a gradient at a time: 2 MB in fp32 stay in its cache


@dataclass(frozen=True)
class Shape:
    """How hidden rows become logits beyond the matrix: ``cap tanh(scale h W^T / cap)``."""

    scale: float = 1.0
    softcap: float | None = None


class LabelledLoss(torch.autograd.Function):
    """``sum_i weights_i nll_i`` and the ``nll [n]`` of rows ``h [n, width]`` under ``W [vocab, width]``, W frozen.

    `wanted` ``[n]`` are token ids. With label smoothing e the target is ``1 - e`` on the wanted token and ``e`` spread
    over the vocabulary, as in torch's cross-entropy; nll is the smoothed loss then.
    """

    @staticmethod
    def forward(
        ctx, h: Tensor, W: Tensor, b: Tensor | None, wanted: Tensor, weights: Tensor, shape: Shape, smooth: float
    ):
        nll = torch.empty(len(h), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if h.requires_grad else None
        rows = max(1, min(len(h), (GPU_BUFFER if on_gpu(h) else BUFFER) // W.shape[0]))
        at_once = gpu.ready(h) and b is None and shape == Shape() and not smooth
        few = max(1, min(rows, (BUFFER if on_gpu(h) else CACHED) // W.shape[0]))
        buffer = torch.empty(rows, W.shape[0], dtype=h.dtype, device=h.device)
        wide = torch.empty(0 if at_once else few, W.shape[0], dtype=torch.float32, device=h.device)
        # Kept small weights would push the gradient of rare words below fp16's least number.
        most = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        shares = weights / most
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            logits = mm_rows(h[part], W, buffer[: len(h[part])])
            if at_once:
                gpu.softmax_gradient(logits, wanted[part], shares[part], nll[part])
            else:
                each = (found.split(few) for found in (logits, wanted[part], shares[part], nll[part]))
                for now, goal, weight, out in zip(*each, strict=True):
                    now.copy_(_into_gradient(now, wide, b, goal, weight, out, shape, smooth))
            if dh is not None:
                mm_columns(logits, W, dh[part])
        ctx.save_for_backward(*(() if dh is None else (dh, most)))
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx, dloss: Tensor, _):
        dh, most = ctx.saved_tensors
        return dh * (dloss * most).to(dh.dtype), *[None] * 6


def _into_gradient(
    given: Tensor,
    wide: Tensor,
    b: Tensor | None,
    wanted: Tensor,
    weights: Tensor,
    nll: Tensor,
    shape: Shape,
    smooth: float,
) -> Tensor:
    """The gradient of ``sum weights nll`` by products ``h W^T`` of some rows, in `wide`; fills their nll."""
    z = wide[: len(given)].copy_(given)
    at = wanted[:, None]
    if b is not None:
        z.add_(b)
    if shape.scale != 1.0:
        z.mul_(shape.scale)
    slope = None
    if shape.softcap is not None:
        z.div_(shape.softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(shape.softcap)
    torch.log_softmax(z, -1, out=z)
    nll.copy_(z.gather(1, at).squeeze(1).neg_())
    if smooth:
        nll.mul_(1 - smooth).sub_(z.mean(-1), alpha=smooth)
    z.exp_()
    if smooth:
        z.sub_(smooth / z.shape[1])
    z.scatter_add_(1, at, at.new_full(at.shape, smooth - 1, dtype=torch.float32))
    z.mul_(weights[:, None].float() * shape.scale)
    return z if slope is None else z.mul_(slope)


# What a family does to its logits after the head, and where it keeps the number: (holder, attribute, neutral value,
# what it means). It is set to neutral while the head is bare, since hidden rows must come through unchanged.
_AFTER: tuple[tuple[Callable[[nn.Module], object], str, float | None, Callable[[float], Shape]], ...] = (
    (lambda model: model.config, "final_logit_softcapping", None, lambda cap: Shape(softcap=cap)),  # Gemma
    (lambda model: model, "logit_scale", 1.0, lambda scale: Shape(scale=scale)),  # Cohere
    (lambda model: model.config, "logits_scaling", 1.0, lambda scale: Shape(scale=1 / scale)),  # Granite
)


def plain_head(model: Any) -> nn.Linear | None:
    """The output head if its matrix is frozen, dense and unpatched, so that the loss may read it; else None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    return head if getattr(model, "loss_function", None) is ForCausalLMLoss else None


@contextlib.contextmanager
def bare(model: Any, weights: Tensor, smooth: float = 0.0) -> Iterator[list[Tensor]]:
    """Let a causal model's forward end in `LabelledLoss` for the length of a block.

    The model is called with ``logits_to_keep`` = the positions and ``labels`` = the wanted ids ``[1, n]``; its loss is
    ``sum weights nll`` plus what the model adds itself (a router's), and the list that is yielded receives the nll.
    """
    head = plain_head(model)
    assert head is not None
    found: list[Tensor] = []
    held = []
    shape = Shape()
    for holder, name, neutral, means in _AFTER:
        owner = holder(model)
        value = getattr(owner, name, neutral)
        if isinstance(value, int | float) and value != neutral:
            held.append((owner, name, value))
            shape = means(value)
            setattr(owner, name, neutral)

    def loss(logits: Tensor, labels: Tensor, *args, **kwargs) -> Tensor:
        hidden = logits.reshape(-1, logits.shape[-1])
        total, nll = LabelledLoss.apply(hidden, head.weight, head.bias, labels.flatten(), weights, shape, smooth)
        found.append(nll)
        return total

    kept = model.__dict__.get("_loss_function")
    model.loss_function = loss
    head.forward = lambda hidden: hidden  # type: ignore[method-assign,assignment]
    try:
        yield found
    finally:
        del head.forward
        if kept is None:
            del model._loss_function
        else:
            model._loss_function = kept
        for owner, name, value in held:
            setattr(owner, name, value)
