"""Examples -> tensors, and the order in which they come."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.data.encoding import Example
from lorica.errors import LoricaError

IGNORED = -100


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `labels`, each (rows, longest) torch.long, padded on the right.

    `labels` is `input_ids` where the token is to be predicted, else -100. Padding is told by the mask and the length,
    never by the id: an end token stays labelled where pad is the same token.
    """
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, :length] = ids[row, :length].where(torch.tensor(example.loss), IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Sampler:
    """Lists of `batch` indices below `n`, without end: a new permutation each epoch, its last short batch kept.

    The order depends on `seed` and the epoch alone, so a position is two numbers: see `state` and `restore`.
    """

    def __init__(self, n: int, batch: int, seed: int = 0) -> None:
        if n < 1 or batch < 1:
            raise LoricaError(f"nothing to draw: {n} examples in batches of {batch}")
        self.n, self.batch, self.seed = n, batch, seed
        self._go_to(0, 0)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        drawn = self._order[self.position : self.position + self.batch]
        if self.position + self.batch >= self.n:
            self._go_to(self.epoch + 1, 0)
        else:
            self.position += self.batch
        return drawn

    def state(self) -> dict[str, Any]:
        """Where the next batch comes from, as plain numbers for JSON."""
        return {"n": self.n, "batch": self.batch, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. LoricaError if that was over other data, batches or another seed."""
        now = {"n": self.n, "batch": self.batch, "seed": self.seed}
        other = [f"{key} {state[key]}, now {value}" for key, value in now.items() if state[key] != value]
        if other:
            raise LoricaError(f"the saved position is of another order of rows: {'; '.join(other)}")
        self._go_to(state["epoch"], state["position"])

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = list(range(self.n))
        random.Random(f"{self.seed}:{epoch}").shuffle(self._order)
