"""The two files of an adapter folder, `adapter_config.json` and `adapter_model.safetensors`, as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica import doors, tensorfiles
from lorica.errors import LoricaError
from lorica.files import folder_for, write_atomic

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], dtype: str
) -> None:
    """Write both files. A new folder appears whole; in a folder that is there, each file is replaced in one step."""
    if dtype not in DTYPES:
        raise LoricaError(f"an adapter is kept as one of {', '.join(DTYPES)}, not {dtype!r}")
    # What is inside is not sorted: of several patterns that fit, the first counts.
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    cast = {key: tensor.to(DTYPES[dtype]) for key, tensor in sorted(tensors.items())}
    with folder_for(folder) as place:
        tensorfiles.write(place / TENSORS, cast, metadata)
        write_atomic(place / CONFIG, text)


def load_config(folder: Path) -> dict[str, Any]:
    """The config as it is written."""
    path = folder / CONFIG
    if not path.is_file():
        raise LoricaError(f"{folder} is not an adapter: it has no {CONFIG}")
    return doors.json_object(path)


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as they are, and the file's metadata."""
    path = folder / TENSORS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise LoricaError(
                f"{folder} holds a pickle (adapter_model.bin), which can run any code when it is read and is refused; "
                "load it with PEFT where you trust it and save it again, which writes adapter_model.safetensors"
            )
        raise LoricaError(f"{folder} is not an adapter: it has no {TENSORS}")
    return tensorfiles.read(path)
