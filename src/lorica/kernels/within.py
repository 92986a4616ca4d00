"""Attention within documents on a CPU, all heads of many documents in a few batched products.

Documents up to `SHORT` tokens are padded to the longest of their like and multiplied together: their probabilities are
kept, and three products make the backward pass, half the time of a kernel that computes them again. A longer document
goes through torch's flash kernel by itself. Products run in the format that `precision` says, fp32 on a CPU without
tiles; scores and softmax are fp32 always, and what is kept of q, k and v stays in the format in which they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lorica.kernels.precision import computes_in

SHORT = 128
LIKE = 64  # short documents of 1 to 64 tokens are padded together, and those of 65 to 128
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Bucket:
    """n documents padded to L tokens, for all heads: the rows of ``[T heads, dim]`` at ``[heads, n, L]``.

    Attributes:
        shape: ``(heads n, L)``.
        queries, keys: ``[heads n L]`` rows of the queries, and of the keys that meet them; any row where padded.
        padded: those of the ``heads n L`` places that are padding.
        mask: what is added to scores ``[heads, n, L, L]``: minus infinity at keys that are not seen.
    """

    shape: tuple[int, int]
    queries: Tensor
    keys: Tensor
    padded: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the documents of a row of T tokens are computed.

    Attributes:
        buckets: the short ones.
        long: ``(start, stop)`` of each of the others.
        back: ``[T heads]``, where each row of the result stands in those of the buckets, then of the long ones.
    """

    buckets: tuple[Bucket, ...]
    long: tuple[tuple[int, int], ...]
    back: Tensor


def layout(lengths: Sequence[int], heads: int, kv_heads: int, causal: bool, device: torch.device) -> Layout:
    """How documents of these lengths, in their order, are padded and taken apart."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    head = torch.arange(heads)[:, None, None]
    back = torch.empty(starts[-1], heads, dtype=torch.long)
    buckets = []
    taken = 0
    short = sorted((place for place in range(len(lengths)) if lengths[place] <= SHORT), key=lengths.__getitem__)
    for _, run in groupby(short, key=lambda place: -(-lengths[place] // LIKE)):
        places = list(run)
        sizes = torch.tensor([lengths[place] for place in places])
        first = torch.tensor([starts[place] for place in places])
        longest = int(sizes[-1])
        at = torch.arange(longest)
        real = at < sizes[:, None]
        token = torch.where(real, first[:, None] + at, first[:, None])
        queries = (token * heads + head).flatten()
        keys = (token * kv_heads + torch.div(head, heads // kv_heads, rounding_mode="floor")).flatten()
        everywhere = real.expand(heads, -1, -1)
        place = taken + torch.arange(queries.numel()).view(everywhere.shape)
        back.view(-1)[queries[everywhere.flatten()]] = place[everywhere]
        taken += queries.numel()
        # A padded key comes after every real query, so causal attention sees none.
        seen = at[:, None] >= at if causal else real[:, None, :]
        mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        made = (each.to(device) for each in (queries, keys, (~everywhere).flatten().nonzero().flatten(), mask))
        buckets.append(Bucket((heads * len(places), longest), *made))
    long = [(start, start + length) for start, length in zip(starts, lengths, strict=False) if length > SHORT]
    for start, stop in long:
        size = (stop - start) * heads
        back[start:stop] = taken + torch.arange(size).view(heads, -1).T
        taken += size
    return Layout(tuple(buckets), tuple(long), back.flatten().to(device))


class Within(torch.autograd.Function):
    """``softmax(scale q k^T) v`` inside each document: q ``[T, heads, dim]``, k and v ``[T, kv heads, dim]``."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, where: Layout, causal: bool, scale: float) -> Tensor:
        given, shape, dtype = (q, k, v), q.shape, q.dtype
        q, k, v = _rows(*given)
        pieces, kept = [], []
        for bucket in where.buckets:
            query, key, value = _gathered(bucket, q, k, v)
            scores = torch.bmm(query.float().mul_(scale), key.float().transpose(1, 2))
            _everywhere(scores, bucket).add_(bucket.mask)
            torch.softmax(scores, -1, out=scores)
            kept.append(scores.to(q.dtype))
            pieces.append(torch.bmm(kept[-1], value).flatten(0, 1))
        for start, stop in where.long:
            states = _heads_first(shape[1], start, stop, q, k, v)
            found, logsumexp = _flash(*states, 0.0, causal, scale=scale)
            kept += [found, logsumexp]
            pieces.append(found.flatten(0, 2))
        ctx.save_for_backward(*given, *kept)
        ctx.how = (where, causal, scale, shape, dtype)
        return torch.cat(pieces).index_select(0, where.back).view(shape).to(dtype)

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        where, causal, scale, shape, dtype = ctx.how
        q, k, v = _rows(q, k, v)
        dout = dout.to(q.dtype).reshape(-1, shape[-1])
        pieces: tuple[list[Tensor], ...] = ([], [], [])
        for bucket, share in zip(where.buckets, kept, strict=False):
            query, key, value = _gathered(bucket, q, k, v)
            d = dout.index_select(0, bucket.queries).index_fill_(0, bucket.padded, 0).view_as(query)
            slope = torch.bmm(d, value.transpose(1, 2))
            slope = torch.ops.aten._softmax_backward_data(slope, share, -1, slope.dtype).mul_(scale)
            found = torch.bmm(slope, key), torch.bmm(slope.transpose(1, 2), query), torch.bmm(share.transpose(1, 2), d)
            for piece, grad in zip(pieces, found, strict=True):
                piece.append(grad.flatten(0, 1))
        rest = kept[len(where.buckets) :]
        for (start, stop), out, logsumexp in zip(where.long, rest[::2], rest[1::2], strict=True):
            d, *_ = _heads_first(shape[1], start, stop, dout)
            states = _heads_first(shape[1], start, stop, q, k, v)
            for piece, grad in zip(
                pieces, _flash_backward(d, *states, out, logsumexp, 0.0, causal, scale=scale), strict=True
            ):
                piece.append(grad.flatten(0, 2))
        dq, dk, dv = (torch.cat(piece).index_select(0, where.back).view(shape) for piece in pieces)
        kv_heads = len(k) // shape[0]
        dk, dv = (grad.unflatten(1, (kv_heads, -1)).sum(2) if kv_heads < shape[1] else grad for grad in (dk, dv))
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None


def _rows(*each: Tensor) -> list[Tensor]:
    """States ``[T, heads, dim]`` as rows ``[T heads, dim]`` in the format of the products."""
    dtype = computes_in(each[0], small=True)
    return [states.to(dtype).reshape(-1, states.shape[-1]) for states in each]


def _gathered(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The states of a bucket ``[heads n, L, dim]`` from those of all rows, each key once for every query's head."""
    each = ((q, bucket.queries), (k, bucket.keys), (v, bucket.keys))
    return tuple(states.index_select(0, rows).view(*bucket.shape, -1) for states, rows in each)


def _everywhere(scores: Tensor, bucket: Bucket) -> Tensor:
    """Scores so that the mask of a bucket can be added: a document's own mask meets all of its heads."""
    return scores if bucket.mask.ndim == 2 else scores.unflatten(0, (-1, len(bucket.mask)))


def _heads_first(heads: int, start: int, stop: int, *each: Tensor) -> tuple[Tensor, ...]:
    """One document's states ``[1, heads, length, dim]`` from rows ``[T heads or kv heads, dim]``."""
    tokens = len(each[0]) // heads
    found = (states.view(tokens, -1, states.shape[-1])[start:stop].transpose(0, 1) for states in each)
    return tuple(
        (states if len(states) == heads else states.repeat_interleave(heads // len(states), 0))[None]
        for states in found
    )
