"""Labelled rows -> token ids with one target each, the way the tokenizer writes one text or a pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.data.encoding import CHUNK, Encoded, EncodeReport
from lorica.data.labelled import LabelledRow
from lorica.data.shapes import shorten
from lorica.errors import LoricaError, all_faults, nearest

# Where one class has so large a share, saying it always looks good.
IMBALANCED = 0.8


@dataclass(frozen=True)
class LabelledExample:
    """A sequence of tokens and what is to be said of it.

    `target` is the place of its class among the labels, or its score. `segments` are the tokenizer's numbers of the
    texts (BERT's token types), empty where it has none.
    """

    ids: list[int]
    target: float
    segments: list[int]
    where: str = ""

    @property
    def labels(self) -> int:
        """How much of it is predicted: one label."""
        return 1

    @property
    def content(self) -> str:
        """All that a training sees of it."""
        return repr((self.ids, self.segments, self.target))


def encode_labelled(
    rows: Sequence[LabelledRow], tok: Any, names: Sequence[str], max_len: int, known: bool = True
) -> Encoded:
    """Tokenise rows with special tokens; longer ones lose tokens of the longer text, from its end.

    Args:
        names: of the labels; one alone means that labels are scores.
        known: every row has a label; without it those that have none get the target 0.

    LoricaError, all rows at once, for labels that are not among `names`.
    """
    if max_len < 8:
        raise LoricaError(f"the largest length is {max_len} tokens; it must be at least 8")
    if len({len(row.texts) for row in rows}) > 1:
        raise LoricaError("some rows have one text and others two: train on them apart")
    targets = _targets(rows, names, known)
    report = EncodeReport(rows=len(rows))
    examples: list[LabelledExample] = []
    lengths: list[int] = []
    for start in range(0, len(rows), CHUNK):
        some = [_written(row, tok) for row in rows[start : start + CHUNK]]
        for place, (ids, segments, length) in enumerate(_tokenised(some, tok, max_len), start):
            lengths.append(length)
            examples.append(LabelledExample(ids, targets[place], segments, rows[place].where))
    _describe(rows, lengths, examples, max_len, report)
    return Encoded(examples, report)  # type: ignore[arg-type]


def collate_labelled(examples: Sequence[LabelledExample], pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where there are segments, `token_type_ids`: (rows, longest), padded right."""
    longest = max(len(example.ids) for example in examples)

    def padded(rows: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.long)

    found = {
        "input_ids": padded([example.ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.ids) for example in examples], 0),
    }
    if examples[0].segments:
        found["token_type_ids"] = padded([example.segments for example in examples], 0)
    return found


def counts(examples: Sequence[LabelledExample], names: Sequence[str]) -> dict[str, int]:
    """How many examples each label has, in the order of `names`."""
    found = Counter(int(example.target) for example in examples)
    return {name: found[place] for place, name in enumerate(names)}


def balance(train: Sequence[LabelledExample], held: Sequence[LabelledExample], names: Sequence[str]) -> list[str]:
    """In words, what is uneven about the classes: one of them almost everywhere, or some never to be learnt from."""
    notes = []
    there, apart = counts(train, names), counts(held, names)
    largest = max(there, key=there.__getitem__)
    share = there[largest] / max(1, len(train))
    if share >= IMBALANCED:
        notes.append(
            f"{share:.0%} of the rows are {largest!r}: so accurate is saying it always; look at F1 and Matthews"
        )
    for name in names:
        if not there[name]:
            seen = f"{apart[name]:,} held-out rows have it" if apart[name] else "no row has it"
            notes.append(f"the label {name!r} is not among the rows to train on, so it cannot be learnt ({seen})")
    said: dict[tuple[int, ...], set[float]] = {}
    for example in train:
        said.setdefault(tuple(example.ids), set()).add(example.target)
    if both := sum(len(targets) > 1 for targets in said.values()):
        notes.append(f"{both:,} texts have more than one label each")
    return notes


def _targets(rows: Sequence[LabelledRow], names: Sequence[str], known: bool) -> list[float]:
    if len(names) == 1:
        return [float(row.label or 0.0) for row in rows]
    places = {name: float(place) for place, name in enumerate(names)}
    strange = Counter(str(row.label) for row in rows if row.label is not None and str(row.label) not in places)
    if strange and known:
        faults = [f"{name!r} of {count:,} rows{nearest(name, names)}" for name, count in strange.most_common()]
        raise all_faults(f"these labels are not among the model's ({', '.join(names)}):", shorten(faults))
    return [places.get(str(row.label), 0.0) for row in rows]


def _written(row: LabelledRow, tok: Any) -> tuple[str, ...]:
    """The texts as the tokenizer takes them: a pair is one text of two lines where it has no separator of its own."""
    return row.texts if tok.sep_token_id is not None else ("\n".join(row.texts),)


def _tokenised(texts: list[tuple[str, ...]], tok: Any, max_len: int) -> list[tuple[list[int], list[int], int]]:
    """Ids and segments of each, and how long it was before it was cut."""
    whole = _called(texts, tok)
    over = [place for place, (ids, _) in enumerate(whole) if len(ids) > max_len]
    cut = dict(zip(over, _called([texts[i] for i in over], tok, max_len), strict=True)) if over else {}
    return [(*cut.get(place, found), len(found[0])) for place, found in enumerate(whole)]


def _called(texts: list[tuple[str, ...]], tok: Any, max_len: int | None = None) -> list[tuple[list[int], list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    how = {"truncation": "longest_first", "max_length": max_len} if max_len else {"truncation": False}
    found = tok(*columns, padding=False, verbose=False, **how)
    segments = found.get("token_type_ids") or [[] for _ in texts]
    return [(_unpadded(ids, tok), kinds) for ids, kinds in zip(found["input_ids"], segments, strict=True)]


def _unpadded(ids: list[int], tok: Any) -> list[int]:
    """Without padding tokens at the end, which a model that reads the last token passes over; never nothing at all."""
    while len(ids) > 1 and ids[-1] == tok.pad_token_id != tok.sep_token_id:
        ids = ids[:-1]
    return ids or [tok.pad_token_id or 0]


def _describe(
    rows: Sequence[LabelledRow], lengths: list[int], examples: list[Any], max_len: int, report: EncodeReport
) -> None:
    ordered = sorted(lengths)
    report.examples = report.learnt = len(examples)
    report.tokens = sum(len(example.ids) for example in examples)
    if not ordered:
        return
    report.median, report.longest = ordered[len(ordered) // 2], ordered[-1]
    report.p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    over = [row.where for row, length in zip(rows, lengths, strict=True) if length > max_len]
    report.cut = len(over)
    if over:
        report.notes.append(f"over {max_len:,} tokens: {len(over):,} cut (first: {over[0]})")
