"""Adapters of many ranks that have one token each, side by side: nobody is padded to another's rank."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.kernels import mixed
from lorica.kernels.mixed import PIECE
from lorica.serve.stack import Rows, first_fit

_EMPTY = 0.2  # share of the room in use that may lie between adapters before they are moved together


class Pieces(NamedTuple):
    """The first factors of a group of layers, for `mixed.ragged_down`; beside `stack.Down`."""

    A: Tensor
    owners: Tensor
    rows: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The first product for some tokens ``[n, in]``: ``[layers, R]``."""
        return mixed.ragged_down(x, *self)


class Bags(NamedTuple):
    """The second factors of the layer that is `turn` of its group, for `mixed.ragged_up`; beside `stack.Up`."""

    turn: int
    B: Tensor
    rows: Tensor
    starts: Tensor

    def onto(self, y: Tensor, s: Tensor, bias: Tensor | None) -> None:
        """Add them to the base's output ``[n, out]`` in place."""
        mixed.ragged_up(y, s[self.turn], self.B, self.rows, self.starts)


class Ragged:
    """Adapters at the same layers, each with one rank at all of them, in pieces. `downs` and `ups` are theirs.

    A group's ``A [P, L * PIECE, in]`` has a piece of each of its L layers' rows side by side; a layer's
    ``B [P * PIECE, out]`` has the rows of all pieces. An adapter has the same pieces everywhere.

    Args:
        groups: those layers by the group that each is of.
    """

    def __init__(self, groups: Mapping[int, Sequence[int]]) -> None:
        self.downs: dict[int, Pieces] = {}
        self.ups: dict[int, Bags] = {}
        self._groups = groups
        self._places: dict[Rows, int] = {}
        self._room = 0
        self._A: dict[int, Tensor] = {}
        self._B: dict[int, Tensor] = {}

    def place(self, wanted: list[Rows]) -> list[Rows]:
        """Have these adapters in it, a token each in this order; those that are there stay, unless much lies empty."""
        sizes = {rows: -(-rows.rank // PIECE) for rows in wanted}
        there = {rows: self._places[rows] for rows in wanted if rows in self._places}
        places = dict(there)
        for rows in wanted:
            if rows not in places:
                places[rows] = first_fit(((at, sizes[each]) for each, at in places.items()), sizes[rows])
        end, full = max(places[rows] + sizes[rows] for rows in wanted), sum(sizes.values())
        if end > self._room or end - full > _EMPTY * end:
            starts = itertools.accumulate(sizes.values(), initial=0)
            places, end, there = dict(zip(wanted, starts, strict=False)), full, {}
            if end > self._room:
                self._enlarge(max(end, self._room * 3 // 2), wanted[0])
        for rows, at in places.items():
            if rows not in there:
                self._write(rows, at)
        self._places = places
        self._describe(wanted, sizes, end)
        return wanted

    def _describe(self, wanted: list[Rows], sizes: dict[Rows, int], end: int) -> None:
        owners = torch.zeros(end, dtype=torch.long)  # an empty piece multiplies the first token, and nobody reads that
        for token, rows in enumerate(wanted):
            owners[self._places[rows] : self._places[rows] + sizes[rows]] = token
        chosen = torch.cat([torch.arange(rows.rank) + self._places[rows] * PIECE for rows in wanted])
        starts = torch.tensor([0, *itertools.accumulate(rows.rank for rows in wanted[:-1])])
        self.downs, self.ups = {}, {}
        for group, each in self._groups.items():
            turns = torch.arange(len(each))[:, None] * PIECE
            taken = chosen // PIECE * len(each) * PIECE + turns + chosen % PIECE
            self.downs[group] = Pieces(self._A[group][:end], owners, taken)
            self.ups |= {index: Bags(turn, self._B[index], chosen, starts) for turn, index in enumerate(each)}

    def _enlarge(self, room: int, like: Rows) -> None:
        self._room = room
        for group, each in self._groups.items():
            A = like.downs[group]
            self._A[group] = A.new_zeros(room, len(each) * PIECE, A.shape[-1])
            for index in each:
                self._B[index] = A.new_zeros(room * PIECE, like.ups[index].B.shape[-1])

    def _write(self, rows: Rows, at: int) -> None:
        r, whole = rows.rank, rows.rank // PIECE
        for group, each in self._groups.items():
            A = self._A[group]
            pieces = A.view(len(A), len(each), PIECE, -1)
            for turn, index in enumerate(each):
                up = rows.ups[index]
                given = rows.downs[group][up.lo : up.hi]
                pieces[at : at + whole, turn] = given[: whole * PIECE].view(whole, PIECE, A.shape[-1])
                if r % PIECE:
                    pieces[at + whole, turn, : r % PIECE] = given[whole * PIECE :]
                self._B[index][at * PIECE : at * PIECE + r] = up.B
