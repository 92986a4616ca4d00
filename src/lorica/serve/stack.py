"""An adapter as the layers take it, and several of one shape stacked for batched products."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from lorica.kernels import mixed


class Down(NamedTuple):
    """The first factors of a group of layers: ``A [R, in]``, or one for each token, ``[n, R, in]``.

    ``others [n, 1, R]``: which rows are not a token's.
    """

    A: Tensor
    others: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The first product for some tokens ``[n, in]``: ``[n, R]``, stacked ``[n, 1, R]``."""
        s = mixed.stacked_down(x, self.A) if self.A.ndim == 3 else mixed.segment_down(x, self.A)
        if self.others is not None:
            s.view(len(s), -1, self.others.shape[-1]).masked_fill_(self.others, 0)
        return s


class Up(NamedTuple):
    """The second factor of one layer: rows `lo` to `hi` of its group's first product are its.

    ``B [r, out]`` has the scale folded in; of DoRA the gain too, and ``gain [out]`` is what the base's output takes.
    Stacked, both have one more axis, for the tokens.
    """

    lo: int
    hi: int
    B: Tensor
    gain: Tensor | None = None

    def onto(self, y: Tensor, s: Tensor, bias: Tensor | None) -> None:
        """Add it to the base's output ``[n, out]`` in place."""
        if self.gain is not None:
            mixed.gained(y, self.gain, bias)
        if s.shape[-1] != self.hi - self.lo:
            s = s[..., self.lo : self.hi]
        if self.B.ndim == 3:
            mixed.stacked_up(y, s, self.B)
        else:
            mixed.segment_up(y, s, self.B)


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

    @functools.cached_property
    def even(self) -> tuple[int, ...]:
        """Its layers if it has one rank at all of them and scales no output, else none."""
        plain = all(rank == self.rank and not gained for _, rank, gained in self.shape)
        return tuple(index for index, *_ in self.shape) if plain else ()

    def negated(self) -> Rows:
        """The same with the opposite sign, without DoRA's gains."""
        return replace(self, ups={layer: up._replace(B=-up.B, gain=None) for layer, up in self.ups.items()})


class Stack:
    """Adapters of one shape, one slot each and no slot empty, for batched products. `downs` and `ups` are theirs."""

    def __init__(self) -> None:
        self.slots: list[Rows] = []
        self.downs: dict[int, Down] = {}
        self.ups: dict[int, Up] = {}
        self._downs: dict[int, Tensor] = {}
        self._ups: dict[int, Up] = {}

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
                    self._downs[group][place].copy_(A)
                for layer, up in fresh.ups.items():
                    self._ups[layer].B[place].copy_(up.B)
                    if up.gain is not None:
                        self._ups[layer].gain[place].copy_(up.gain)  # type: ignore[index]
        self.slots = slots  # type: ignore[assignment]
        count = len(slots)
        self.downs = {group: Down(A[:count]) for group, A in self._downs.items()}
        self.ups = {
            layer: up._replace(B=up.B[:count], gain=None if up.gain is None else up.gain[:count])
            for layer, up in self._ups.items()
        }
        return self.slots

    def _grow(self, count: int, like: Rows) -> None:
        have = next(iter(self._downs.values())).shape[0] if self._downs else 0
        if count <= have:
            return
        room = max(count, 2 * have)

        def larger(old: Tensor | None, one: Tensor) -> Tensor:
            new = one.new_empty(room, *one.shape)
            if old is not None:
                new[:have] = old
            return new

        self._downs = {group: larger(self._downs.get(group), A) for group, A in like.downs.items()}
        for layer, up in like.ups.items():
            old = self._ups.get(layer) or up._replace(B=None, gain=None)  # type: ignore[arg-type]
            gain = None if up.gain is None else larger(old.gain, up.gain)
            self._ups[layer] = up._replace(B=larger(old.B, up.B), gain=gain)


def first_fit(taken: Iterable[tuple[int, int]], count: int) -> int:
    """Where so many neighbouring rows are free, of which some runs ``(start, length)`` are taken."""
    start = 0
    for at, length in sorted(taken):
        if at - start >= count:
            break
        start = at + length
    return start
