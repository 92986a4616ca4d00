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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica import weights
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.kernels import mixed
from lorica.targets import candidates

Part = tuple["Rows | None", int]  # an adapter, None for the base, and how many token rows it has


@dataclass(frozen=True, eq=False)
class Rows:
    """An adapter as the layers take it; a `store.Payload`.

    Attributes:
        downs: by group, ``A [R, in]`` of its layers on top of each other.
        ups: by layer, which rows of that are its, and ``B [r, out]`` with the scale folded in.
        shape: the same for adapters that can be stacked.
    """

    downs: dict[int, Tensor]
    ups: dict[int, tuple[int, int, Tensor]]
    shape: tuple[tuple[int, int], ...]
    rank: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """`order`: the parts' places as they have to lie in the batch; `work`: what each layer does, None for nothing."""

    order: list[int]
    work: list[Any]


class _Stack:
    """Adapters of one shape, one slot each and no slot empty, stacked for batched products."""

    def __init__(self) -> None:
        self.slots: list[Rows] = []
        self.downs: dict[int, Tensor] = {}
        self.ups: dict[int, tuple[int, int, Tensor]] = {}

    def place(self, wanted: list[Rows]) -> list[Rows]:
        """Give every adapter a slot, moving as few as possible; the adapters by slot."""
        kept = set(wanted)
        new = [each for each in wanted if each not in set(self.slots)]
        slots: list[Rows | None] = [each if each in kept else None for each in self.slots]
        while len(slots) > len(wanted):
            last = slots.pop()
            if last is not None:
                new.append(last)
        slots += [None] * (len(wanted) - len(slots))
        self._grow(len(slots), wanted[0])
        for place, each in enumerate(slots):
            if each is None:
                slots[place] = fresh = new.pop()
                for group, A in fresh.downs.items():
                    self.downs[group][place].copy_(A)
                for layer, (_, _, B) in fresh.ups.items():
                    self.ups[layer][2][place].copy_(B)
        self.slots = slots  # type: ignore[assignment]
        return self.slots

    def _grow(self, count: int, like: Rows) -> None:
        have = next(iter(self.downs.values())).shape[0] if self.downs else 0
        if count <= have:
            return
        room = max(count, 2 * have)

        def larger(old: Tensor | None, one: Tensor) -> Tensor:
            new = one.new_empty(room, *one.shape)
            if old is not None:
                new[:have] = old
            return new

        self.downs = {group: larger(self.downs.get(group), A) for group, A in like.downs.items()}
        old = {layer: B for layer, (_, _, B) in self.ups.items()}
        self.ups = {layer: (lo, hi, larger(old.get(layer), B)) for layer, (lo, hi, B) in like.ups.items()}


class _Layer:
    """One linear layer of the base and the group it reads its input with."""

    def __init__(self, path: str, module: nn.Module, index: int) -> None:
        kind = weights.storage(module)
        assert kind is not None
        self.path, self.module, self.index = path, module, index
        self.out, self.into = kind.shape(module)
        self.group = _Group(index)


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
    """The linear layers of a base. `work` says what each does now; see `plan`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        fitting = {path: module for path, module in candidates(model).items() if _fits(module)}
        self.layers = [_Layer(path, module, index) for index, (path, module) in enumerate(fitting.items())]
        self._by_path = {layer.path: layer for layer in self.layers}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.head = next((layer.index for layer in self.layers if layer.module is head), None)
        self.work: list[Any] = [None] * len(self.layers)
        self._stacks: dict[tuple, _Stack] = {}
        self._last: tuple[Any, Plan] | None = None
        self._join()

    @torch.no_grad()
    def _join(self) -> None:
        """Find the layers that are called with the same tensor."""
        seen: list[tuple[Tensor, _Layer]] = []
        hooks = [
            layer.module.register_forward_pre_hook(lambda _, args, layer=layer: seen.append((args[0], layer)))
            for layer in self.layers
        ]
        device: Any = self.model.device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for (x, layer), (before, earlier) in zip(seen[1:], seen, strict=False):
            if x is before:
                layer.group = earlier.group
        self._called = {layer.index: turn for turn, (_, layer) in enumerate(seen)}

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
        base, index, group = type(layer.module).forward, layer.index, layer.group
        module, into, out = layer.module, layer.into, layer.out

        def forward(x: Tensor) -> Tensor:
            y = base(module, x)  # type: ignore[operator]
            work = self.work[index]
            if work is None:
                return y
            downs, ups, last = work
            rows = x.reshape(-1, into)
            if group.x is not x:
                group.x = x
                group.products = [
                    mixed.stacked_down(rows[a:b], A) if A.ndim == 3 else torch.mm(rows[a:b], A.T) for a, b, A in downs
                ]
            flat = y.view(-1, out)
            for place, a, b, lo, hi, B in ups:
                s = group.products[place]
                if B.ndim == 3:
                    mixed.stacked_up(flat[a:b], s[:, :, lo:hi], B)
                else:
                    mixed.segment(flat[a:b], s[:, lo:hi], B)
            if last:
                group.clear()
            return y

        return forward

    def plan(self, parts: Sequence[Part], kept: Sequence[bool] | None = None) -> Plan:
        """What to do for a batch. `kept`: which parts the head sees, with their last row; default: all rows.

        Parts of one adapter become neighbours, those of the base come last.
        """
        key = (tuple(parts), tuple(kept or ()))
        if self._last and self._last[0] == key:
            return self._last[1]
        totals: Counter[Rows] = Counter()
        for rows, count in parts:
            if rows is not None:
                totals[rows] += count
        shapes = Counter(rows.shape for rows, total in totals.items() if total == 1)
        stacks: dict[tuple, list[Rows]] = {}
        for rows, total in totals.items():
            if total == 1 and shapes[rows.shape] > 1:
                stacks.setdefault(rows.shape, []).append(rows)
        self._stacks = {shape: self._stacks.get(shape) or _Stack() for shape in stacks}
        runs: list[tuple[list[Rows], _Stack | None]] = [
            (self._stacks[shape].place(wanted), self._stacks[shape]) for shape, wanted in stacks.items()
        ]
        stacked = {rows for wanted in stacks.values() for rows in wanted}
        runs += [([rows], None) for rows in totals if rows not in stacked]
        turn = {rows: place for place, rows in enumerate(rows for run, _ in runs for rows in run)}
        order = sorted(range(len(parts)), key=lambda i: turn.get(parts[i][0], len(turn)))  # type: ignore[arg-type]
        work = self._work(runs, totals)
        if kept is not None and self.head is not None and work[self.head]:
            seen = Counter(rows for (rows, _), keep in zip(parts, kept, strict=True) if keep and rows is not None)
            work[self.head] = self._work(runs, seen)[self.head]
        self._last = (key, Plan(order, work))
        return self._last[1]

    def _work(self, runs: Sequence[tuple[list[Rows], _Stack | None]], counts: Counter[Rows]) -> list[Any]:
        """By layer ``(downs, ups, last)``.

        A down is ``(start, stop, A)``; an up is ``(place in downs, start, stop, from, to, B)``; `last` says that no
        other layer of the group reads the products.
        """
        downs: dict[int, list[Any]] = {}
        ups: dict[int, list[Any]] = {}
        start = 0
        for run, stack in runs:
            # A head sees some of a stack's tokens only; then each goes by itself.
            whole = stack is not None and all(counts[rows] for rows in run)
            for source in [stack] if whole else run:
                stop = start + (len(run) if whole else counts[source])  # type: ignore[index]
                if stop > start:
                    places = {}
                    for group, A in source.downs.items():  # type: ignore[union-attr]
                        places[group] = len(downs.setdefault(group, []))
                        downs[group].append((start, stop, A[: len(run)] if whole else A))
                    for layer, (lo, hi, B) in source.ups.items():  # type: ignore[union-attr]
                        place = places[self.layers[layer].group.index]
                        ups.setdefault(layer, []).append((place, start, stop, lo, hi, B[: len(run)] if whole else B))
                start = stop
        last = {
            self.layers[index].group.index: index for index in sorted(ups, key=lambda index: self._called.get(index, 0))
        }
        return [
            (downs[layer.group.index], ups[layer.index], last[layer.group.index] == layer.index)
            if layer.index in ups
            else None
            for layer in self.layers
        ]

    def idle(self) -> None:
        """Forget the last batch."""
        self.work, self._last = [None] * len(self.layers), None
        for layer in self.layers:
            layer.group.clear()

    def read(self, folder: Path) -> Rows:
        """An adapter from its files; every reason why it cannot be served on this base is in one error."""
        return self.rows(Adapter.load(folder))

    def rows(self, adapter: Adapter) -> Rows:
        """An adapter as the layers take it."""
        tensors = dict(adapter.tensors)
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        faults = []
        for target in adapter.targets:
            layer, part = self._by_path.get(target.path), target.part or "lora"
            A, B = (tensors.pop(f"{target.path}#{part}.{factor}", None) for factor in "AB")
            if layer is None or A is None or B is None:
                faults.append(f"{target}: no linear layer of this model, so it is served merged only")
                continue
            rows = target.rows or (0, layer.out)
            if A.shape[-1] != layer.into or B.shape[0] != rows[1] - rows[0] or rows[1] > layer.out:
                faults.append(f"{target}: A {tuple(A.shape)}, B {tuple(B.shape)}; layer ({layer.out}, {layer.into})")
                continue
            whole = B.new_zeros(A.shape[0], layer.out)
            whole[:, rows[0] : rows[1]] = B.T * adapter.method.scale_of(target.key)
            found.setdefault(layer.index, []).append((A, whole))
        faults += [f"{key}: trained beside the low-rank updates, so it is served merged only" for key in tensors]
        if faults or not found:
            raise all_faults("this adapter cannot be mixed with others on this base:", faults or ["it has no targets"])
        return self._made(found)

    def _made(self, found: dict[int, list[tuple[Tensor, Tensor]]]) -> Rows:
        stacks: dict[int, list[Tensor]] = {}
        ups: dict[int, tuple[int, int, Tensor]] = {}
        for index in sorted(found):
            layer = self.layers[index]
            like = next(layer.module.parameters())
            to = {"device": like.device, "dtype": like.dtype if like.is_floating_point() else self.model.dtype}
            A = torch.cat([A for A, _ in found[index]]).to(**to)  # type: ignore[call-overload]
            B = torch.cat([B for _, B in found[index]]).to(**to).contiguous()  # type: ignore[call-overload]
            above = stacks.setdefault(layer.group.index, [])
            lo = sum(each.shape[0] for each in above)
            above.append(A)
            ups[index] = (lo, lo + A.shape[0], B)
        downs = {group: torch.cat(each).contiguous() for group, each in stacks.items()}
        nbytes = sum(A.nbytes for A in downs.values()) + sum(B.nbytes for _, _, B in ups.values())
        shape = tuple((index, hi - lo) for index, (lo, hi, _) in ups.items())
        return Rows(downs, ups, shape, max(r for _, r in shape), nbytes)


def _fits(module: nn.Module) -> bool:
    kind = weights.storage(module)
    return kind is not None and not kind.takes_ids and not kind.inside and kind.name != "conv"
