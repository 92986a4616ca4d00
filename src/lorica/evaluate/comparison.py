"""The base and several adapters on the same rows, one model in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica import data, doors, patch
from lorica.adapter import Adapter
from lorica.data import Record
from lorica.errors import LoricaError, all_faults
from lorica.evaluate.generation import generate
from lorica.evaluate.loss import LossResult, loss
from lorica.evaluate.metrics import ClassRow, Difference, bootstrap, exact_match, paired, per_class, wilson
from lorica.evaluate.verdicts import Verdicts
from lorica.insertion import insertion
from lorica.models import Opened, labels_of, load_tokenizer

BASE = "base"
# An answer that is longer than every right one is wrong already; a few tokens more show how it goes on.
BEYOND = 8

Tell = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Contender:
    """What is measured: its `name` in the table, the `adapter` on the model (None: the base) and its chat template."""

    name: str
    adapter: str | None
    template: str | None


@dataclass(frozen=True)
class Score:
    """What a contender made of the rows.

    `nats` holds by row (its place) the sum of nats and the number of labelled tokens; `answers`, `references` and
    `right` are those of the rows that have an answer to compare with, at the places `asked`.
    """

    name: str
    loss: LossResult
    nats: dict[str, tuple[float, int]]
    asked: list[str]
    answers: list[str]
    references: list[str]
    right: list[bool]
    notes: list[str]

    def summary(self) -> dict[str, Any]:
        """Loss, perplexity and exact match with their 95 % intervals, as plain values."""
        sums, counts = zip(*self.nats.values(), strict=True)
        low, high = bootstrap(sums, counts)
        found = {
            "name": self.name,
            "loss": self.loss.loss,
            "loss_low": low,
            "loss_high": high,
            "perplexity": self.loss.perplexity,
            "tokens": self.loss.tokens,
            "rows": len(self.nats),
        }
        if not self.right:
            return found
        low, high = wilson(sum(self.right), len(self.right))
        share = sum(self.right) / len(self.right)
        return found | {"exact": share, "exact_low": low, "exact_high": high, "answers": len(self.right)}

    def classes(self) -> list[ClassRow] | None:
        """`per_class` of the answers; None where they are not classes."""
        return per_class(self.answers, self.references)

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured beside the loss."""
        return ("exact",) if self.right else ()

    def compared(self, other: Score) -> dict[str, float]:
        """How much more it answers exactly than another, with the paired interval."""
        return _named("exact", paired(self.right, other.right)) if self.right and other.right else {}


def line_up(opened: Opened, thing: str, others: Sequence[str]) -> list[Contender]:
    """Put the adapters `others` beside what `opened` holds; contenders in the order of `others`, `thing` last.

    `others` are adapters or runs of the same base model, or "base". LoricaError lists all that are not.
    """
    names = _short([*others, thing])
    own = load_tokenizer(opened.base).chat_template or opened.tok.chat_template
    found: list[Contender] = []
    faults: list[str] = []
    for place, (other, name) in enumerate(zip(others, names, strict=False)):
        if other == BASE:
            if opened.adapter is not None:
                found.append(Contender(BASE, None, own))
            continue
        try:
            adapter = _adapter(other, opened)
            adapter.apply(opened.model, f"other-{place}")
        except LoricaError as fault:
            faults.append(f"{other}: {fault}")
        else:
            found.append(Contender(name, f"other-{place}", adapter.meta.get("chat_template") or own))
    if faults:
        raise all_faults(f"what {thing} is compared with must be {BASE}, or adapters of the same base model:", faults)
    last = Contender(names[-1], "default" if opened.adapter else None, opened.tok.chat_template)
    if patch.adapters(opened.model):
        patch.select(opened.model, last.adapter)
    return [*found, last]


def inserted(opened: Opened, contenders: Sequence[Contender]) -> int:
    """The most special tokens that one of the contenders adds to a row, so that rows can be cut alike for all."""
    sizes = []
    for contender in contenders:
        with selected(opened, contender):
            own = insertion(opened.model)
            sizes.append(own.size if own else 0)
    return max(sizes)


@contextlib.contextmanager
def selected(opened: Opened, contender: Contender) -> Iterator[None]:
    """The contender in use, with its chat template, for the length of a block."""
    template = opened.tok.chat_template
    before = patch.active(opened.model)
    if patch.adapters(opened.model):
        patch.select(opened.model, contender.adapter)
    opened.tok.chat_template = contender.template
    try:
        yield
    finally:
        opened.tok.chat_template = template
        if patch.adapters(opened.model):
            patch.select(opened.model, before)


def measure(
    model: Any,
    tok: Any,
    rows: Sequence[Record],
    *,
    name: str = "",
    answers: bool = True,
    max_len: int = 2048,
    max_new: int | None = None,
    batch: int = 16,
    tell: Tell | None = None,
) -> Score:
    """Loss on the rows and, with `answers`, the model's own answers to those of them that have one.

    Args:
        max_len: see `data.encode`; prompts to answer are never cut.
        max_new: longest answer in tokens; default a few more than the longest right one.
        tell: called with what is being done for `name`, and how much of how much.
    """
    tell = tell or (lambda what, done, total: None)
    encoded = data.encode(rows, tok, max_len)
    title = f"{name}: loss"
    found = loss(model, encoded.examples, progress=lambda done, total: tell(title, done, total))
    nats: dict[str, tuple[float, int]] = {}
    for example, (total, count) in zip(encoded.examples, found.per_row, strict=True):
        before = nats.get(example.where, (0.0, 0))
        nats[example.where] = (before[0] + total, before[1] + count)
    asked, prompts, references = _asked(rows, tok) if answers else ([], [], [])
    said: list[str] = []
    if asked:
        longest = max(len(ids) for ids in tok(references, add_special_tokens=False)["input_ids"])
        said = generate(
            model,
            tok,
            prompts,
            max_new=max_new or longest + BEYOND,
            batch=batch,
            progress=lambda done, total: tell(f"{name}: answers", done, total),
        )
    right = exact_match(said, references)
    return Score(name, found, nats, asked, said, references, right, encoded.report.notes)


def against(score: Score | Verdicts, other: Score | Verdicts) -> dict[str, Any]:
    """How much `score` differs from `other` on the rows that both were measured on, with paired intervals."""
    both = [place for place in score.nats if place in other.nats]
    mine, my_counts = zip(*(score.nats[place] for place in both), strict=True)
    its, its_counts = zip(*(other.nats[place] for place in both), strict=True)
    found = {"name": score.name, "against": other.name, "rows": len(both)}
    return found | _named("loss", paired(mine, its, my_counts, its_counts)) | score.compared(other)  # type: ignore[arg-type]


def _named(key: str, difference: Difference) -> dict[str, float]:
    return {key: difference.mean, f"{key}_low": difference.low, f"{key}_high": difference.high}


def _asked(rows: Sequence[Record], tok: Any) -> tuple[list[str], list[list[int]], list[str]]:
    """Places, prompts and right answers of the rows that have one; plain text has none."""
    found = [(row.where, *data.prompt_ids(row, tok)) for row in rows if row.kind != "text"]
    kept = [each for each in found if each[2].strip()]
    return [where for where, _, _ in kept], [ids for _, ids, _ in kept], [text for _, _, text in kept]


def _adapter(thing: str, opened: Opened) -> Adapter:
    path = doors.place(thing)
    folders = (path, path / "best", path / "last")
    adapter = Adapter.load(next((folder for folder in folders if (folder / "adapter_config.json").is_file()), path))
    base, mark = adapter.meta.get("base_model"), adapter.meta.get("base_fingerprint")
    if base and base != opened.base and mark != patch.fingerprint(opened.model):
        raise LoricaError(f"its base is {base}, not {opened.base}")
    labels = list(labels_of(opened.model.config)) if "labels" in adapter.meta else None
    if labels and labels != json.loads(adapter.meta["labels"]):
        raise LoricaError(f"its labels are {', '.join(json.loads(adapter.meta['labels']))}, not {', '.join(labels)}")
    return adapter


def _short(things: Sequence[str]) -> list[str]:
    """The last parts of the paths where these differ, else the things as they are."""
    names = [Path(thing).name or thing for thing in things]
    return names if len(set(names)) == len(names) else [str(thing) for thing in things]
