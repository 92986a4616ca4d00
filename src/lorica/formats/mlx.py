"""mlx-lm's layout: `adapter_config.json` and `adapters.safetensors` in one folder.

    <path>.lora_a  [in, r]       .lora_b  [r, out]        y += scale (x a) b
    <path>.m       [out]         fine_tune_type "dora"    a magnitude for each output of a linear layer (see `dora`)
    lora_parameters {rank, scale, dropout, keys}          one rank and one scale for all layers; no alpha

Checked against the layout that mlx-lm's code reads, key by key, and never run: MLX needs a machine of Apple's.

mlx-lm's `keys` name layers within a block, and every block gets them; those without tensors in the file stay as they
start there, with b = 0. A tied embedding is refused, because mlx-lm puts its update on the output side too, and so are
an embedding's magnitudes, of which mlx-lm has one for each token instead of one for each number.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica import doors, tensorfiles
from lorica.errors import LoricaError, all_faults, shown
from lorica.files import folder_for, write_atomic
from lorica.formats import Contents, meta_of
from lorica.formats.pair import DTYPES
from lorica.formats.updates import Update, contents_of, one_rank, storage_by_name, updates
from lorica.lowrank import LoRA

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
# Where mlx-lm calls the layers as transformers does; elsewhere it would pass over the file's tensors in silence.
ENDS = {"model.embed_tokens", "lm_head"}
_BY_TOKEN = "mlx-lm keeps a magnitude for each token of an embedding, not for each number of its rows"
_KNOWN = re.compile(r"model\.layers\.\d+\.(?P<key>.+)|model\.embed_tokens|lm_head")


def write(folder: Path, contents: Contents, dtype: str = "fp32", tied: bool | None = None) -> list[str]:
    """Write both files; returns what had to be changed to fit.

    Args:
        tied: whether the base's embedding and output head are one matrix; only needed if either is a target.
    """
    contents, sizes = _apart(contents)
    found = updates(contents, "mlx-lm's layout")
    faults = [
        f"{path}: mlx-lm calls its layers otherwise than transformers" for path in found if not _KNOWN.fullmatch(path)
    ]
    faults += [f"{path}: {_BY_TOKEN}" for path in sizes if found[path].storage == "embedding"]
    if ends := sorted(ENDS & found.keys()):
        if tied is None:
            faults.append(f"{', '.join(ends)}: whether the base ties them is not known; name it with --base")
        elif tied:
            faults.append(f"{', '.join(ends)}: they are tied, and mlx-lm puts an update of one on both")
    if faults:
        raise all_faults("mlx-lm would not read this as it is meant:", faults)
    found, notes = one_rank(found)
    rank, scale = next((update.rank, update.scale) for update in found.values())
    keys = {match["key"] or path for path in found if (match := _KNOWN.fullmatch(path))}
    config = {
        "fine_tune_type": "dora" if sizes else "lora",
        "model": contents.meta.get("base_model") or None,
        "num_layers": -1,  # all blocks: a number counts from the last one
        "lora_parameters": {
            "rank": rank, "scale": scale, "dropout": contents.method.dropout, "keys": sorted(keys),
        },
    }  # fmt: skip
    tensors = {
        f"{path}.lora_{factor.lower()}": getattr(update, factor).T.to(DTYPES[dtype])
        for path, update in sorted(found.items())
        for factor in "AB"
    } | {f"{path}.m": m.to(DTYPES[dtype]) for path, m in sorted(sizes.items())}
    kept = {key: value for key, value in contents.meta.items() if key != "target_modules"}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with folder_for(folder) as place:
        tensorfiles.write(place / TENSORS, tensors, kept)
        write_atomic(place / CONFIG, text)
    return notes


def read(folder: Path) -> Contents:
    """Read both files strictly: what is not understood is a fault, all of them in one error."""
    config = _config(folder / CONFIG)
    stored, metadata = tensorfiles.read(folder / TENSORS)
    faults: list[str] = []
    raw = tensorfiles.floats(stored, faults)
    settings = config["lora_parameters"]
    rank, scale = settings["rank"], float(settings["scale"])
    parts = ("lora_a", "lora_b", *(("m",) if config.get("fine_tune_type") == "dora" else ()))
    faults += [
        f"unexpected  {tensorfiles.shown_name(key)}" for key in raw if key.rpartition(".")[2] not in parts or "#" in key
    ]
    found: dict[str, Update] = {}
    sizes: dict[str, Tensor] = {}
    for path in dict.fromkeys(key.rpartition(".")[0] for key in raw):
        held = {part: raw[f"{path}.{part}"] for part in parts if f"{path}.{part}" in raw}
        if wrong := _wrong(path, held, parts, rank):
            faults += wrong
        elif held:
            a, b = held["lora_a"].T.contiguous(), held["lora_b"].T.contiguous()
            found[path] = Update(a, b, scale, storage_by_name(path))
            sizes |= {path: held["m"]} if "m" in held else {}
    if faults:
        raise all_faults(f"{folder} is not an adapter that can be used:", faults)
    ours = doors.object_in(metadata.get("lorica", "{}"), f"the metadata of {folder / TENSORS}")
    meta = meta_of(ours, folder)
    meta.setdefault("base_model", config.get("model") or "")
    return _together(contents_of(found, meta, float(settings.get("dropout") or 0.0)), sizes)


def _apart(contents: Contents) -> tuple[Contents, dict[str, Tensor]]:
    """An adapter without DoRA's magnitudes, and these ``[out]`` by path."""
    if type(contents.method) is not LoRA or not contents.method.dora:
        return contents, {}
    sizes = {target.path: contents.tensors[f"{target.path}#lora.m"] for target in contents.targets}
    rest = {key: tensor for key, tensor in contents.tensors.items() if not key.endswith("#lora.m")}
    return contents._replace(method=dataclasses.replace(contents.method, dora=False), tensors=rest), sizes


def _together(contents: Contents, sizes: Mapping[str, Tensor]) -> Contents:
    """The inverse of `_apart`."""
    if not sizes:
        return contents
    tensors = {**contents.tensors, **{f"{path}#lora.m": m for path, m in sizes.items()}}
    return contents._replace(method=dataclasses.replace(contents.method, dora=True), tensors=tensors)


def _wrong(path: str, held: Mapping[str, Tensor], parts: Sequence[str], rank: int) -> list[str]:
    """What is wrong with the tensors of one layer; nothing where it has none of a known name."""
    if lacking := [part for part in parts if part not in held]:
        return [f"missing     {path}.{part}" for part in lacking] if held else []
    a, b = held["lora_a"], held["lora_b"]
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] == rank):
        return [f"shape       {path}: a {tuple(a.shape)}, b {tuple(b.shape)}, rank {rank} in the config"]
    if "m" in held and held["m"].shape != b.shape[1:]:
        return [f"shape       {path}.m: {tuple(held['m'].shape)} for {b.shape[1]} outputs"]
    if "m" in held and storage_by_name(path) == "embedding":
        return [f"unexpected  {path}.m: {_BY_TOKEN}"]
    return []


def _config(path: Path) -> dict[str, Any]:
    config = doors.json_object(path)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise LoricaError(f"{path}: fine_tune_type is {shown(kind)}; only lora and dora can be read")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or not {"rank", "scale"} <= set(settings):
        raise LoricaError(f"{path}: lora_parameters with rank and scale is missing")
    if faults := doors.faults_of(settings, _KINDS) + doors.faults_of(config, {"model": (_is_name, "text")}):
        raise all_faults(f"{path} cannot be used:", faults)
    return config


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


_KINDS: dict[str, Any] = {
    "rank": (lambda value: doors.is_count(value, 1), "a whole number from 1 up"),
    "scale": (doors.is_number, "a finite number"),
    "dropout": (lambda value: value is None or (doors.is_number(value) and 0 <= value < 1), "at least 0 and below 1"),
}
