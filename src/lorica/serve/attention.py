"""Attention over transformers' paged cache, without a mask over everybody else's keys.

Registered with transformers' `AttentionInterface`; a `Step`, handed to the model as `KEYWORD`, says what the batch
consists of. Prompts that begin are documents laid end to end, and are attended as those of a training step are.
Requests that add one token are attended in one product over keys gathered side by side; what goes on reading a prompt,
request by request.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.kernels.documents import Documents, attention, documents

NAME, KEYWORD = "lorica_paged", "lorica_step"
_UNKNOWN = ("softcap", "s_aux", "sinks", "position_bias")


@dataclass(frozen=True)
class Piece:
    """One request in a step: its tokens are rows `start` to `stop`."""

    start: int
    stop: int
    id: str = ""


class Step:
    """The requests of one step, and the keys that are `kept` from the step before."""

    def __init__(self, pieces: Sequence[Piece], kept: Kept | None = None) -> None:
        self.pieces, self.kept = pieces, kept
        self._made: dict[int, _Ways] = {}

    def ways(self, allocator: Any, read: Tensor, bounds: Tensor) -> _Ways:
        """How each request is attended, found once for all layers of one kind."""
        if allocator.index not in self._made:
            self._made[allocator.index] = _Ways.of(self.pieces, read, bounds.tolist(), self.kept)
        return self._made[allocator.index]


class Kept:
    """The keys and values of requests that add a token in every step, side by side from one step to the next.

    The cache has them in pages all over its memory, and to bring them together each time takes as long as attending
    them. A step with other requests than the last begins anew.

    Args:
        most: tokens of all requests, room to grow included, beyond which nothing is kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._who: list[str] = []
        self._lengths: list[int] = []
        self._room = 0
        self._ends: dict[int, Tensor] = {}  # by heads, where the newest keys go
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, who: list[str], lengths: list[int]) -> bool:
        """Begin a step of these requests, of so many keys each, by each kind of layer; whether they may be kept."""
        longest = max(lengths)
        if (who, lengths) != (self._who, self._lengths):
            grown = who == self._who and lengths == [length + 1 for length in self._lengths]
            if not grown or longest > self._room:
                self._layers.clear()
                self._room = longest + max(32, longest // 4)
            self._who, self._lengths, self._ends = who, lengths, {}
        return len(who) * self._room <= self.most

    def side_by_side(self, layer: int, each: Single, pages: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values ``[n, heads, longest, d]`` of a layer, from its pages or from the last step and the `new`
        ones ``[n, heads, d]``."""
        if layer not in self._layers:
            self._layers[layer] = tuple(  # type: ignore[assignment]
                x.new_zeros(each.count, x.shape[1], self._room, x.shape[2]) for x in pages
            )
            for room, x in zip(self._layers[layer], pages, strict=True):
                room[:, :, : each.longest] = each.gathered(x)
        else:
            heads = new[0].shape[1]
            if heads not in self._ends:
                each_head = torch.arange(each.count * heads).view(each.count, heads) * self._room
                self._ends[heads] = (each_head + torch.tensor(self._lengths)[:, None] - 1).flatten()
            for room, x in zip(self._layers[layer], new, strict=True):
                room.view(-1, x.shape[-1]).index_copy_(0, self._ends[heads], x.flatten(0, 1))
        return [room[:, :, : each.longest] for room in self._layers[layer]]


class Decoding(Step):
    """A step in which each request adds one token, at places that are known before."""

    def __init__(self, single: Single) -> None:
        super().__init__(())
        self._ways = _Ways(None, single)

    def ways(self, allocator: Any, read: Tensor, bounds: Tensor) -> _Ways:
        """See `Step.ways`."""
        return self._ways


@dataclass(frozen=True)
class Single:
    """Requests that add one token to a past: their `rows` in the batch, and of `count` of them, `longest` keys each.

    `index` has the places of the keys in the cache ``[count * longest]``; `mask` ``[count, 1, 1, longest]`` says which
    are theirs, None where all are.
    """

    rows: Any
    index: Tensor
    mask: Tensor | None
    count: int
    longest: int
    kept: Kept | None = None

    @classmethod
    def of(cls, each: Sequence[tuple[Piece, Tensor]], read: Tensor, kept: Kept | None) -> Single:
        """From each request's piece and the places of its keys."""
        index = nn.utils.rnn.pad_sequence([places for _, places in each], batch_first=True)
        lengths = [len(places) for _, places in each]
        here = torch.arange(index.shape[1], device=read.device) < torch.tensor(lengths, device=read.device)[:, None]
        mask = None if bool(here.all()) else here[:, None, None, :]
        if kept and not kept.step([piece.id for piece, _ in each], lengths):
            kept = None
        count, longest = index.shape
        return cls(_rows([piece for piece, _ in each], read), index.flatten(), mask, count, longest, kept)

    def gathered(self, pages: Tensor) -> Tensor:
        """Keys or values ``[n, heads, longest, d]`` from all of a layer's ``[places, heads, d]``."""
        return pages.index_select(0, self.index).view(self.count, self.longest, *pages.shape[1:]).transpose(1, 2)


@dataclass(frozen=True)
class _Ways:
    """Requests by how they are attended, each with its rows in the batch and its keys in the cache.

    Attributes:
        fresh: ``(rows, documents)`` of those without a past, whose keys are all in the batch.
        single: those that add one token to a past.
        others: ``(rows, places of the keys)`` of each of the rest.
    """

    fresh: tuple[Any, Documents] | None
    single: Single | None
    others: Sequence[tuple[slice, Tensor]] = ()

    @classmethod
    def of(cls, pieces: Sequence[Piece], read: Tensor, bounds: list[int], kept: Kept | None) -> _Ways:
        """From the batch, and where each request's places begin in `read`."""
        fresh, single, others = [], [], []
        for piece, start, stop in zip(pieces, bounds, bounds[1:], strict=False):
            count = piece.stop - piece.start
            if count == stop - start:
                fresh.append(piece)
            elif count == 1:
                single.append((piece, read[start:stop]))
            else:
                others.append((slice(piece.start, piece.stop), read[start:stop]))
        lengths = tuple(piece.stop - piece.start for piece in fresh)
        begun = (_rows(fresh, read), Documents(lengths)) if fresh else None
        return cls(begun, Single.of(single, read, kept) if single else None, others)


def _rows(pieces: Sequence[Piece], like: Tensor) -> Any:
    """Rows of some requests: a slice where they are neighbours, else an index."""
    if all(before.stop == after.start for before, after in itertools.pairwise(pieces)):
        return slice(pieces[0].start, pieces[-1].stop)
    return torch.cat([torch.arange(piece.start, piece.stop) for piece in pieces]).to(like.device)


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
    bounds = kwargs["cu_seq_lens_k"][allocator.layer_type]
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    if allocator.layer_type == "full_attention":
        keys, values = allocator._kv_token_views[layer]
        keys.index_copy_(0, write, key[0].transpose(0, 1))
        values.index_copy_(0, write, value[0].transpose(0, 1))
        ways = step.ways(allocator, read, bounds)
        if ways.fresh:
            rows, here = ways.fresh
            with documents(here):
                q, k, v = (x[:, :, rows] for x in (query, key, value))
                out[:, rows] = attention(module, q, k, v, None, scaling=scaling)[0]
        if ways.single:
            each = ways.single
            if each.kept:
                new = [x[0, :, each.rows].transpose(0, 1) for x in (key, value)]
                k, v = each.kept.side_by_side(layer, each, (keys, values), new)
            else:
                k, v = each.gathered(keys), each.gathered(values)
            out[0, each.rows] = _single(query[0, :, each.rows], k, v, each.mask, scaling)
        for rows, places in ways.others:
            k, v = (x.index_select(0, places).transpose(0, 1)[None] for x in (keys, values))
            out[:, rows] = _attended(query[:, :, rows], k, v, scaling, None)
    else:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
        window = getattr(allocator, "sliding_window", None)
        ends = bounds.tolist()
        for piece, start, stop in zip(step.pieces, ends, ends[1:], strict=False):
            rows = slice(piece.start, piece.stop)
            k, v = key[:, :, start:stop], value[:, :, start:stop]
            out[:, rows] = _attended(query[:, :, rows], k, v, scaling, window)
    return out, None


def _single(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """One query for each request, ``[heads, n, d]`` to ``[n, heads, d]``: heads are rows of the key head they share."""
    heads, n, d = q.shape
    shared = k.shape[1]
    q = q.transpose(0, 1).reshape(n, shared, heads // shared, d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return y.reshape(n, heads, -1)


def _attended(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Several queries of one request, the last of all its keys: ``[1, heads, n, d]`` to ``[1, n, heads, d]``."""
    n, m = q.shape[2], k.shape[2]
    mask = None
    if n < m or (window is not None and window < m):
        ahead = torch.arange(m, device=q.device) - torch.arange(m - n, m, device=q.device)[:, None]
        mask = ahead <= 0
        if window is not None:
            mask &= ahead > -window
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and n > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


def register(model: nn.Module) -> None:
    """Make `paged` known to transformers and let the model use it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
