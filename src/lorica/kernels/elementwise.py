"""RMSNorm, rotary positions and activations in few passes, with backward passes that keep only their inputs.

Written as a model would write them, each of these is five to ten operations that allocate and keep what they make.
Here the statistics are fp32, results are written in place, and what is cheap is computed again. Each stands beside the
plain formula in its docstring, and is used for a module only after it gave what the module gives (`lorica.fast`). A
GPU normalises with torch's own kernel, which reads and writes once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels import gpu
from lorica.kernels.precision import on_gpu

_aten = torch.ops.aten


class RMSNorm(torch.autograd.Function):
    """``y = w x / sqrt(mean(x^2) + eps)`` over the last axis, for a frozen ``w``; keeps x and one number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        ctx.w, ctx.whole = w, on_gpu(x) and x.dtype == w.dtype
        if ctx.whole:
            y, inverse = _aten._fused_rms_norm(x, [x.shape[-1]], w, eps)
            ctx.save_for_backward(x, inverse)
            return y
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse.mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse)
        return torch.mul(wide, inverse).to(x.dtype).mul_(w)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, inverse = ctx.saved_tensors
        if ctx.whole:
            size, wanted = [x.shape[-1]], [True, False]
            return _aten._fused_rms_norm_backward(dy.contiguous(), x, size, inverse, ctx.w, wanted)[0], None, None
        wide = x.float()
        d = (dy * ctx.w).float()
        # d(1/rms)/dx pulls the gradient back along x.
        along = (d * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).mul_(-1 / x.shape[-1])
        return d.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None


class Rotary(torch.autograd.Function):
    """``x cos + rotate_half(x) sin``: x ``[..., T, heads, dim]``, cos and sin ``[..., T, 1, dim]``; keeps no x.

    rotate_half puts the second half of the last axis, negated, before the first (RoFormer, arXiv 2104.09864).
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.whole = gpu.ready(x) and cos.shape == sin.shape == (*x.shape[:-2], 1, x.shape[-1])
        if ctx.whole:
            return gpu.rotated(x, cos, sin, backward=False)
        (x1, x2), (c1, c2), (s1, s2) = (tensor.chunk(2, -1) for tensor in (x, cos, sin))
        y = torch.empty_like(x)
        y1, y2 = y.chunk(2, -1)
        torch.mul(x1, c1, out=y1).addcmul_(x2, s1, value=-1)
        torch.mul(x2, c2, out=y2).addcmul_(x1, s2)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        if ctx.whole:
            cos, sin = ctx.saved_tensors
            return gpu.rotated(dy, cos, sin, backward=True), None, None
        (c1, c2), (s1, s2) = (tensor.chunk(2, -1) for tensor in ctx.saved_tensors)
        d1, d2 = dy.chunk(2, -1)
        dx = torch.empty_like(dy)
        x1, x2 = dx.chunk(2, -1)
        torch.mul(d1, c1, out=x1).addcmul_(d2, s2)
        torch.mul(d2, c2, out=x2).addcmul_(d1, s1, value=-1)
        return dx, None, None


@dataclass(frozen=True)
class Activation:
    """``f(x)`` into a new tensor, and ``dy f'(x)`` from dy and x."""

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    known.name: known
    for known in (
        Activation("silu", F.silu, _aten.silu_backward),
        Activation("gelu", F.gelu, _aten.gelu_backward),
        Activation(
            "gelu_tanh",
            lambda x: F.gelu(x, approximate="tanh"),
            lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
        ),
    )
}
