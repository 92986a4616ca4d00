"""The kernels of `gpu`, for Triton: sums and activations are fp32, whatever the format of what is read and written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activation(x, ACT: tl.constexpr):
    """f(x) and f'(x): 0 is silu, 1 gelu, 2 gelu by tanh."""
    if ACT == 0:
        s = tl.sigmoid(x)
        f = x * s
        d = s * (1 + x * (1 - s))
    elif ACT == 1:
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        f = x * cdf
        d = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2 * tl.sigmoid(2 * inner) - 1
        f = 0.5 * x * (1 + t)
        d = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    return f, d


@triton.jit
def gated(gate, up, out, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """``out = f(gate) * up``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    f, _ = _activation(tl.load(gate + at, mask=here, other=0.0).to(tl.float32), ACT)
    product = f * tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, product.to(out.dtype.element_ty), mask=here)


@triton.jit
def gated_backward(dh, gate, up, dup, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """``dup = dh f(gate)``, and in place of dh, ``dh up f'(gate)``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    d = tl.load(dh + at, mask=here, other=0.0).to(tl.float32)
    f, slope = _activation(tl.load(gate + at, mask=here, other=0.0).to(tl.float32), ACT)
    u = tl.load(up + at, mask=here, other=0.0).to(tl.float32)
    tl.store(dup + at, (d * f).to(dup.dtype.element_ty), mask=here)
    tl.store(dh + at, (d * u * slope).to(dh.dtype.element_ty), mask=here)


@triton.jit
def rotated(x, cos, sin, out, size, heads, HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """``x cos + rotate_half(x) sin``, or what it sends back: x ``[tokens, heads, 2 HALF]``, tables without heads."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = pair < size
    row = pair // HALF
    first = row * 2 * HALF + pair % HALF
    table = row // heads * 2 * HALF + pair % HALF
    x1 = tl.load(x + first, mask=here, other=0.0).to(tl.float32)
    x2 = tl.load(x + first + HALF, mask=here, other=0.0).to(tl.float32)
    c1 = tl.load(cos + table, mask=here, other=0.0).to(tl.float32)
    c2 = tl.load(cos + table + HALF, mask=here, other=0.0).to(tl.float32)
    s1 = tl.load(sin + table, mask=here, other=0.0).to(tl.float32)
    s2 = tl.load(sin + table + HALF, mask=here, other=0.0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(out + first, y1.to(out.dtype.element_ty), mask=here)
    tl.store(out + first + HALF, y2.to(out.dtype.element_ty), mask=here)


@triton.jit
def softmax_gradient(logits, stride, wanted, weights, nll, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: its maximum and sum in a first pass, the gradient in place in a second."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    places = tl.arange(0, BLOCK)
    most = -float("inf")
    total = 0.0
    for begin in range(0, VOCAB, BLOCK):
        z = tl.load(start + begin + places, mask=begin + places < VOCAB, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(z, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(z - higher), 0)
        most = higher
    norm = most + tl.log(total)
    goal = tl.load(wanted + row)
    weight = tl.load(weights + row).to(tl.float32)
    tl.store(nll + row, norm - tl.load(start + goal).to(tl.float32))
    tl.debug_barrier()
    for begin in range(0, VOCAB, BLOCK):
        at = begin + places
        z = tl.load(start + at, mask=at < VOCAB, other=0.0).to(tl.float32)
        d = (tl.exp(z - norm) - tl.where(at == goal, 1.0, 0.0)) * weight
        tl.store(start + at, d.to(logits.dtype.element_ty), mask=at < VOCAB)
