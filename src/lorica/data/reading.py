"""A source of rows -> `Records`: read, brought to one shape, cleaned. Everything that is wrong is said at once.

Broken lines, mixtures of formats and rows that cannot be read are errors. Exact duplicates and rows without an answer
are dropped, and `Records.faults` says how many and where. Duplicates are dropped only from the rows to train on: those
that repeat one of them, or one of the source's own valid and test rows, which stay as they were published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.data.columns import Columns
from lorica.data.records import Record, Records
from lorica.data.shapes import shorten, to_records
from lorica.data.tables import Row, read_source
from lorica.errors import LoricaError, all_faults

NAMED = 3
Converter = Callable[[list[Row]], tuple[list[Any], str, list[str]]]


def read(
    source: str | Path,
    *,
    map: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    system: str | None = None,
    answers: bool = True,
) -> Records:
    """Rows of a file, a folder or a hub id (see `tables.read_source`), in a known format or brought to one by flags.

    `map` ("prompt=body,completion=category") renames columns, `prompt` and `completion` are templates over them
    ("Classify: {body}", "{category}"), `system` is for rows without one. With `answers=False` every row is kept in
    order and may lack its answer: rows to generate for. LoricaError lists all faults of the source, with their lines.
    """
    columns = Columns.parse(map, prompt, completion)

    def convert(rows: list[Row]) -> tuple[list[Any], str, list[str]]:
        records, format, bad = to_records(rows, columns, system, answers)
        return list(_answers_last(records)) if answers else records, format, bad

    return read_with(source, convert, answers)


def read_with(source: str | Path, convert: Converter, answers: bool) -> Records:
    """Rows of a source as `convert` makes them: ``(records, format, faults)``, as many unless there are faults.

    With `answers`, those that lack one are dropped, and duplicates among those to train on.
    """
    parts, faults = read_source(source)
    if not any(parts.values()) and not faults:
        raise LoricaError(f"{source}: has no rows")
    everything = [row for rows in parts.values() for row in rows]
    if faults and not everything:
        raise all_faults(f"{source}: cannot be read", shorten(faults))
    try:
        records, format, bad = convert(everything)
    except LoricaError as error:
        raise LoricaError("\n".join([f"{source}: {error}", *(f"  {fault}" for fault in shorten(faults))])) from error
    if faults or bad:
        raise all_faults(f"{source}: {len(faults) + len(bad):,} faults", shorten(faults + bad))
    remaining = iter(records)
    read_parts = {part: [next(remaining) for _ in rows] for part, rows in parts.items()}
    return _clean(source, read_parts, format) if answers else _whole(read_parts, format)


def _whole(parts: dict[str, list[Any]], format: str) -> Records:
    return Records(parts["train"], format, valid=parts.get("valid"), test=parts.get("test"))


def _clean(source: str | Path, parts: dict[str, list[Any]], format: str) -> Records:
    seen: dict[str, str] = {}
    empty: list[Any] = []
    doubles: list[tuple[Any, str]] = []
    kept: dict[str, list[Any]] = {}
    for part in sorted(parts, key=("test", "valid", "train").index):
        kept[part] = []
        for row in parts[part]:
            if row.lacks_answer:
                empty.append(row)
            elif part == "train" and row.key in seen:
                doubles.append((row, seen[row.key]))
            else:
                seen.setdefault(row.key, row.where)
                kept[part].append(row)
    faults = []
    if doubles:
        named = (f"{row.where} (as {first})" for row, first in doubles)
        faults.append(f"{_count(len(doubles), 'duplicate')} dropped: {_first(named, len(doubles))}")
    if empty:
        faults.append(f"{len(empty):,} without an answer dropped: {_first((row.where for row in empty), len(empty))}")
    if not kept["train"]:
        raise all_faults(f"{source}: no row is left to train on", faults)
    valid, test = kept.get("valid"), kept.get("test")
    return Records(kept["train"], format, faults, valid, test, len(doubles), len(empty))


def _answers_last(rows: Iterable[Record]) -> Iterable[Record]:
    """Chat rows end with their last assistant turn: nothing after it can be learnt from."""
    for row in rows:
        last = max((i for i, message in enumerate(row.messages) if message["role"] == "assistant"), default=-1)
        yield replace(row, messages=row.messages[: last + 1]) if 0 <= last < len(row.messages) - 1 else row


def _first(names: Iterable[str], count: int) -> str:
    shown = [name for name, _ in zip(names, range(NAMED), strict=False)]
    return ", ".join(shown) + (f", and {count - NAMED:,} more" if count > NAMED else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
