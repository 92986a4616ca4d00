"""What a GPU does in one pass over its memory where torch makes several, which is what these operations cost there.

Each stands for a plain formula, and is used where `ready` says so: the gated product of `lowrank.GatedMLP`, the
gradient of `head.LabelledLoss`, and `elementwise.Rotary`. On tensors without data, as a plan has them, the outputs are
made and nothing runs.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from lorica.kernels.precision import on_gpu

# The activations that `jit` knows, by the name they have in `elementwise`.
GATES = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_BLOCK = 1024
_WIDE = 4096


def ready(x: Tensor) -> bool:
    """Whether these kernels are for a tensor: on a GPU, below fp64, where Triton is installed."""
    return on_gpu(x) and x.element_size() <= 4 and _has_triton()


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """``act(gate) * up``, all ``[tokens, width]`` and contiguous."""
    out = torch.empty_like(gate)
    if not gate.is_meta:
        from lorica.kernels import jit

        jit.gated[_blocks(gate.numel())](gate, up, out, gate.numel(), ACT=GATES[act], BLOCK=_BLOCK)
    return out


def gated_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate, in the memory of `dh`, and of up, from that of `gated`."""
    dup = torch.empty_like(up)
    if not dh.is_meta:
        from lorica.kernels import jit

        jit.gated_backward[_blocks(gate.numel())](dh, gate, up, dup, gate.numel(), ACT=GATES[act], BLOCK=_BLOCK)
    return dh, dup


def rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """``x cos + rotate_half(x) sin``, or what it sends back: x ``[1, T, heads, dim]``, cos, sin ``[1, T, 1, dim]``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.is_meta:
        from lorica.kernels import jit

        x, cos, sin, pairs = x.contiguous(), cos.contiguous(), sin.contiguous(), x.numel() // 2
        sizes = {"HALF": x.shape[-1] // 2, "BACKWARD": backward, "BLOCK": _BLOCK}
        jit.rotated[_blocks(pairs)](x, cos, sin, out, pairs, x.shape[-2], **sizes)
    return out


def softmax_gradient(logits: Tensor, wanted: Tensor, weights: Tensor, nll: Tensor) -> None:
    """``weights (softmax - target)`` in place of logits ``[n, vocab]``, for ids `wanted` ``[n]``; fills nll ``[n]``."""
    if not logits.is_meta:
        from lorica.kernels import jit

        n, vocab = logits.shape
        size = {"VOCAB": vocab, "BLOCK": _WIDE}
        jit.softmax_gradient[(n,)](logits, logits.stride(0), wanted, weights, nll, **size, num_warps=8)


def _blocks(count: int) -> tuple[int]:
    return (-(-count // _BLOCK),)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
