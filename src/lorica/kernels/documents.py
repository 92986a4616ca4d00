"""Documents laid end to end in one row: attention inside each, through transformers' public `AttentionInterface`.

A pack has no padding and needs no mask: its documents are cut out of the row, those of one length together, and each
attends to itself. What runs inside `documents(...)` may also ask where a document begins, whose it is, and draw random
numbers that depend on the document and the position alone, so that a mask is the same however documents are packed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorica.kernels.within import Layout, Within, layout

NAME = "lorica"


@dataclass(frozen=True)
class Documents:
    """What a row of T tokens consists of.

    Attributes:
        lengths: tokens of each document, in order; they sum to T.
        keys: a number for each document that seeds what is random about it; only needed with dropout.
        owners: the adapter of each document; empty where one adapter, the active one, has them all.
    """

    lengths: tuple[int, ...]
    keys: tuple[int, ...] = ()
    owners: tuple[str, ...] = ()

    @functools.cached_property
    def starts(self) -> list[int]:
        """Where each document begins, and T."""
        return [0, *accumulate(self.lengths)]

    @functools.cached_property
    def buckets(self) -> list[tuple[int, int]]:
        """``(count, length)`` of runs of neighbours of one length."""
        return [(len(list(run)), length) for length, run in groupby(self.lengths)]

    @functools.cached_property
    def shares(self) -> list[tuple[str, int, int]]:
        """``(owner, start, stop)`` of runs of neighbours of one owner; empty without owners."""
        found, place = [], 0
        for owner, run in groupby(self.owners):
            count = len(list(run))
            found.append((owner, self.starts[place], self.starts[place + count]))
            place += count
        return found

    @functools.cached_property
    def _made(self) -> dict[Any, Any]:
        """What the methods below made once for all layers of a pass."""
        return {}

    def bounds(self, device: torch.device) -> Tensor:
        """`starts` as int32 on a device, as variable-length attention takes them."""
        if device not in self._made:
            self._made[device] = torch.tensor(self.starts, dtype=torch.int32, device=device)
        return self._made[device]

    def layout(self, *how: Any) -> Layout:
        """`within.layout` of these documents."""
        if how not in self._made:
            self._made[how] = layout(self.lengths, *how)
        return self._made[how]

    def kept(self, width: int, p: float, salt: int, start: int, stop: int, like: Tensor) -> Tensor:
        """What dropout keeps of tokens `start` to `stop`, already divided by ``1 - p``: ``[stop - start, width]``.

        It depends on a document's key, the position in it and `salt`, so it can be drawn again instead of kept.
        """
        mask = torch.empty(stop - start, width, dtype=like.dtype, device=like.device)
        if like.is_meta:
            return mask  # a plan asks for the size alone
        generator = torch.Generator(like.device)
        for key, begin, end in zip(self.keys, self.starts, self.starts[1:], strict=False):
            if start <= begin and end <= stop:
                generator.manual_seed((key ^ (salt * 0x9E3779B97F4A7C15)) & 0x7FFFFFFFFFFFFFFF)
                mask[begin - start : end - start].bernoulli_(1 - p, generator=generator)
        return mask.div_(1 - p)


_now: Documents | None = None


def current() -> Documents | None:
    """The documents of the pass that is running, or None outside one."""
    return _now


@contextlib.contextmanager
def documents(here: Documents) -> Iterator[None]:
    """Let `here` be the documents of every pass, forward and backward, in a block."""
    # Not a context variable: autograd runs a GPU's backward, and so a checkpoint's second forward, in other threads.
    global _now
    before, _now = _now, here
    try:
        yield
    finally:
        _now = before


@contextlib.contextmanager
def attending(model: Any, name: str = NAME) -> Iterator[None]:
    """Let a transformers model attend inside documents, or in another registered way, for the length of a block."""
    # What `set_attn_implementation` sets, without its walk over all modules, which took 8 ms at each end of a pass.
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention within each of the current documents.

    query ``[1, heads, T, dim]``, key and value ``[1, kv heads, T, dim]`` to ``[1, T, heads, dim]``. Without
    documents it is transformers' own. Raises NotImplementedError for what it cannot do, and the caller pads instead.
    """
    here = current()
    if here is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, softcap=softcap, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unknown = [name for name in ("position_bias", "s_aux", "cache") if kwargs.get(name) is not None]
    whole = all(states.shape[0] == 1 and states.shape[2] == here.starts[-1] for states in (query, key))
    if unknown or attention_mask is not None or not whole:
        what = ", ".join(unknown) or "mask, no cache and no other row"
        raise NotImplementedError(f"attention within documents takes no {what}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = tuple(states[0].transpose(0, 1) for states in (query, key, value))
    window = sliding_window if sliding_window and sliding_window < max(here.lengths) else None
    if query.device.type in ("cpu", "meta") and not (window or softcap or dropout):
        where = here.layout(query.shape[1], key.shape[1], causal, query.device)
        return Within.apply(*rows, where, causal, scale)[None], None
    # One shape is torch's fastest kernel on a GPU, twice as fast as that for any lengths; but cuDNN plans each shape
    # anew, so it has to be one that comes again.
    alike = len(here.buckets) == 1 and here.lengths[0] % 128 == 0 and not window
    if query.is_cuda and not alike and not softcap and not dropout and query.dtype != torch.float32:
        return _varlen(rows, here, causal, scale, window)[None], None
    sizes = [count * length for count, length in here.buckets]
    outs = []
    for (count, length), *piece in zip(here.buckets, *(states.split(sizes) for states in rows), strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in piece)
        out = _bucket(q, k, v, causal, scale, window, softcap, dropout)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None], None


def _bucket(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Documents of one length: ``[count, heads, length, dim]``."""
    mask = _band(q.shape[2], window, causal, q.device) if window or (softcap and causal) else None
    if not softcap:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale, enable_gqa=True
        )
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.float().softmax(-1).to(v.dtype), dropout) @ v


def _band(length: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    """Which keys a query sees: those up to it, or all, and none `window` or more away."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance.abs() < window) if window else seen


def _varlen(rows: Sequence[Tensor], here: Documents, causal: bool, scale: float, window: int | None) -> Tensor:
    """torch's variable-length attention on a GPU: ``[T, heads, dim]``, one kernel for all documents."""
    from torch.nn.attention import varlen

    q, k, v = rows
    known = varlen.varlen_attn.__code__.co_varnames
    options: dict[str, Any] = {"scale": scale}
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v))
    if "window_size" in known:
        back = window - 1 if window else -1
        options["window_size"] = (back, 0 if causal else back)
    elif window:
        raise NotImplementedError("this torch has no variable-length attention with a window")
    else:
        options["is_causal"] = causal
    bounds, longest = here.bounds(q.device), max(here.lengths)
    q, k, v = (states.contiguous() for states in (q, k, v))
    return varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)  # type: ignore[return-value]


AttentionInterface.register(NAME, attention)
