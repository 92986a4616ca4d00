"""Safetensors files. Of those that others wrote the header is checked before anything is mapped, numbers before use.

The library checks offsets against the size of the file. What it takes and we do not: a header that is long to read, two
tensors of one name, sizes that no tensor here can have (zero, or above 2^40), elements that are no finite numbers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorica.doors import is_words, parsed, size_of
from lorica.errors import LoricaError, shown
from lorica.files import file_atomic

HEADER_BYTES = 32 << 20  # some 200,000 tensors: an adapter of every expert of the largest mixtures has half of that
LARGEST_SIZE = 2**40
_FLOATS = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip


def write(path: Path, tensors: Mapping[str, Tensor], told: Any) -> None:
    """Replace `path` in one step by these tensors, in their order, and an object under `lorica` in the header.

    They are written from where they lie, without a copy of the file in memory.
    """
    # One key only: safetensors writes several in random order, and the same tensors are to give the same bytes.
    words = {"lorica": json.dumps(told, sort_keys=True)}
    with file_atomic(path) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata=words)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, mapped and not copied, and the text in the header."""
    header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as fault:
        raise LoricaError(f"{path} is damaged or not a safetensors file: {fault}") from fault


def header(path: Path) -> dict[str, Any]:
    """What the header says of each tensor: `dtype`, `shape`, `data_offsets`. Only the header is read."""
    return _header(path)[0]


def words(path: Path) -> dict[str, str]:
    """The text in the header, by name. Only the header is read."""
    return _header(path)[1]


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    size = size_of(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= size - 8:
                raise LoricaError(f"{path} is damaged or not a safetensors file: {_what(start, size)}")
            if length > HEADER_BYTES:
                raise LoricaError(f"{path}: its header has {length:,} bytes; at most {HEADER_BYTES:,} are read")
            found = parsed(file.read(length).decode())
    except OSError as fault:
        raise LoricaError(f"{path} cannot be read: {fault.strerror}") from fault
    except LoricaError:
        raise
    except ValueError as fault:
        raise LoricaError(f"{path} is damaged or not a safetensors file: its header is no JSON: {fault}") from fault
    if not isinstance(found, dict):
        raise LoricaError(f"{path} is damaged or not a safetensors file: its header is no object")
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not is_words(list(metadata.values())):
        raise LoricaError(f"{path}: the metadata in its header is not text by name")
    for name, about in found.items():
        shape = about.get("shape") if isinstance(about, dict) else None
        if not isinstance(shape, list) or not all(isinstance(each, int) and each < LARGEST_SIZE for each in shape):
            raise LoricaError(f"{path}: its header gives {shown(name)} the shape {shown(shape)}, which no tensor has")
    return found, metadata


def floats(raw: Mapping[str, Tensor], faults: list[str]) -> dict[str, Tensor]:
    """The tensors in fp32. Those that hold other things than finite numbers are left out, and are faults."""
    found = {}
    for key, tensor in raw.items():
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            faults.append(f"unexpected  {shown_name(key)} ({kind}, {tuple(tensor.shape)})")
            continue
        if not tensor.numel():
            faults.append(f"empty       {shown_name(key)} {tuple(tensor.shape)}")
            continue
        found[key] = tensor = tensor.float()
        # The extremes are NaN where any element is.
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            faults.append(
                f"not finite  {shown_name(key)}: {bad:,} of {tensor.numel():,} elements are NaN or infinite, as after"
                " a training that diverged; take an earlier save"
            )
    return found


def shown_name(key: str) -> str:
    """The name of a tensor as errors give it: as it is, if it is one."""
    return key if len(key) <= 200 and key.isprintable() else shown(key)


def _what(start: bytes, size: int) -> str:
    if start[:2] == b"PK" or start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        return "it is a pickle under another name, which can run code when it is read, and is refused"
    if start[:4] == b"GGUF":
        return "it is a GGUF file under another name; call it .gguf"
    return f"it has {size:,} bytes, and says that its header alone has more" if size > 8 else "it is empty or cut off"
