"""Whether a configuration and weights can belong together, before a model is built as the configuration says.

transformers fills what a file lacks with random numbers: a configuration of a few bytes can ask for any amount of
memory, or for a million layers. Here it is built without memory first, and must have no more parameters than the
files hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from lorica import doors, tensorfiles
from lorica.errors import LoricaError, all_faults, shown

INDEX = "model.safetensors.index.json"
# Sizes that make something of their own for each, and how many there may be where the files have few tensors.
_REPEATED = re.compile(r"layer|block|depth|expert|stage")
_FEW, _LABELS = 4096, 1 << 20
_SLACK = 1 << 24  # parameters and buffers that no file holds: tables of positions, masks
_PER_BYTE = 16  # parameters in a byte of packed weights, at the most


class Held(NamedTuple):
    """What weight files hold: tensors, and elements, or more where these are packed."""

    tensors: int
    elements: int


def of_folder(folder: Path, name: str) -> Held:
    """What the safetensors files of a folder hold, by their headers. LoricaError where one is damaged or missing."""
    config = doors.json_object(folder / "config.json")
    whole = folder / "model.safetensors"
    files, faults = ([whole], []) if whole.is_file() else _parts(folder)
    faults += [
        f"config.json asks for code from elsewhere, which is not run: {key} is {shown(value)}"
        for key, value in _values(config)
        if "implementation" in key and "/" in str(value)
    ]
    if faults:
        raise all_faults(f"{name} cannot be loaded:", faults)
    headers = [tensorfiles.header(file) for file in files]
    tensors = sum(map(len, headers))
    elements = sum(math.prod(about["shape"]) for header in headers for about in header.values())
    if "quantization_config" in config:
        elements = _PER_BYTE * sum(file.stat().st_size for file in files)
    require_few(config, tensors, name)
    return Held(tensors, elements)


def require_few(config: Mapping[str, Any], tensors: int, name: str) -> None:
    """LoricaError where a configuration wants more layers or experts than so many tensors can be of."""
    faults = [
        f"config.json: {key} is {shown(value)}, and its weights are {tensors:,} tensors"
        for key, value in _values(config)
        if isinstance(value, int)
        and ((_REPEATED.search(key) and value > max(_FEW, tensors)) or (key == "num_labels" and value > _LABELS))
    ]
    if faults:
        raise all_faults(f"{name} cannot be loaded:", faults)


def require(kind: Any, config: PretrainedConfig, held: Held, name: str) -> None:
    """LoricaError where a model of this kind and configuration has more parameters than the files hold."""
    make = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    with torch.device("meta"):
        model = make(config)
    head = model.get_output_embeddings() if config.tie_word_embeddings else None
    parts = {id(part): part.numel() for part in [*model.parameters(), *model.buffers()]}
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        del parts[id(head.weight)]  # it will be tied when the weights are there
    wanted = sum(parts.values())
    if wanted > held.elements + _SLACK:
        raise LoricaError(
            f"{name} cannot be loaded: its configuration is of a model with {wanted:,} parameters, and its weights are"
            f" {held.elements:,}; take both from the same place"
        )


def _parts(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that the index names, which must lie beside it."""
    named = doors.json_object(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(part, str) for part in named.values()):
        return [], [f"{INDEX} has no weight_map of files by tensor"]
    parts = sorted(set(named.values()))
    faults = [
        f"{INDEX} names {shown(part)}, which is no .safetensors file beside it"
        for part in parts
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", part) or not (folder / part).is_file()
    ]
    return [folder / part for part in parts], faults


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _values(value)
        yield key, value
