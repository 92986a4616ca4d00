"""The header of a GGUF file, walked before the `gguf` package reads it, which takes every count in it as true.

    GGUF  version  tensors  pairs  | key, type, value ...  | name, dims, type, offset ...  | padding | data

All counts, lengths and sizes must fit into the file, tensors must lie inside it, and no name may be there twice.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUFValueType

from lorica.doors import size_of
from lorica.errors import LoricaError, shown

ELEMENTS = 8 << 20  # of all lists together; vocabularies of 256,000 tokens with scores and merges have a million
_SIZES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip
_RESERVED = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")  # what the package calls the numbers at the start
_DIMENSIONS = 4  # GGML_MAX_DIMS
_KEY = 65535  # bytes of a key or a name


def check(path: Path, elements: int = ELEMENTS) -> tuple[int, int]:
    """How many tensors and elements it holds. LoricaError where it is no GGUF file, or does not hold together."""
    size = size_of(path)
    if size < 24:
        raise LoricaError(f"{path} is not a readable GGUF file: it has {size} bytes")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(data, elements).whole()
    except OSError as fault:
        raise LoricaError(f"{path} cannot be read: {fault.strerror}") from fault
    except (struct.error, ValueError) as fault:
        reason = "it is cut off" if isinstance(fault, struct.error) else fault
        raise LoricaError(f"{path} is not a readable GGUF file: {reason}") from fault


class _Walk:
    """A place in the file. Reading past the end raises `struct.error`; what cannot be is a ValueError."""

    def __init__(self, data: mmap.mmap, elements: int) -> None:
        self.data, self.left, self.place, self.order = data, elements, 8, "<"
        magic, version = struct.unpack_from("<4sI", data, 0)
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if version & 65535 == 0:
            self.order = ">"
            (version,) = struct.unpack_from(">I", data, 4)
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}; 2 and 3 are read")

    def whole(self) -> tuple[int, int]:
        """Walk from the counts to the end of the last tensor; returns how many tensors, and elements in them."""
        tensors, pairs = self.number("Q"), self.number("Q")
        self.fit(pairs, 8 + 4 + 1, "pairs")
        self.fit(tensors, 8 + 4 + 4 + 8, "tensors")
        alignment = 32
        keys = set(_RESERVED)
        for _ in range(pairs):
            key = self.name(keys)
            kind = self.number("I")
            if key == "general.alignment" and kind == GGUFValueType.UINT32:
                (alignment,) = struct.unpack_from(f"{self.order}I", self.data, self.place)
            self.value(kind, key)
        if not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, which is no power of two")
        names: set[str] = set()
        ends = [self.tensor(names) for _ in range(tensors)]
        start = self.place + -self.place % alignment
        for name, end, _ in ends:
            if start + end > len(self.data):
                raise ValueError(f"{shown(name)} ends {start + end - len(self.data):,} bytes after the end of the file")
        return tensors, sum(elements for *_, elements in ends)

    def number(self, letter: str) -> int:
        """The next number, of struct's type `letter`."""
        (found,) = struct.unpack_from(f"{self.order}{letter}", self.data, self.place)
        self.place += struct.calcsize(f"={letter}")
        return found

    def fit(self, count: int, each: int, what: str) -> None:
        """A count of things of at least so many bytes must fit into what is left of the file."""
        if count > (len(self.data) - self.place) // each:
            raise ValueError(f"it says that it holds {count:,} {what}, for which it is too short")

    def text(self, longest: int) -> bytes:
        """The next string."""
        length = self.number("Q")
        self.fit(length, 1, "bytes of a string")
        if length > longest:
            raise ValueError(f"a name in it has {length:,} bytes")
        self.place += length
        return self.data[self.place - length : self.place]

    def name(self, known: set[str]) -> str:
        """A key, or a tensor's name, that was not there before."""
        found = self.text(_KEY).decode()
        if found in known:
            raise ValueError(f"{shown(found)} is there twice")
        known.add(found)
        return found

    def value(self, kind: int, key: str) -> None:
        """Step over a value."""
        if kind in _SIZES:
            self.skip(_SIZES[GGUFValueType(kind)])
        elif kind == GGUFValueType.STRING:
            self.text(len(self.data)).decode()
        elif kind == GGUFValueType.ARRAY:
            inner, count = self.number("I"), self.number("Q")
            self.left -= count
            if inner not in _SIZES and inner != GGUFValueType.STRING:
                raise ValueError(f"{shown(key)} is a list of type {inner}")
            self.fit(count, _SIZES.get(GGUFValueType(inner), 8), f"elements of {shown(key)}")
            if self.left < 0:
                raise ValueError(f"the lists in its header are too long, that of {shown(key)} among them")
            if inner in _SIZES:
                self.skip(count * _SIZES[GGUFValueType(inner)])
            else:
                for _ in range(count):
                    self.text(len(self.data))
        else:
            raise ValueError(f"{shown(key)} is of type {kind}, which there is not")

    def skip(self, count: int) -> None:
        """Step over bytes that must be there."""
        self.fit(count, 1, "bytes")
        self.place += count

    def tensor(self, names: set[str]) -> tuple[str, int, int]:
        """A tensor's name, where it ends after the start of the data, and its elements."""
        name, dimensions = self.name(names), self.number("I")
        if not 0 < dimensions <= _DIMENSIONS:
            raise ValueError(f"{shown(name)} has {dimensions:,} dimensions")
        sizes = [self.number("Q") for _ in range(dimensions)]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"{shown(name)} is in the format {kind}, which there is not")
        block, width = GGML_QUANT_SIZES[kind]  # type: ignore[index]
        if 0 in sizes or sizes[0] % block:
            raise ValueError(f"{shown(name)} has the sizes {shown(sizes)}, which no tensor has")
        elements = math.prod(sizes)
        return name, offset + elements // block * width, elements
