"""Attention over transformers' paged cache, request by request, without a mask over everybody else's keys.

Registered with transformers' `AttentionInterface`; a `Step`, handed to the model as `KEYWORD`, says what the batch
consists of. Requests that add one token are attended in one product over keys gathered side by side; the others each
by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.errors import LoricaError

NAME, KEYWORD = "lorica_paged", "lorica_step"
_UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias")


@dataclass(frozen=True)
class Piece:
    """One request in a step: its tokens are rows `start` to `stop`."""

    start: int
    stop: int


class Step:
    """The requests of one step."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.single = [place for place, piece in enumerate(pieces) if piece.stop - piece.start == 1]
        self.others = [place for place, piece in enumerate(pieces) if piece.stop - piece.start > 1]
        self.pieces = pieces
        self._gathers: dict[int, _Gather] = {}

    def gather(self, allocator: Any, read: Tensor, bounds: Tensor) -> _Gather:
        """Where the keys of the single-token requests lie, made once for all layers of one kind."""
        if allocator.index not in self._gathers:
            self._gathers[allocator.index] = _Gather(self, read, bounds.tolist())
        return self._gathers[allocator.index]


class _Gather:
    """Indices of keys ``[n, longest]`` of single-token requests, and which are theirs."""

    def __init__(self, step: Step, read: Tensor, bounds: list[int]) -> None:
        self.bounds, self.read = bounds, read
        spans = [(bounds[place], bounds[place + 1]) for place in step.single]
        self.longest = max((stop - start for start, stop in spans), default=0)
        self.index = read.new_zeros(len(spans), self.longest)
        for row, (start, stop) in enumerate(spans):
            self.index[row, : stop - start] = read[start:stop]
        lengths = torch.tensor([stop - start for start, stop in spans], device=read.device)
        here = torch.arange(self.longest, device=read.device) < lengths[:, None]
        self.mask = None if bool(here.all()) else here[:, None, None, :]
        rows = [step.pieces[place].start for place in step.single]
        first = rows[0] if rows else 0
        self.rows: Any = torch.tensor(rows, device=read.device)
        if rows == list(range(first, first + len(rows))):
            self.rows = slice(first, first + len(rows))
        self.index = self.index.flatten()


def paged(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``[1, heads, T, d]`` to ``[1, T, heads, d]``."""
    if found := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise LoricaError(f"{type(module).__name__} attends with {', '.join(found)}, which the paged attention has not")
    step: Step = kwargs[KEYWORD]
    cache, layer = kwargs["cache"], module.layer_idx
    allocator = cache.layer_to_allocator[layer]
    read, write = (kwargs[name][allocator.index] for name in ("read_index", "write_index"))
    out = torch.empty_like(query)
    if allocator.layer_type == "full_attention" and read.numel():
        keys, values = allocator._kv_token_views[layer]
        keys.index_copy_(0, write, key[0].transpose(0, 1))
        values.index_copy_(0, write, value[0].transpose(0, 1))
        gather = step.gather(allocator, read, kwargs["cu_seq_lens_k"][allocator.layer_type])
        if step.single:
            out[:, :, gather.rows] = _single(query[:, :, gather.rows], keys, values, gather, scaling)
        for place in step.others:
            piece, start, stop = step.pieces[place], gather.bounds[place], gather.bounds[place + 1]
            index = read[start:stop]
            k, v = (x.index_select(0, index).transpose(0, 1)[None] for x in (keys, values))
            rows = slice(piece.start, piece.stop)
            out[:, :, rows] = _attended(query[:, :, rows], k, v, scaling, None)
    else:
        bounds = kwargs["cu_seq_lens_k"][allocator.layer_type].tolist()
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
        window = getattr(allocator, "sliding_window", None)
        for piece, start, stop in zip(step.pieces, bounds, bounds[1:], strict=False):
            rows = slice(piece.start, piece.stop)
            k, v = key[:, :, start:stop], value[:, :, start:stop]
            out[:, :, rows] = _attended(query[:, :, rows], k, v, scaling, window)
    return out.transpose(1, 2).contiguous(), None


def _single(q: Tensor, keys: Tensor, values: Tensor, gather: _Gather, scaling: float | None) -> Tensor:
    """One query for each request, ``[1, heads, n, d]``: its heads are rows of the key head that they share."""
    _, heads, n, d = q.shape
    shared = keys.shape[1]
    k, v = (x.index_select(0, gather.index).view(n, gather.longest, shared, -1).transpose(1, 2) for x in (keys, values))
    q = q[0].transpose(0, 1).reshape(n, shared, heads // shared, d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=gather.mask, scale=scaling)
    return y.reshape(n, heads, -1).transpose(0, 1)


def _attended(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Several queries of one request, the last of all its keys."""
    n, m = q.shape[2], k.shape[2]
    mask = None
    if n < m or (window is not None and window < m):
        ahead = torch.arange(m, device=q.device) - torch.arange(m - n, m, device=q.device)[:, None]
        mask = ahead <= 0
        if window is not None:
            mask &= ahead > -window
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and n > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def register(model: nn.Module) -> None:
    """Make `paged` known to transformers and let the model use it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
