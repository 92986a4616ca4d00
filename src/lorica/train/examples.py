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
from lorica.data import Encoded, Example, Record, Records
from lorica.data.pack import MICRO_TOKENS
from lorica.errors import LoricaError
from lorica.insertion import edited
from lorica.train.recipe import method_of
from lorica.train.settings import TrainSettings


@dataclass
class Prepared:
    """`train` and `held` out examples; `held_all`: how many were held out before `eval_rows` cut them.

    `given` is what a model is given of `train`: with the special tokens of its adapter, after `give`.
    """

    train: list[Example]
    held: list[Example]
    held_all: int
    source: str = ""
    notes: list[str] = field(default_factory=list)
    given: list[Example] = field(init=False)

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
                digest.update(repr((example.ids, [int(flag) for flag in example.loss])).encode())
        return digest.hexdigest()


def prepare(data: Any, tok: Any, settings: TrainSettings) -> Prepared:
    """Read, hold out and encode.

    `data` is a path or hub id; `Records`; a list of `Record`; `Encoded` or a list of `Example`; or a pair
    ``(train, held out)`` of the last four. Rows are split by `settings.held_out`; examples are only held out by a pair.
    The split does not depend on the seed, so that runs with other seeds measure on the same rows.
    """
    source, notes = "", []
    if isinstance(data, str | Path):
        # A path is remembered so that it is found from any folder.
        source = str(Path(data).resolve()) if Path(data).exists() else str(data)
        data = rows_of.read(
            data,
            map=settings.map or None,
            prompt=settings.prompt or None,
            completion=settings.completion or None,
            system=settings.system or None,
        )
    if isinstance(data, Records):
        notes += data.faults
        data = (data.rows, data.valid) if data.valid else data.rows
    if isinstance(data, tuple):
        train, held = data
    elif not isinstance(data, Encoded) and data and isinstance(data[0], Record):
        train, held = rows_of.split(data, fraction=settings.held_out)
    else:
        train, held = data, []
    # Special tokens count: they are read like the others.
    longest = settings.max_len - sum(getattr(method_of(settings), "inserts", ()))
    train, held = (_encoded(part, tok, longest, notes) for part in (train, held))
    if not train:
        raise LoricaError("the data has no example to train on")
    return Prepared(train, held[: settings.eval_rows or None], len(held), source, list(dict.fromkeys(notes)))


def cut(batch: Sequence[Example], micro: int | None, processes: int = 1, tokens: int = MICRO_TOKENS) -> list[list[int]]:
    """Divide one update's examples into padded batches, as `packs` does into packs.

    Examples of like length go together, since padding is work.
    """
    limit = min(micro or len(batch), math.ceil(len(batch) / processes))
    pieces: list[list[int]] = []
    for place in sorted(range(len(batch)), key=lambda i: len(batch[i].ids)):
        room = bool(pieces) and len(pieces[-1]) < limit
        if room and (micro or (len(pieces[-1]) + 1) * len(batch[place].ids) <= tokens):
            pieces[-1].append(place)
        else:
            pieces.append([place])
    return pieces + [[] for _ in range(-len(pieces) % processes)]


def labels_in(examples: Sequence[Example]) -> int:
    """How many tokens are predicted. The first of a sequence never is, whatever its mark."""
    return sum(sum(example.loss[1:]) for example in examples)


def question_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """What to generate from, and what is expected: an example's ids before and in its last run of labels.

    Text that is learnt from its beginning is cut in the middle.
    """
    end = max(i for i, flag in enumerate(example.loss) if flag) + 1
    start = end
    while start and example.loss[start - 1]:
        start -= 1
    if start <= 1:
        start = max(1, end // 2)
    return example.ids[:start], example.ids[start:end]


def _encoded(part: Any, tok: Any, max_len: int, notes: list[str]) -> list[Example]:
    if part and not isinstance(part, Encoded) and isinstance(part[0], Record):
        part = rows_of.encode(part, tok, max_len)
    if isinstance(part, Encoded):
        notes += part.report.notes
        return part.examples
    return list(part or [])
