"""Steps in which every request adds one token, on a GPU: recorded once for each size, and then repeated.

A pass of a large model is thousands of calls, each of which takes the host longer than the GPU; recorded as a CUDA
graph they are one. A graph reads and writes fixed addresses, so what changes from step to step is copied there first:
ids, places in the cache, and the factors of the adapters, which keep their rows in a `Room` while they are asked for.
Sizes are rounded up, so that there are few graphs; rows that are too many repeat the first request.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.serve import attention
from lorica.serve.rows import Layers, Part
from lorica.serve.stack import Down, Rows, Up, first_fit

_KEYS = 256  # the keys of a request are rounded up to a power of two, from here on
_RANKS = 16  # and the rows of all adapters
_KEPT = 48  # passes that are kept, the last used ones
_ROOMS = 4  # and rooms for adapters
_FULL = "full_attention"
_log = logging.getLogger(__name__)


def pays(model: Any) -> bool:
    """Whether to record: where the host is what a pass waits for."""
    return bool(model.device.type == "cuda")


class Recorder:
    """The recorded passes of one loop, over one cache of keys and values."""

    def __init__(self, model: Any, layers: Layers, cache: Any, keeps: bool) -> None:
        self.model, self.layers, self.keeps = model, layers, keeps
        self.fits = list(cache.cache_allocators) == [_FULL]
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None
        self._passes: OrderedDict[tuple, _Pass] = OrderedDict()
        self._rooms: OrderedDict[tuple, Room] = OrderedDict()
        self._owners: list[Rows | None] = []
        self._last: tuple[set[Rows], Room | None] = (set(), None)

    def takes(self, parts: Sequence[Part], begun: bool) -> bool:
        """Whether the next step is for a recorded pass: all add a token to a past, nothing is merged, no DoRA."""
        self._owners = [rows for rows, _ in parts]
        if not (self.fits and begun and self.layers.merged is None and all(count == 1 for _, count in parts)):
            return False
        return not any(rows.gained for rows in self._owners if rows)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """The logits ``[n, vocab]`` of the step that was taken, from what transformers gives the model."""
        bounds = batch["cu_seq_lens_k"][_FULL].tolist()
        longest = max(stop - start for start, stop in itertools.pairwise(bounds))
        room = self._placed(list(dict.fromkeys(rows for rows in self._owners if rows)))
        key = (room, _up(len(self._owners), 1), _up(longest, _KEYS))
        if key not in self._passes:
            self._passes[key] = _Pass(self, *key)
        self._passes.move_to_end(key)
        if len(self._passes) > _KEPT:
            self._passes.popitem(last=False)
        found = self._passes[key]
        found.fill(batch, self._owners)
        return found.run(batch)[: len(self._owners)]

    def _placed(self, there: list[Rows]) -> Room | None:
        """The room where these adapters are now; those that act on the same layers share one."""
        if self._last[0] == set(there):
            return self._last[1]
        room = None
        if there:
            touched = tuple(sorted({index for rows in there for index in rows.ups}))
            key = (touched, _up(sum(rows.rank for rows in there), _RANKS))
            if key not in self._rooms:
                self._rooms[key] = Room(self.layers, *key)
            self._rooms.move_to_end(key)
            if len(self._rooms) > _ROOMS:
                _, old = self._rooms.popitem(last=False)
                for stale in [key for key in self._passes if key[0] is old]:
                    del self._passes[stale]
            room = self._rooms[key]
            room.place(there)
        self._last = (set(there), room)
        return room


class Room:
    """The factors of adapters in `size` rows of fixed tensors, at the layers they touch.

    A group's ``A [layers * size, in]`` has `size` rows for each of its layers; ``B [size, out]`` is a layer's own. An
    adapter takes the same rows everywhere, and has zeros in B where it does not act.
    """

    def __init__(self, layers: Layers, touched: tuple[int, ...], size: int) -> None:
        self.layers, self.touched, self.size = layers, touched, size
        self.places: MutableMapping[Rows, int] = weakref.WeakKeyDictionary()
        self.groups = layers.by_group(touched)
        to: Any = {"device": layers.model.device, "dtype": layers.model.dtype}
        of = layers.layers
        self.A = {g: torch.zeros(len(each) * size, of[each[0]].into, **to) for g, each in self.groups.items()}
        self.B = {index: torch.zeros(size, of[index].out, **to) for index in touched}

    def place(self, wanted: Sequence[Rows]) -> None:
        """Have some adapters in it, moving none that is there unless their rows lie too scattered."""
        for rows in wanted:
            if rows in self.places:
                continue
            start = self._free(rows.rank)
            if start is None:
                for each in [each for each in self.places if each not in wanted]:
                    del self.places[each]
                start = self._free(rows.rank)
            if start is None:
                self.places.clear()
                return self.place(wanted)
            self.places[rows] = start
            self._write(rows, start)
        return None

    def work(self, tokens: int, others: Tensor) -> list[Any]:
        """What each layer does; see `Layers.plan`."""
        work: list[Any] = [None] * len(self.layers.layers)
        for group, each in self.groups.items():
            last = self.layers.last(each)
            for place, index in enumerate(each):
                up = Up(place * self.size, (place + 1) * self.size, self.B[index])
                work[index] = ([(0, tokens, Down(self.A[group], others))], [(0, 0, tokens, up)], index == last)
        return work

    def _free(self, count: int) -> int | None:
        """The first so many free rows."""
        start = first_fit(((at, rows.rank) for rows, at in self.places.items()), count)
        return start if start + count <= self.size else None

    def _write(self, rows: Rows, start: int) -> None:
        into: list[Tensor] = []
        given: list[Tensor] = []
        for group, each in self.groups.items():
            for place, index in enumerate(each):
                B, up = self.B[index][start : start + rows.rank], rows.ups.get(index)
                if up is None or up.hi - up.lo < rows.rank:
                    B.zero_()
                if up is None:
                    continue
                at = place * self.size + start
                into += [self.A[group][at : at + up.hi - up.lo], B[: up.hi - up.lo]]
                given += self.layers.factors(rows, index)
        torch._foreach_copy_(into, given)


class _Pass:
    """A pass for `count` requests of at most `longest` keys; on a GPU, one graph."""

    def __init__(self, recorder: Recorder, room: Room | None, count: int, longest: int) -> None:
        self.recorder, self.room = recorder, room
        device = recorder.model.device
        numbers: Any = {"dtype": torch.long, "device": device}
        self.ids, self.positions = (torch.zeros(1, count, **numbers) for _ in range(2))
        self.write, self.index = torch.zeros(count, **numbers), torch.zeros(count, longest, **numbers)
        self.valid = torch.zeros(count, 1, 1, longest, dtype=torch.bool, device=device)
        self.others = torch.ones(count, 1, room.size, dtype=torch.bool, device=device) if room else None
        self.all, self.along = torch.arange(count, **numbers), torch.arange(longest, **numbers)
        self.work = room.work(count, self.others) if room and self.others is not None else None
        self.taken: list[tuple[int, int]] = []
        self.graph: Any = None
        self.out: Tensor | None = None

    def fill(self, batch: dict[str, Any], owners: Sequence[Rows | None]) -> None:
        """Copy what this step has to where the pass reads it."""
        rows = torch.where(self.all < len(owners), self.all, 0)
        self.ids.copy_(batch["input_ids"][:, rows])
        self.positions.copy_(batch["position_ids"][:, rows])
        self.write.copy_(batch["write_index"][0][rows])
        read, bounds = batch["read_index"][0], batch["cu_seq_lens_k"][_FULL].long()
        starts, ends = bounds[rows, None], bounds[rows + 1, None]
        at = starts + self.along
        # Past its own keys a request reads its first one, masked: whatever others have there does not matter.
        self.index.copy_(read[torch.where(at < ends, at, starts)])
        self.valid.copy_((at < ends)[:, None, None])
        if self.room and self.others is not None:
            taken = [(self.room.places[rows], rows.rank) if rows else (0, 0) for rows in owners]
            taken += taken[:1] * (len(self.all) - len(taken))  # what repeats a request writes the same keys as it does
            if taken != self.taken:
                own = torch.ones(self.others.shape, dtype=torch.bool)
                for place, (start, rank) in enumerate(taken):
                    own[place, 0, start : start + rank] = False
                self.others.copy_(own)
                self.taken = taken

    def run(self, batch: dict[str, Any]) -> Tensor:
        """The logits of all its rows, in memory that the next run of any pass may use."""
        if self.graph is None:
            self.out = self._forward(batch)  # a first time by itself, since it may choose and plan
            if self.recorder.pool is not None:
                self._record(batch)
        if self.graph is not None:
            self.graph.replay()
        assert self.out is not None
        return self.out

    def _record(self, batch: dict[str, Any]) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads load adapters meanwhile.
            with torch.cuda.graph(graph, self.recorder.pool, capture_error_mode="thread_local"):
                self.out = self._forward(batch)
            self.graph = graph
        except RuntimeError as fault:  # a model that waits for its GPU somewhere
            self.recorder.fits = False
            _log.warning("steps are not recorded, which makes them slower: %s", (str(fault).splitlines() or [""])[0])
            self.out = self._forward(batch)

    def _forward(self, batch: dict[str, Any]) -> Tensor:
        layers, count = self.recorder.layers, len(self.all)
        single = attention.Single(slice(0, count), self.index.flatten(), self.valid, *self.index.shape)
        given = {"input_ids": self.ids, "position_ids": self.positions, "write_index": [self.write]}
        given |= {attention.KEYWORD: attention.Decoding(single)}
        if self.recorder.keeps:
            given["logits_to_keep"] = self.all
        layers.idle()
        if self.work is not None:
            layers.work = self.work
        logits = self.recorder.model(**batch | given).logits[0]
        layers.idle()
        return logits


def _up(number: int, least: int) -> int:
    """The next power of two, `least` at least."""
    return max(least, 1 << (number - 1).bit_length())
