"""The adapter that carries most of the traffic, merged: its tokens cost what the base's do.

Every layer that it changes gets a second weight, ``W + s B A``, and a switch is one of pointers, so going back is exact
to the bit. The others ride in the same batch as differences: the merged update is subtracted where their own is added
(`rows.Layers.merge`). That costs them its rank more, so it pays where one adapter has well over half of the tokens.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from lorica.kernels.documents import attending
from lorica.kernels.folding import Sums
from lorica.serve.engine import Engine
from lorica.serve.leases import Lease
from lorica.serve.rows import Layers
from lorica.serve.stack import Rows
from lorica.serve.store import Store

_PROBE = 32  # random tokens on which a merge is measured
_FADES = 0.5  # what a look leaves of the tokens counted before it


@dataclass(frozen=True)
class Merged:
    """What is merged now, and how far its logits on random tokens are from those of the unmerged adapter."""

    lease: Lease
    rows: Rows
    difference: float


class Dominant:
    """Watches which adapter has most of the tokens, and merges and unmerges. Close it before the engine stops.

    Args:
        tell: called with a sentence at every change.
        above, below: share of the tokens at which an adapter is merged, and under which it is taken out again.
        least: tokens to have seen before anything is decided.
        every: seconds between two looks.
    """

    def __init__(
        self,
        engine: Engine,
        layers: Layers,
        store: Store,
        tell: Callable[[str], None],
        *,
        above: float = 0.7,
        below: float = 0.5,
        least: int = 256,
        every: float = 2.0,
    ) -> None:
        self.engine, self.layers, self.store, self.tell = engine, layers, store, tell
        self.above, self.below, self.least = above, below, least
        self.merged: Merged | None = None
        self._refused: weakref.WeakSet[Rows] = weakref.WeakSet()
        self._every, self._done = every, threading.Event()
        layers.tokens = Counter()
        self._thread = threading.Thread(target=self._watch, name="lorica-dominant", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching and put the base's weights back."""
        self._done.set()
        self._thread.join()
        self.layers.tokens = None
        if self.merged:
            self.unmerge()

    def look(self) -> None:
        """Decide once."""
        counts = self.layers.tokens
        assert counts is not None
        seen = dict(counts)
        total = sum(seen.values())
        if total < self.least:
            return
        for rows, count in seen.items():
            counts[rows] -= count - int(count * _FADES)  # the loop goes on counting meanwhile
            if counts[rows] <= 0:
                del counts[rows]
        if self.merged and seen.get(self.merged.rows, 0) < self.below * total:
            self.unmerge()
        top = max(seen, key=seen.__getitem__)
        if self.merged is None and top is not None and top not in self._refused and seen[top] > self.above * total:
            self.merge(top, seen[top] / total)

    def merge(self, rows: Rows, share: float) -> None:
        """Compute the second weights beside the running loop, then switch and measure while it pauses."""
        lease = self.store.holding(rows)
        if lease is None:
            return
        with contextlib.ExitStack() as undo:
            undo.callback(lease.release)
            undo.callback(self._refused.add, rows)
            if reason := self._unfit(rows):
                self.tell(f"{lease.name} has {share:.0%} of the tokens and is not merged: {reason}")
                return
            try:
                difference = self._switch(rows)
            except Exception as fault:  # out of memory, or a model that does not run by itself: the server goes on
                self.tell(f"{lease.name} has {share:.0%} of the tokens and cannot be merged: {fault}")
                return
            undo.pop_all()
        self.merged = Merged(lease, rows, difference)
        dtype = str(self.layers.model.dtype).removeprefix("torch.")
        self.tell(f"{lease.name} has {share:.0%} of the tokens: merged; logits move by {difference:.1e} ({dtype})")

    def _switch(self, rows: Rows) -> float:
        """Put the merged weights in place; how far that moved logits."""
        sums = Sums()
        changed = {index: self._sum(sums, rows, index) for index in rows.ups}
        with self.engine.pause(), contextlib.ExitStack() as undo:
            before = self._logits(rows)
            undo.callback(self.layers.unmerge)
            self.layers.merge(rows, changed)
            difference = float((self._logits(rows) - before).abs().max())
            undo.pop_all()
        return difference

    def unmerge(self) -> None:
        """Put the base's own weights back, to the bit."""
        assert self.merged is not None
        with self.engine.pause():
            self.layers.unmerge()
        self.merged.lease.release()
        self.tell(f"{self.merged.lease.name} is not merged any more")
        self.merged = None

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self.look()

    def _sum(self, sums: Sums, rows: Rows, index: int) -> Tensor:
        """``W + s B A`` of a layer as it is stored, made in fp32 and rounded once."""
        layer, (A, B) = self.layers.layers[index], self.layers.factors(rows, index)
        weight = layer.module.get_parameter("weight").detach()
        merged, stored = torch.empty_like(weight), layer.kind.stored
        sums.into(stored(merged), stored(weight), A, B.T, 1.0)
        return merged

    def _unfit(self, rows: Rows) -> str | None:
        model = self.layers.model
        layers = [self.layers.layers[index] for index in rows.ups]
        parameters = [layer.module.get_parameter("weight") for layer in layers]
        owners = Counter(id(each) for module in model.modules() for each in module._parameters.values())
        if any(up.gain is not None for up in rows.ups.values()):
            return "with DoRA the difference to another adapter has no low rank"
        if any(owners[id(parameter)] > 1 for parameter in parameters):
            return "it changes a weight that two layers share"
        if any(layer.kind.packed for layer in layers):
            return "the base is quantised"
        need = sum(parameter.nbytes for parameter in parameters)
        cuda = parameters[0].is_cuda
        free = torch.cuda.mem_get_info(parameters[0].device)[0] if cuda else psutil.virtual_memory().available
        return f"a second copy of its weights takes {need:,} bytes, and {free:,} are free" if need > free / 2 else None

    @torch.no_grad()
    def _logits(self, rows: Rows) -> Tensor:
        """What the model gives on random tokens under an adapter, as the weights are now."""
        model: Any = self.layers.model
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.get_text_config().vocab_size, (1, _PROBE), generator=generator)
        self.layers.work = self.layers.plan([(rows, _PROBE)]).work
        try:
            with attending(model, "sdpa"):
                return model(input_ids=ids.to(model.device), use_cache=False).logits.float()
        finally:
            self.layers.idle()
