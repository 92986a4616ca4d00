"""The adapters of one step at every linear layer of the base: which token rows are whose, and the products for them.

    layers = Layers(model)
    payload = layers.read(folder)                    an adapter, checked against the model
    with layers.attached():
        plan = layers.plan([(payload, 5), (None, 1), ...])
        layers.work = plan.work                      the batch's token rows in plan.order
        model(...)

Layers that read the same input share the first product: which do is seen by running the model once. Nothing is added
for tokens of the base, and with no adapter in the batch every layer runs as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica import dora, weights
from lorica.adapter import Adapter
from lorica.errors import LoricaError
from lorica.kernels import few, mixed
from lorica.serve import reading
from lorica.serve.ragged import Ragged
from lorica.serve.stack import Down, Rows, Stack
from lorica.serve.staging import loading
from lorica.targets import candidates

_FEW = 64  # tokens of adapters in a step that mostly decodes
Side = Stack | Ragged
Part = tuple[Rows | None, int]  # an adapter, None for the base, and how many token rows it has


@dataclass(frozen=True)
class Plan:
    """`order`: the parts' places as they have to lie in the batch; `work`: what each layer does, None for nothing."""

    order: list[int]
    work: list[Any]


class _Masked(NamedTuple):
    """The work of one layer for a few tokens of many adapters, as `kernels.mixed.masked` does it."""

    tokens: int
    A: Tensor
    B: Tensor
    mask: Tensor
    gain: Tensor | None


class _Layer:
    """One linear layer of the base and the group it reads its input with."""

    def __init__(self, path: str, module: nn.Module, index: int) -> None:
        self.kind = weights.storage_of(module)
        self.path, self.module, self.index = path, module, index
        self.out, self.into = self.kind.shape(module)
        self.group = _Group(index)
        self.own: Tensor | None = None  # the base's weight, while the module has another

    def gain(self, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
        """DoRA's ``m / ||W + scale B A||`` of this layer ``[out]``."""
        W = self.kind.read(self.module) if self.own is None else self.kind.stored(self.own.float())
        return dora.gain(m, dora.norms(W, A.to(W.device), B.to(W.device), scale).to(m.device))


class _Group:
    """Layers that read one input; it remembers the products of that input until the next one comes."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.clear()

    def clear(self) -> None:
        """Let go of the input."""
        self.x: Tensor | None = None
        self.products: list[Tensor] = []


class Layers:
    """The linear layers of a base. `work` says what each does now; see `plan`.

    With `deterministic`, no way of multiplying is chosen by its speed: another process would choose another.
    """

    def __init__(self, model: nn.Module, deterministic: bool = False) -> None:
        self.model, self.deterministic = model, deterministic
        fitting = {path: module for path, module in candidates(model).items() if _fits(module)}
        self.layers = [_Layer(path, module, index) for index, (path, module) in enumerate(fitting.items())]
        self.by_path = {layer.path: layer for layer in self.layers}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = next((layer.index for layer in self.layers if layer.module is head), None)
        self.work: list[Any] = [None] * len(self.layers)
        self.masked = bool(self.model.device.type == "cuda")  # few calls count there, arithmetic does not
        self.ragged = self.model.device.type == "cpu" and self.model.dtype == torch.float32
        self.tokens: Counter[Rows | None] | None = None  # of each adapter, where somebody counts them
        self.merged: Rows | None = None
        self._minus: Rows | None = None
        self.lock = threading.Lock()  # of which weights are in place
        self._sides: dict[tuple, Side] = {}
        self._last: tuple[Any, Plan] | None = None
        self._join()

    @torch.no_grad()
    def _join(self) -> None:
        """Run the model once: find the layers that are called with the same tensor, and those that see every token."""
        seen: list[tuple[Tensor, _Layer]] = []
        hooks = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer: seen.append((args[0], layer)))
            for layer in self.layers
        ]
        device: Any = self.model.device
        ids = torch.zeros(1, 5, dtype=torch.long, device=device)
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for (x, layer), (before, earlier) in zip(seen[1:], seen, strict=False):
            if x is before:
                layer.group = earlier.group
        self._called = {layer.index: turn for turn, (_, layer) in enumerate(seen)}
        partly = {layer.index for x, layer in seen if x.numel() != 5 * layer.into}
        self.whole = set(self._called) - partly

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Let the layers follow `work`."""
        with contextlib.ExitStack() as undo:
            for layer in self.layers:
                if "forward" in vars(layer.module):
                    raise LoricaError(f"the forward of {layer.path} was replaced, so no adapter can act there")
                layer.module.forward = self._forward(layer)  # type: ignore[method-assign,assignment]
                undo.callback(delattr, layer.module, "forward")
            yield

    def _forward(self, layer: _Layer) -> Any:
        module: Any = layer.module
        base, index, group, into, out = type(module).forward, layer.index, layer.group, layer.into, layer.out
        tried = base is nn.Linear.forward and not self.deterministic
        most = few.most(module.weight) if tried else 0

        def forward(x: Tensor) -> Tensor:
            work, rows = self.work[index], x.reshape(-1, into)
            if 1 < rows.shape[0] <= most:
                flat = few.linear(rows, module.weight, module.bias)
            elif work is None:
                return base(module, x)
            else:
                flat = base(module, x).view(-1, out)
            if isinstance(work, _Masked):
                n, A, B, mask, gain = work
                if gain is not None:
                    mixed.gained(flat[:n], gain, module.bias)
                mixed.masked(flat[:n], rows[:n], A, B, mask)
            elif work is not None:
                downs, ups, last = work
                if group.x is not x:
                    group.x = x
                    group.products = [down.of(_cut(rows, a, b)) for a, b, down in downs]
                for place, a, b, up in ups:
                    up.onto(_cut(flat, a, b), group.products[place], module.bias)
                if last:
                    group.clear()
            return flat.view(*x.shape[:-1], out)

        return forward

    def plan(self, parts: Sequence[Part], kept: Sequence[bool] | None = None) -> Plan:
        """What to do for a batch. `kept`: which parts the head sees, with their last row; default: all rows.

        Parts of one adapter become neighbours; after them come those of the base, then those of the merged adapter.
        """
        key = (tuple(parts), tuple(kept or ()))
        if self._last and self._last[0] == key:
            return self._last[1]
        totals: Counter[Rows] = Counter()
        for rows, count in parts:
            if rows is not None and rows is not self.merged:
                totals[rows] += count
        few = self.masked and self.merged is None and len(totals) > 1 and totals.total() <= _FEW
        runs = [([rows], None) for rows in totals] if few else self._runs(totals)
        turn: dict[Rows | None, int] = {rows: place for place, rows in enumerate(r for run, _ in runs for r in run)}
        turn |= {None: len(turn), self.merged: len(turn) + (self.merged is not None)}
        order = sorted(range(len(parts)), key=lambda i: turn[parts[i][0]])

        def work_of(counts: Counter[Rows], whole: Sequence[int]) -> list[Any]:
            if few:
                return self._masked(counts)
            others = sum(count for (rows, _), count in zip(parts, whole, strict=True) if rows is not self.merged)
            return self._work(runs, counts, others)

        work = work_of(totals, [count for _, count in parts])
        if kept is not None and self.head is not None and work[self.head]:
            last = Counter(rows for (rows, _), keep in zip(parts, kept, strict=True) if keep)
            work[self.head] = work_of(Counter({rows: last[rows] for rows in totals}), kept)[self.head]
        self._last = (key, Plan(order, work))
        return self._last[1]

    def factors(self, rows: Rows, index: int) -> tuple[Tensor, Tensor]:
        """An adapter's ``A [r, in]`` and ``B [r, out]`` at one layer."""
        up = rows.ups[index]
        return rows.downs[self.layers[index].group.index][up.lo : up.hi], up.B

    def count(self, parts: Sequence[Part]) -> None:
        """Note the tokens of a batch, where somebody counts them."""
        if self.tokens is not None:
            for rows, count in parts:
                self.tokens[rows] += count

    def merge(self, rows: Rows, changed: Mapping[int, Tensor]) -> None:
        """Let the base's weights hold an adapter's update: `changed`, by layer. All other tokens have it subtracted.

        Between two steps only; see `dominant`.
        """
        self.idle()
        with self.lock:
            for index, weight in changed.items():
                parameter: Any = self.layers[index].module.weight
                self.layers[index].own, parameter.data = parameter.data, weight
        self.merged, self._minus = rows, rows.negated()

    def unmerge(self) -> None:
        """Put the base's own weights back."""
        self.idle()
        with self.lock:
            for layer in self.layers:
                if layer.own is not None:
                    parameter: Any = layer.module.weight
                    parameter.data, layer.own = layer.own, None
        self.merged = self._minus = None

    def _runs(self, totals: Counter[Rows]) -> list[tuple[list[Rows], Side | None]]:
        """Adapters in the order of their tokens; those with one token each side by side, if possible."""
        single = [rows for rows, total in totals.items() if total == 1]
        ranks: dict[tuple, set[int]] = {}
        for rows in single:
            ranks.setdefault(rows.even, set()).add(rows.rank)
        sides: dict[tuple, list[Rows]] = {}
        for rows in single:
            ragged = self.ragged and rows.even and len(ranks[rows.even]) > 1
            sides.setdefault(rows.even if ragged else rows.shape, []).append(rows)
        sides = {key: wanted for key, wanted in sides.items() if len(wanted) > 1}
        self._sides = {key: self._sides.get(key) or self._side(key, wanted[0]) for key, wanted in sides.items()}
        runs: list[tuple[list[Rows], Side | None]] = [
            (self._sides[key].place(wanted), self._sides[key]) for key, wanted in sides.items()
        ]
        placed = {rows for wanted in sides.values() for rows in wanted}
        runs += [([rows], None) for rows in totals if rows not in placed]
        return runs

    def _side(self, key: tuple, like: Rows) -> Side:
        return Stack() if key == like.shape else Ragged(self.by_group(like.ups))

    def _masked(self, counts: Counter[Rows]) -> list[Any]:
        """By layer, a `_Masked`."""
        work: list[Any] = []
        owners = [place for place, rows in enumerate(counts) for _ in range(counts[rows])]
        masks: dict[tuple[int, ...], Tensor] = {}
        for layer in self.layers:
            ups = [rows.ups.get(layer.index) for rows in counts]
            there = [(rows.downs[layer.group.index], up) for rows, up in zip(counts, ups, strict=True) if up]
            if not there or not owners:
                work.append(None)
                continue
            A = torch.cat([A[up.lo : up.hi] for A, up in there])
            ranks = tuple(up.hi - up.lo if up else 0 for up in ups)
            if ranks not in masks:
                masks[ranks] = mixed.mask_of(owners, ranks, A)
            gain = None
            if any(up.gain is not None for _, up in there):
                none = A.new_ones(layer.out)
                every = [none if up is None or up.gain is None else up.gain for up in ups]
                gain = torch.stack([every[owner] for owner in owners])
            B = torch.cat([up.B for _, up in there])
            work.append(_Masked(len(owners), A, B, masks[ranks], gain))
        return work

    def _work(self, runs: Sequence[tuple[list[Rows], Side | None]], counts: Counter[Rows], others: int) -> list[Any]:
        """By layer ``(downs, ups, last)``; the first `others` tokens are not of the merged adapter.

        A down is ``(start, stop, first factors)``; an up is ``(place in downs, start, stop, second factor)``; `last`
        says that no other layer of the group reads the products.
        """
        downs: dict[int, list[Any]] = {}
        ups: dict[int, list[Any]] = {}
        start = 0

        def add(first: Mapping[int, Any], second: Mapping[int, Any], start: int, stop: int) -> None:
            places = {}
            for group, down in first.items():
                places[group] = len(downs.setdefault(group, []))
                downs[group].append((start, stop, down))
            for layer, up in second.items():
                ups.setdefault(layer, []).append((places[self.layers[layer].group.index], start, stop, up))

        def alone(rows: Rows, start: int, stop: int) -> None:
            add({group: Down(A) for group, A in rows.downs.items()}, rows.ups, start, stop)

        if self._minus and others:
            alone(self._minus, 0, others)  # first, since what DoRA scales is the base's output
        for run, side in runs:
            # A head sees some of these tokens only; then each goes by itself.
            if side is not None and all(counts[rows] for rows in run):
                add(side.downs, side.ups, start, start + len(run))
                start += len(run)
                continue
            for rows in run:
                if counts[rows]:
                    alone(rows, start, start + counts[rows])
                start += counts[rows]
        last = {group: self.last(each) for group, each in self.by_group(ups).items()}
        return [
            (downs[layer.group.index], ups[layer.index], last[layer.group.index] == layer.index)
            if layer.index in ups
            else None
            for layer in self.layers
        ]

    def by_group(self, indices: Iterable[int]) -> dict[int, list[int]]:
        """Some layers by the group that each is of."""
        found: dict[int, list[int]] = {}
        for index in indices:
            found.setdefault(self.layers[index].group.index, []).append(index)
        return found

    def last(self, indices: Sequence[int]) -> int:
        """Which of some layers the model calls last."""
        return max(indices, key=lambda index: self._called.get(index, 0))

    def idle(self) -> None:
        """Forget the last batch."""
        self.work, self._last = [None] * len(self.layers), None
        for layer in self.layers:
            layer.group.clear()

    def read(self, folder: Path) -> Rows:
        """An adapter from its files; every reason why it cannot be served on this base is in one error."""
        return self.rows(Adapter.load(folder))

    def rows(self, adapter: Adapter) -> Rows:
        """An adapter as the layers take it; may run beside the steps."""
        device: Any = self.model.device
        with loading(device):
            return reading.rows(self, adapter)


def _cut(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Some rows; a view takes as long as a small product, so none is made of all."""
    return tensor if stop - start == len(tensor) else tensor[start:stop]


def _fits(module: nn.Module) -> bool:
    kind = weights.storage(module)
    return kind is not None and not kind.takes_ids and not kind.inside and kind.name != "conv"
