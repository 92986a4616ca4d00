"""Examples laid end to end in one row: no padding, positions from 0 in each, and which of them predict a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.data.encoding import Example


@dataclass(frozen=True)
class Pack:
    """T tokens of some documents, of which n predict a label.

    Attributes:
        input_ids: ``[1, T]``.
        position_ids: ``[1, T]``, from 0 in each document.
        lengths: tokens of each document.
        kept: ``[n]`` positions in the row whose next token is a label.
        wanted: ``[n]`` those next tokens.
        counts: labels of each document; they sum to n.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    kept: Tensor
    wanted: Tensor
    counts: tuple[int, ...]


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Pack:
    """Lay examples end to end, in their order."""
    ids: list[int] = []
    places: list[int] = []
    kept: list[int] = []
    wanted: list[int] = []
    counts = []
    for example in examples:
        found = [i for i, flag in enumerate(example.loss) if flag and i]
        kept += [len(ids) + i - 1 for i in found]
        wanted += [example.ids[i] for i in found]
        counts.append(len(found))
        ids += example.ids
        places += range(len(example.ids))
    row, positions, at, goal = (torch.tensor(each, dtype=torch.long).to(device) for each in (ids, places, kept, wanted))
    lengths = tuple(len(example.ids) for example in examples)
    return Pack(row[None], positions[None], lengths, at, goal, tuple(counts))
