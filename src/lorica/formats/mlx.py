"""mlx-lm's layout: `adapter_config.json` and `adapters.safetensors` in one folder.

    <path>.lora_a  [in, r]       .lora_b  [r, out]        y += scale (x a) b
    lora_parameters {rank, scale, dropout, keys}          one rank and one scale for all layers; no alpha

Checked against the layout that mlx-lm's code reads, key by key, and never run: MLX needs a machine of Apple's.

mlx-lm's `keys` name layers within a block, and every block gets them; those without tensors in the file stay as they
start there, with b = 0. A tied embedding is refused, because mlx-lm puts its update on the output side too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lorica import doors, tensorfiles
from lorica.errors import LoricaError, all_faults, shown
from lorica.files import folder_atomic, write_atomic
from lorica.formats import Contents, meta_of
from lorica.formats.pair import DTYPES
from lorica.formats.updates import Update, contents_of, one_rank, storage_by_name, updates

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
# Where mlx-lm calls the layers as transformers does; elsewhere it would pass over the file's tensors in silence.
ENDS = {"model.embed_tokens", "lm_head"}
_KNOWN = re.compile(r"model\.layers\.\d+\.(?P<key>.+)|model\.embed_tokens|lm_head")


def write(folder: Path, contents: Contents, dtype: str = "fp32", tied: bool | None = None) -> list[str]:
    """Write both files; returns what had to be changed to fit.

    Args:
        tied: whether the base's embedding and output head are one matrix; only needed if either is a target.
    """
    found = updates(contents, "mlx-lm's layout")
    faults = [
        f"{path}: mlx-lm calls its layers otherwise than transformers" for path in found if not _KNOWN.fullmatch(path)
    ]
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
        "fine_tune_type": "lora",
        "model": contents.meta.get("base_model") or None,
        "num_layers": -1,  # all blocks: a number counts from the last one
        "lora_parameters": {
            "rank": rank, "scale": scale, "dropout": contents.method.dropout, "keys": sorted(keys),
        },
    }  # fmt: skip
    tensors = {
        f"{path}.lora_{factor.lower()}": getattr(update, factor).T.to(DTYPES[dtype]).contiguous()
        for path, update in sorted(found.items())
        for factor in "AB"
    }
    kept = {key: value for key, value in contents.meta.items() if key != "target_modules"}
    blob = save(tensors, metadata={"lorica": json.dumps(kept, sort_keys=True)})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if folder.is_dir():
        write_atomic(folder / TENSORS, blob)
        write_atomic(folder / CONFIG, text)
    else:
        with folder_atomic(folder) as new:
            (new / TENSORS).write_bytes(blob)
            (new / CONFIG).write_text(text)
    return notes


def read(folder: Path) -> Contents:
    """Read both files strictly: what is not understood is a fault, all of them in one error."""
    config = _config(folder / CONFIG)
    held, metadata = tensorfiles.read(folder / TENSORS)
    faults: list[str] = []
    raw = tensorfiles.floats(held, faults)
    settings = config["lora_parameters"]
    rank, scale = settings["rank"], float(settings["scale"])
    paths = dict.fromkeys(key.rpartition(".")[0] for key in raw)
    faults += [
        f"unexpected  {tensorfiles.shown_name(key)}"
        for key in raw
        if not key.endswith((".lora_a", ".lora_b")) or "#" in key
    ]
    found = {}
    for path in paths:
        a, b = raw.get(f"{path}.lora_a"), raw.get(f"{path}.lora_b")
        if a is None or b is None:
            if f"{path}.lora_a" in raw or f"{path}.lora_b" in raw:
                faults.append(f"missing     {path}.lora_{'a' if a is None else 'b'}")
        elif not _fit(a, b, rank):
            faults.append(f"shape       {path}: a {tuple(a.shape)}, b {tuple(b.shape)}, rank {rank} in the config")
        else:
            found[path] = Update(a.T.contiguous(), b.T.contiguous(), scale, storage_by_name(path))
    if faults:
        raise all_faults(f"{folder} is not an adapter that can be used:", faults)
    ours = doors.object_in(metadata.get("lorica", "{}"), f"the metadata of {folder / TENSORS}")
    meta = meta_of(ours, folder)
    meta.setdefault("base_model", config.get("model") or "")
    return contents_of(found, meta, float(settings.get("dropout") or 0.0))


def _fit(a: Tensor, b: Tensor, rank: int) -> bool:
    return a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] == rank


def _config(path: Path) -> dict[str, Any]:
    config = doors.json_object(path)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise LoricaError(f"{path}: fine_tune_type is {shown(kind)}; only lora can be read")
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
