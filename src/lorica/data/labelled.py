"""Rows of a text, or two, and what is to be said of them: a label (`classify`) or a number (`regress`).

The columns are found by the names that public sets use, or are told: `--map text=body,label=category`,
`--map first=a,second=b,score=rating`. A label is what it is called: 1, true and "spam" are "1", "true" and "spam".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.data.columns import text_of
from lorica.data.reading import read_with
from lorica.data.records import Records
from lorica.data.tables import Row
from lorica.errors import LoricaError, all_faults, nearest

PAIRS = (
    ("first", "second"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("question", "passage"), ("query", "passage"), ("text1", "text2"), ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
)  # fmt: skip
TEXTS = (
    "text", "sentence", "review", "content", "body", "comment", "message", "tweet", "document", "utterance", "question",
    "query", "title", "prompt", "first",
)  # fmt: skip
SAID = {
    "classify": ("label", "labels", "class", "category", "target", "sentiment", "intent", "completion", "score"),
    "regress": ("score", "label", "rating", "similarity", "similarity_score", "target", "value", "stars"),
}
KEYS = ("text", "first", "second", "label", "score")


@dataclass(frozen=True)
class LabelledRow:
    """One or two `texts` and their `label`: a name, a number, or None where it is not known. `where` as in `Record`."""

    texts: tuple[str, ...]
    label: str | float | None
    where: str = ""

    @property
    def key(self) -> str:
        """The content alone: equal for exact duplicates, wherever they stand."""
        return json.dumps([*self.texts, self.label], ensure_ascii=False)

    @property
    def lacks_answer(self) -> bool:
        """Nothing to learn from: no label, or no text."""
        return self.label is None or not any(text.strip() for text in self.texts)


def read_labelled(source: str | Path, kind: str, *, map: str | None = None, answers: bool = True) -> Records:
    """The rows of a source (see `data.read`) for `kind` "classify" or "regress".

    Without `answers` every row is kept in order and may lack its label. LoricaError lists all faults with their lines.
    """
    told = _told(map)

    def convert(rows: list[Row]) -> tuple[list[Any], str, list[str]]:
        texts, said = _columns(rows, kind, told, answers)
        found, faults = _rows(rows, kind, texts, said)
        return found, " + ".join([*texts, *([said] if said else [])]), faults

    return read_with(source, convert, answers)


def _told(map: str | None) -> dict[str, str]:
    """`--map` as a dict; every fault of it in one LoricaError."""
    told, faults = {}, []
    for part in filter(None, (piece.strip() for piece in (map or "").split(","))):
        key, equals, column = (side.strip() for side in part.partition("="))
        if not equals or not column:
            faults.append(f"{part!r}: expected key=column")
        elif key not in KEYS:
            faults.append(f"{part!r}: unknown key {key!r}{nearest(key, KEYS)}; known: {', '.join(KEYS)}")
        else:
            told[key] = column
    if "second" in told and not {"first", "text"} & set(told):
        faults.append("second is given without first")
    if faults:
        raise all_faults("--map cannot be used:", faults)
    return told


def _columns(rows: list[Row], kind: str, told: dict[str, str], answers: bool) -> tuple[tuple[str, ...], str]:
    """The columns of the texts, and that of the label (empty where there is none, and none is needed)."""
    there = list(dict.fromkeys(name for _, row in rows for name in row))
    if absent := [name for name in told.values() if name not in there]:
        faults = [f"unknown column {name!r}{nearest(name, there)}" for name in absent]
        raise all_faults("the table has other columns:", [*faults, *_help(there, kind)])
    lowered = {name.lower(): name for name in reversed(there)}
    said = told.get("label") or told.get("score") or next((lowered[n] for n in SAID[kind] if n in lowered), "")
    first = told.get("first") or told.get("text")
    if first:
        texts: tuple[str, ...] = (first, told["second"]) if "second" in told else (first,)
    else:
        pair = next(([lowered[name] for name in pair] for pair in PAIRS if all(name in lowered for name in pair)), None)
        single = next((lowered[name] for name in TEXTS if name in lowered), "")
        texts = tuple(pair) if pair else (single,) if single else ()
    if not texts or (answers and not said):
        lacking = (
            "no column of a known name holds the text"
            if not texts
            else f"no column of a known name holds {_what(kind)}"
        )
        raise all_faults(f"{lacking}:", _help(there, kind))
    return texts, said


def _rows(rows: list[Row], kind: str, texts: tuple[str, ...], said: str) -> tuple[list[LabelledRow], list[str]]:
    found, faults = [], []
    for where, row in rows:
        try:
            if absent := [name for name in texts if not isinstance(row.get(name), str | int | float)]:
                raise LoricaError(f"{absent[0]!r} is {type(row.get(absent[0])).__name__}, not text")
            label = (_number if kind == "regress" else _name)(row.get(said)) if said else None
            labelled = LabelledRow(tuple(text_of(row[name]) for name in texts), label, where)
            labelled.key.encode()
        except UnicodeEncodeError:
            faults.append(f"{where}: holds half of a character (a lone surrogate such as \\ud83d); mend the text")
        except LoricaError as fault:
            faults.append(f"{where}: {fault}")
        else:
            found.append(labelled)
    return _without_placeholders(found), faults


def _name(value: Any) -> str | None:
    """What a label is called; None for null and empty cells."""
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise LoricaError(
                f"the label is {value!r}: a class needs a name or a whole number; for scores: --task regress"
            )
        return str(int(value))
    if value is not None and not isinstance(value, str | int):
        raise LoricaError(f"the label is a {type(value).__name__}, not a name or a number")
    return text_of(value).strip() or None


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as fault:
        raise LoricaError(f"the score is {value!r}, not a number; for classes: --task classify") from fault
    if not math.isfinite(number):
        raise LoricaError(f"the score is {value!r}, which is not finite")
    return number


def _without_placeholders(rows: list[LabelledRow]) -> list[LabelledRow]:
    """GLUE's test parts have -1 for every label, which is none."""
    parts: dict[str, set[Any]] = {}
    for row in rows:
        parts.setdefault(row.where.rpartition(":")[0], set()).add(row.label)
    blank = {part for part, labels in parts.items() if labels == {"-1"}}
    return [LabelledRow(row.texts, None, row.where) if row.where.rpartition(":")[0] in blank else row for row in rows]


def _what(kind: str) -> str:
    return "the label" if kind == "classify" else "the score"


def _help(there: Iterable[str], kind: str) -> list[str]:
    """The columns there are, and a `--map` line to type."""
    there = list(there)
    said = next((name for name in there if name.lower() in SAID[kind]), there[-1] if there else "COLUMN")
    text = next((name for name in there if name != said), "COLUMN")
    word = "label" if kind == "classify" else "score"
    return [f"columns: {', '.join(there) or 'none'}", f"type, for example: --map text={text},{word}={said}"]


def label_names(rows: Sequence[LabelledRow]) -> tuple[str, ...]:
    """The distinct labels, numbers by their value and names by the alphabet.

    LoricaError where they are no classes: only one of them, or one for every row.
    """
    names = {str(row.label) for row in rows if row.label is not None}
    if len(names) < 2:
        raise LoricaError(f"there are not two labels to tell apart, only {', '.join(names) or 'none'}")
    if len(names) == len(rows) > 2:
        raise LoricaError("every row has a label of its own; for numbers: --task regress")
    return tuple(sorted(names, key=_order))


def _order(name: str) -> tuple[int, float, str]:
    try:
        return 0, float(int(name)), name
    except ValueError:
        return 1, 0.0, name
