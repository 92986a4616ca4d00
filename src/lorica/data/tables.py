"""Rows as they stand in a file or on the hub, each with its place. JSON and CSV need the standard library only.

A row is `(where, columns)`; `where` is "name:line" ("name:row" for parquet and hub sets, which have no lines). Broken
lines are collected as faults, not raised, so that one reading finds them all.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError, all_faults, nearest

Row = tuple[str, dict[str, Any]]
PARTS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
INSTALL = 'pip install "lorica[data]"'


def read_source(source: str | Path) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by part ("train", and "valid", "test" where the source has them), and the faults of single rows.

    `source` is a file, a folder with train/valid/test files, or a hub id: `user/name`, `user/name:split` or
    `user/name:config:split`. LoricaError where there is nothing to read at all.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = _folder_files(path)
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
    return list(reader(path, faults))


def _jsonl_rows(path: Path, faults: list[str]) -> Iterator[Row]:
    with open(path, "rb") as file:
        yield from _json_lines(path.name, file, faults)


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
            row = json.loads(line_text)
        except (ValueError, RecursionError) as error:
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
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    place, line, counted = text.index("[") + 1, 1, 0
    while (place := _skip(space, text, place)) < len(text) and text[place] != "]":
        line, counted = line + text.count("\n", counted, place), place
        where = f"{path.name}:{line}"
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            faults.append(f"{where}: not JSON from here on ({_reason(error)}); mend the file")
            return
        yield from _object(where, row, faults)
    if place >= len(text):
        faults.append(f"{path.name}: the list is not closed by ']'; the file looks cut off")


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
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
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
