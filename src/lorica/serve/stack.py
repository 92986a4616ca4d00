"""An adapter as the layers take it, and several of one shape stacked for batched products."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor


class Up(NamedTuple):
    """The second factor of one layer: rows `lo` to `hi` of its group's first product are its.

    ``B [r, out]`` has the scale folded in; of DoRA the gain too, and ``gain [out]`` is what the base's output takes.
    """

    lo: int
    hi: int
    B: Tensor
    gain: Tensor | None = None

    def sliced(self, count: int) -> Up:
        """The first so many of stacked ones."""
        return self._replace(B=self.B[:count], gain=None if self.gain is None else self.gain[:count])


@dataclass(frozen=True, eq=False)
class Rows:
    """An adapter as the layers take it; a `store.Payload`.

    Attributes:
        downs: by group, ``A [R, in]`` of its layers on top of each other.
        ups: by layer, the rest.
        shape: the same for adapters that can be stacked.
    """

    downs: dict[int, Tensor]
    ups: dict[int, Up]
    shape: tuple[tuple[int, int, bool], ...]
    rank: int
    nbytes: int

    @functools.cached_property
    def gained(self) -> bool:
        """Whether it scales the base's output anywhere, as DoRA does."""
        return any(gained for *_, gained in self.shape)

    def negated(self) -> Rows:
        """The same with the opposite sign, without DoRA's gains."""
        return replace(self, ups={layer: up._replace(B=-up.B, gain=None) for layer, up in self.ups.items()})


class Stack:
    """Adapters of one shape, one slot each and no slot empty, stacked for batched products."""

    def __init__(self) -> None:
        self.slots: list[Rows] = []
        self.downs: dict[int, Tensor] = {}
        self.ups: dict[int, Up] = {}

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
                for layer, up in fresh.ups.items():
                    self.ups[layer].B[place].copy_(up.B)
                    if up.gain is not None:
                        self.ups[layer].gain[place].copy_(up.gain)  # type: ignore[index]
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
        for layer, up in like.ups.items():
            old = self.ups.get(layer) or up._replace(B=None, gain=None)  # type: ignore[arg-type]
            gain = None if up.gain is None else larger(old.gain, up.gain)
            self.ups[layer] = up._replace(B=larger(old.B, up.B), gain=gain)
