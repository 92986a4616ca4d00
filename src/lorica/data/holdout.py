"""Rows held out from training: a tenth, and enough of them to measure with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from lorica.data.labelled import LabelledRow
from lorica.data.records import Record
from lorica.errors import LoricaError

R = TypeVar("R", Record, LabelledRow)
ENOUGH_ROWS, ENOUGH_HELD_OUT = 250, 50


def split(rows: Sequence[R], *, fraction: float = 0.1, seed: int = 0) -> tuple[list[R], list[R]]:
    """`(train, held out)`, both in the order of `rows`; the same for the same rows and seed.

    `fraction` of the rows is held out, at least 50 where there are 250 or more (none with `fraction=0`). Exact
    duplicates stay on one side, so the held-out part may be a few rows larger; at least one row is left to train on.
    """
    if not 0 <= fraction < 1:
        raise LoricaError(f"the held-out fraction is {fraction}; it must be at least 0 and below 1")
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.key, []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    wanted = round(len(rows) * fraction)
    if fraction and len(rows) >= ENOUGH_ROWS:
        wanted = max(wanted, ENOUGH_HELD_OUT)
    elif fraction and len(rows) > 1:
        wanted = max(wanted, 1)
    held: set[int] = set()
    for group in shuffled:
        if len(held) < wanted and len(held) + len(group) < len(rows):
            held.update(group)
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]
