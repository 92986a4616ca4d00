"""Data of any origin -> the examples to train on and those to measure with, and a fingerprint of both."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from lorica import data as rows_of
from lorica.data import Encoded, Example, LabelledRow, Record, Records
from lorica.data.pack import CPU_MICRO_TOKENS, MICRO_TOKENS
from lorica.errors import LoricaError
from lorica.insertion import edited
from lorica.tasks import Language, Task, columns_of
from lorica.train.recipe import method_of
from lorica.train.settings import TrainSettings

ROWS = (Record, LabelledRow)
# What a pass costs on a CPU beside its tokens: the calls of some hundred operations, forward and backward.
PASS_TOKENS = 32


@dataclass
class Prepared:
    """`train` and `held` out examples; `held_all`: how many were held out before `eval_rows` cut them.

    `given` is what a model is given of `train`: with the special tokens of its adapter, after `give`. `counts`: how
    many to train on each label has, where there are labels.
    """

    train: list[Any]
    held: list[Any]
    held_all: int
    source: str = ""
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    given: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.given = self.train

    def give(self, model: nn.Module) -> None:
        """Let `given` be for the active adapter of a model; see `insertion.edited`."""
        self.given = list(chain.from_iterable(edited(model, self.train)))

    def fingerprint(self) -> str:
        """Hex digest of every token id and label, in order: the same for the same data under another name."""
        digest = hashlib.sha256()
        for examples in (self.train, self.held):
            digest.update(f"{len(examples)}:".encode())
            for example in examples:
                digest.update(example.content.encode())
        return digest.hexdigest()


def prepare(data: Any, tok: Any, settings: TrainSettings, task: Task | None = None) -> Prepared:
    """Read, hold out and encode, as the task (default: language modelling) does.

    `data` is a path or hub id; `Records`; a list of `Record` (`LabelledRow`); `Encoded` or a list of `Example`
    (`LabelledExample`); or a pair ``(train, held out)`` of the last four. Rows are split by `settings.held_out`;
    examples are only held out by a pair. The split does not depend on the seed, so that runs with other seeds measure
    on the same rows.
    """
    task, source, notes = task or Language(), "", []
    if isinstance(data, str | Path):
        # A path is remembered so that it is found from any folder.
        source = str(Path(data).resolve()) if Path(data).exists() else str(data)
        data = task.read(data, columns_of(settings))
    if isinstance(data, Records):
        notes += data.faults
        data = (data.rows, data.valid) if data.valid else data.rows
    if isinstance(data, tuple):
        train, held = data
    elif not isinstance(data, Encoded) and data and isinstance(data[0], ROWS):
        train, held = rows_of.split(data, fraction=settings.held_out)
    else:
        train, held = data, []
    # Special tokens count: they are read like the others.
    longest = min(settings.max_len, task.limit) - sum(getattr(method_of(settings), "inserts", ()))
    train, held = (_encoded(part, tok, longest, notes, task) for part in (train, held))
    if not train:
        raise LoricaError("the data has no example to train on")
    notes += task.notes(train, held)
    kept = held[: settings.eval_rows or None]
    return Prepared(train, kept, len(held), source, list(dict.fromkeys(notes)), task.counts(train))


def cut(batch: Sequence[Any], micro: int | None, processes: int = 1, tokens: int = MICRO_TOKENS) -> list[list[int]]:
    """Divide one update's examples into padded batches of at most `tokens` tokens, or of `micro` examples.

    Examples of like length go together, since padding is work, and so is a pass by itself: the division is the one of
    least work. Where tokens are slow a pass costs as much as `PASS_TOKENS`, elsewhere as a full batch.
    """
    rows = min(micro or len(batch), math.ceil(len(batch) / processes))
    order = sorted(range(len(batch)), key=lambda i: len(batch[i].ids))
    each = PASS_TOKENS if tokens <= CPU_MICRO_TOKENS else tokens
    work, start = [0], [0]  # of the shortest examples: the least work, and where the last batch of that division starts
    for end in range(1, len(order) + 1):
        found = []
        for first in range(end - 1, max(-1, end - 1 - rows), -1):
            padded = (end - first) * len(batch[order[end - 1]].ids)
            if first < end - 1 and not micro and padded > tokens:
                break
            found.append((work[first] + padded + each, -first))
        least, first = min(found)
        work.append(least)
        start.append(-first)
    pieces: list[list[int]] = []
    end = len(order)
    while end:
        pieces.insert(0, order[start[end] : end])
        end = start[end]
    return pieces + [[] for _ in range(-len(pieces) % processes)]


def labels_in(examples: Sequence[Example]) -> int:
    """How many tokens, or rows with a label, are predicted."""
    return sum(example.labels for example in examples)


def _encoded(part: Any, tok: Any, max_len: int, notes: list[str], task: Task) -> list[Any]:
    if part and not isinstance(part, Encoded) and isinstance(part[0], ROWS):
        part = task.encode(part, tok, max_len)
    if isinstance(part, Encoded):
        notes += part.report.notes
        return part.examples
    return list(part or [])
