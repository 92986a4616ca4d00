"""In which number format a device multiplies matrices.

Weights may be kept in a format that the device multiplies slowly: a CPU without AMX reaches a half to a hundredth of
its fp32 speed in bf16. There, products are made in fp32 from copies that live no longer than the product, and what is
kept stays small.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorica.kernels.trial import pays

# Elements of a wide copy: of a head's matrix, only slices of this size are copied at a time.
SLICE = 1 << 24
# Rows from which on a product pays for a wide copy of its matrix.
WIDENED = 32
_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


def computes_in(x: Tensor, small: bool = False) -> torch.dtype:
    """The dtype in which products of `x` are made: its own, or fp32 on a CPU that multiplies it more slowly.

    Of products as `small` as those of one head in one document, AVX-512 makes fewer in bf16 than in fp32 even where it
    is faster with large ones; only tiles pay.
    """
    if on_gpu(x) or not (x.is_cpu or x.is_meta):
        return x.dtype
    if small and x.element_size() < 4 and not in_tiles(x.dtype):
        return torch.float32
    return _cpu_computes_in(x.dtype)


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor lies on a GPU; one without data stands for one where this machine would train."""
    return x.is_cuda or (x.is_meta and torch.cuda.is_available())


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones."""
    # oneDNN's own answer is yes from AVX-512 on, where it emulates bf16 more slowly than fp32.
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and _bf16_pays()))


class Widened(TorchDispatchMode):
    """Makes the products of any code in the format that the CPU multiplies fast, and gives them in the one they have.

    For what a model computes by its own forward passes: as they are they are slower by a factor of 4, and by one of 100
    where a matrix lies transposed. A few rows are left alone: reading the matrix is what takes the time then.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            a, b = args[-2:]
            dtype = computes_in(a)
            if dtype != a.dtype and (a.shape[-2] >= WIDENED or b.stride(-1) == 1):
                return func(*(each.to(dtype) for each in args), **(kwargs or {})).to(a.dtype)
        return func(*args, **(kwargs or {}))


def widened(like: Tensor) -> contextlib.AbstractContextManager:
    """`Widened` where the format of `like` is multiplied slowly, else nothing."""
    return Widened() if computes_in(like) != like.dtype else contextlib.nullcontext()


def in_tiles(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a number format in tiles (AMX's bf16), several times faster than fp32."""
    return dtype == torch.bfloat16 and _has_tiles()


def mm_rows(a: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``a W^T`` into `out`: a ``[n, in]``, W ``[rows, in]``, a large matrix of which no whole copy is made."""
    dtype = computes_in(a)
    if dtype == a.dtype:
        return torch.mm(a, W.T, out=out)
    wide, rows = a.to(dtype), max(1, SLICE // W.shape[1])
    for start in range(0, len(W), rows):
        out[:, start : start + rows] = torch.mm(wide, W[start : start + rows].to(dtype).T)
    return out


def mm_columns(a: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """``a W`` into `out`: a ``[n, rows]``, W ``[rows, width]``, a large matrix of which no whole copy is made."""
    dtype = computes_in(a)
    if dtype == a.dtype:
        return torch.mm(a, W, out=out)
    total = torch.zeros(len(a), W.shape[1], dtype=dtype, device=a.device)
    rows = max(1, SLICE // W.shape[1])
    for start in range(0, len(W), rows):
        total.addmm_(a[:, start : start + rows].to(dtype), W[start : start + rows].to(dtype))
    return out.copy_(total)


@functools.cache
def _cpu_computes_in(dtype: torch.dtype) -> torch.dtype:
    slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_multiplies_bf16())
    return torch.float32 if slow else dtype


@functools.cache
def _has_tiles() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@functools.cache
def _bf16_pays(gain: float = 1.2) -> bool:
    """Whether a matrix product is at least `gain` times faster in bf16: with AVX-512's instruction it is twice as fast
    on some CPUs and a third slower on others. Takes about 0.1 s."""
    x, w = torch.randn(512, 1024), torch.randn(1024, 1024)
    narrow = x.bfloat16(), w.bfloat16()
    return pays(lambda: F.linear(x, w), lambda: F.linear(*narrow), gain)
