"""Rows as they stand in a file or on the hub, each with its place. JSON and CSV need the standard library only.

A row is `(where, columns)`; `where` is "name:line" ("name:row" for parquet and hub sets, which have no lines). Broken
lines are collected as faults, not raised, so that one reading finds them all.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorica import doors
from lorica.doors import parsed, parsed_from, size_of
from lorica.errors import LoricaError, all_faults, nearest, shown

Row = tuple[str, dict[str, Any]]
PARTS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
LINE_BYTES = 64 << 20  # of one row; a book has a megabyte
PACKED = 200
INSTALL = 'pip install "lorica[data]"'


def read_source(source: str | Path) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by part ("train", and "valid", "test" where the source has them), and the faults of single rows.

    `source` is a file, a folder with train/valid/test files, or a hub id: `user/name`, `user/name:split` or
    `user/name:config:split`. LoricaError where there is nothing to read at all.
    """
    path = doors.place(source)
    if path.is_dir():
        try:
            files = _folder_files(path)
        except OSError as error:
            raise LoricaError(f"{path} cannot be read: {error.strerror}") from error
    elif path.exists():
        files = {"train": [path]}
    elif HUB_ID.fullmatch(str(source)) and path.suffix.lower() not in READERS:
        return _hub_rows(str(source)), []
    else:
        raise LoricaError(_not_found(path))
    faults: list[str] = []
    return {part: [row for file in found for row in read_file(file, faults)] for part, found in files.items()}, faults


def read_file(path: Path, faults: list[str]) -> list[Row]:
    """The rows of one file; what cannot be read as a row is added to `faults` with its place and what to do."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LoricaError(f"{path}: cannot tell the format from the name; expected one of {', '.join(READERS)}")
    size_of(path)
    try:
        return list(reader(path, faults))
    except OSError as error:
        raise LoricaError(f"{path} cannot be read: {error.strerror or _reason(error)}") from error


def _jsonl_rows(path: Path, faults: list[str]) -> Iterator[Row]:
    with open(path, "rb") as file:
        yield from _json_lines(path.name, _lines(path.name, file, faults), faults)


def _lines(name: str, file: BinaryIO, faults: list[str]) -> Iterator[bytes]:
    """Lines as they stand; one without end is not taken into memory, and nothing after it is a line of anything."""
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            faults.append(f"{name}:{number}: a line of more than {LINE_BYTES:,} bytes; is it a file of JSON lines?")
            return
        yield line


def _json_lines(name: str, lines: Iterable[bytes], faults: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        try:
            line_text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            faults.append(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8")
            continue
        if not line_text.strip():
            continue
        try:
            row = parsed(line_text)
        except ValueError as error:
            faults.append(f"{where}: not JSON ({_reason(error)}); mend or remove the line")
            continue
        yield from _object(where, row, faults)


def _json_rows(path: Path, faults: list[str]) -> Iterator[Row]:
    """A list of objects; a file that starts with an object is read as JSON lines, which many `.json` files are."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        faults.append(f"{path.name}: not UTF-8 (byte {error.start}); save the file as UTF-8")
        return
    if not text.lstrip().startswith("["):
        yield from _json_lines(path.name, content.splitlines(keepends=True), faults)
        return
    space = re.compile(r"[\s,]*")
    place, line, counted = text.index("[") + 1, 1, 0
    while (place := _skip(space, text, place)) < len(text) and text[place] != "]":
        line, counted = line + text.count("\n", counted, place), place
        where = f"{path.name}:{line}"
        try:
            row, place = parsed_from(text, place)
        except ValueError as error:
            faults.append(f"{where}: not JSON from here on ({_reason(error)}); mend the file")
            return
        yield from _object(where, row, faults)
    if place >= len(text):
        faults.append(f"{path.name}: the list is not closed by ']'; the file looks cut off")
    elif rest := text[place + 1 :].strip():
        line += text.count("\n", counted, len(text) - len(text[place + 1 :].lstrip()))
        faults.append(f"{path.name}:{line}: {shown(rest, 20)} after the end of the list; make it one list")


def _skip(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return found.end() if found else place


def _object(where: str, row: Any, faults: list[str]) -> Iterator[Row]:
    if isinstance(row, dict):
        yield where, row
    else:
        faults.append(f"{where}: a {type(row).__name__} where an object {{...}} is expected")


def _csv_rows(path: Path, faults: list[str]) -> Iterator[Row]:
    limit, line = csv.field_size_limit(sys.maxsize), 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                faults.append(f"{path.name}:1: the header names {shown(twice[0])} twice; rename one of the columns")
                return
            line = reader.line_num + 1
            for row in reader:
                where, line = f"{path.name}:{line}", reader.line_num + 1
                if None in row or None in row.values():
                    faults.append(f"{where}: not the {len(names)} fields that the header names; mend the line")
                else:
                    yield where, row
    except UnicodeDecodeError as error:
        faults.append(f"{path.name}: not UTF-8 ({error.reason}); save the file as UTF-8")
    except csv.Error as error:
        faults.append(f"{path.name}:{line}: not CSV ({error}); mend the quoting")
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, faults: list[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise LoricaError(f"{path}: parquet files need one more package: {INSTALL}") from error
    rows: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A few bytes can stand for a thousand million equal rows; no file of real ones is packed so well.
            left = PACKED * size_of(path) + (64 << 20)
            for batch in file.iter_batches(batch_size=64) if file.metadata.num_rows <= left else ():
                rows += batch.to_pylist()
                cells = (each for row in rows[-len(batch) :] for each in row.values())
                left -= sum(len(each if isinstance(each, str) else str(each)) for each in cells)
                if left < 0:
                    break
            if left < 0 or len(rows) != file.metadata.num_rows:
                faults.append(f"{path.name}: it unpacks to more than {PACKED} times its size, as no file of rows does")
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        faults.append(f"{path.name}: not a parquet file ({_reason(error)})")
        return
    yield from _numbered(path.name, rows)


READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _hub_rows(source: str) -> dict[str, list[Row]]:
    name, *rest = source.split(":")
    split = rest[-1] if rest else None
    config = rest[0] if len(rest) == 2 else None
    try:
        import datasets
    except ImportError as error:
        raise LoricaError(f"{source}: no such file, and hub data sets need one more package: {INSTALL}") from error
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises what its many back ends raise
        raise LoricaError(f"{source}: no such file, and the hub gives no such data set ({_reason(error)})") from error
    if split is not None:
        return {"train": _numbered(source, loaded)}
    parts = {part: next((n for n in names if n in loaded), None) for part, names in PARTS.items()}
    if parts["train"] is None:
        raise LoricaError(f"{source}: has no split 'train'; name one of its own: {name}:{' '.join(loaded)}")
    return {part: _numbered(f"{name}:{found}", loaded[found]) for part, found in parts.items() if found is not None}


def _numbered(name: str, rows: Iterable[dict[str, Any]]) -> list[Row]:
    cleaned = ({key: _without_nulls(value) for key, value in row.items()} for row in rows)
    return [(f"{name}:{number}", row) for number, row in enumerate(cleaned, 1)]


def _without_nulls(value: Any) -> Any:
    """Columnar files fill the absent keys of nested objects with null; the model's template must not see them."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _folder_files(folder: Path) -> dict[str, list[Path]]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS)
    shard = re.compile(r"-\d+-of-\d+$")
    found = {part: [f for f in files if shard.sub("", f.stem) in names] for part, names in PARTS.items()}
    faults = [
        f"{part}: {', '.join(file.name for file in several)}; keep one"
        for part, several in found.items()
        if len({(shard.sub("", file.stem), file.suffix) for file in several}) > 1
    ]
    if faults:
        raise all_faults(f"{folder}: more than one file for the same part", faults)
    if not found["train"]:
        there = ", ".join(file.name for file in files) or "no data file"
        raise LoricaError(f"{folder}: has no train{{{','.join(READERS)}}}, but {there}; name the file itself to use it")
    return {part: several for part, several in found.items() if several}


def _not_found(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path}: no such file, and no folder {path.parent}"
    names = [other.name for other in path.parent.iterdir()]
    return f"{path}: no such file or folder{nearest(path.name, names)}"


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
