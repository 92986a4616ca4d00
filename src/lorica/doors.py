"""Files of text that others wrote are opened here: whole, bounded, and as JSON or TOML of the kind that is expected.

A file from a hub may be cut off, huge, nested ten thousand deep, or not a file at all. What is wrong with it is one
`LoricaError`, which says where, before much memory or time is spent on it. Files of tensors are `tensorfiles`'.
"""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError, shown

TEXT_BYTES = 16 << 20  # of a file of settings; the largest real ones, which list every layer, have some 100 kB
LOG_BYTES = 256 << 20  # of a log, a line for each update
DEPTH = 64  # of lists in objects in lists


def place(source: str | Path) -> Path:
    """Where a name that a user gave would lie. LoricaError for one that no file can have."""
    if "\0" in str(source):
        raise LoricaError(f"{shown(str(source))} holds a NUL character, which no name of a file has")
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError) as fault:  # a name that is too long; a home of nobody
        reason = fault.strerror if isinstance(fault, OSError) else "there is no such user"
        raise LoricaError(f"{shown(str(source))} is no name of a file here: {reason}") from fault
    return path


def content(path: Path, largest: int = TEXT_BYTES) -> bytes:
    """All bytes of a regular file that is not larger than that."""
    size = size_of(path)
    if size > largest:
        raise LoricaError(f"{path} has {size:,} bytes, and such a file has at most {largest:,}: it is another file")
    try:
        return path.read_bytes()
    except OSError as fault:
        raise LoricaError(f"{path} cannot be read: {fault.strerror}") from fault


def size_of(path: Path) -> int:
    """Bytes of a regular file; LoricaError where there is none, or a folder, a pipe or a device in its place."""
    try:
        found = path.stat()
    except OSError as fault:
        raise LoricaError(f"{path} cannot be read: {fault.strerror}") from fault
    if not stat.S_ISREG(found.st_mode):
        raise LoricaError(f"{path} is a {'folder' if stat.S_ISDIR(found.st_mode) else 'device'}, not a file")
    return found.st_size


def text(path: Path, largest: int = TEXT_BYTES) -> str:
    """A file of UTF-8."""
    try:
        return content(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise LoricaError(
            f"{path} is not text in UTF-8 (byte {fault.start:,}): it is damaged or another file"
        ) from fault


def parsed(written: str) -> Any:
    """JSON as a value. ValueError says what is wrong with it: also a key that is there twice, or too deep a nesting."""
    value, end = parsed_from(written, len(written) - len(written.lstrip(" \t\r\n")))
    if rest := written[end:].strip(" \t\r\n"):
        raise ValueError(f"what begins with {shown(rest, 20)} follows the end of it")
    return value


def parsed_from(written: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and where it ends."""
    too_deep = ValueError(f"it is nested more than {DEPTH} deep")
    try:
        value, end = _DECODER.raw_decode(written, start)
    except RecursionError as fault:
        raise too_deep from fault
    if isinstance(value, dict | list) and end - start > DEPTH and _deeper(value, DEPTH):
        raise too_deep
    return value, end


def json_object(path: Path, largest: int = TEXT_BYTES) -> dict[str, Any]:
    """A file that holds one JSON object."""
    return object_in(text(path, largest), str(path))


def object_in(written: str, where: str) -> dict[str, Any]:
    """JSON text that is one object; `where` is what an error calls it."""
    try:
        value = parsed(written)
    except ValueError as fault:
        raise LoricaError(f"{where} is not readable as JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise LoricaError(f"{where} holds a {type(value).__name__} where an object was expected")
    return value


def json_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a log that grows by a line at a time; a last line that was cut short is left out.

    Each has a text under `key`, which says what it is.
    """
    # What follows the last newline is empty, or unfinished.
    lines = text(path, LOG_BYTES).split("\n")[:-1]
    found = [object_in(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    for number, each in enumerate(found, 1):
        if not isinstance(each.get(key), str):
            raise LoricaError(f"{path}:{number} has no {key}: it is damaged or another file")
    return found


def toml(path: Path) -> dict[str, Any]:
    """A file of TOML."""
    written = text(path)
    try:
        return tomllib.loads(written)
    except (tomllib.TOMLDecodeError, RecursionError) as fault:
        reason = "it is nested too deep" if isinstance(fault, RecursionError) else str(fault)
        raise LoricaError(f"{path} is not readable as TOML: {reason}") from fault


def faults_of(values: Mapping[str, Any], kinds: Mapping[str, tuple[Callable[[Any], bool], str]]) -> list[str]:
    """Every value that is not of its kind: ``{key: (test, "a whole number")}``. A key that is absent is no fault."""
    return [
        f"{key} is {shown(values[key])}; it must be {need}"
        for key, (good, need) in kinds.items()
        if key in values and not good(values[key])
    ]


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number from `least` on that a size, a rank or an id can be."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def is_words(value: Any) -> bool:
    """Whether a value is a list of text."""
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
        if not level:
            return False
    return True
