"""Write an adapter for another program: read back, compared, and only then put in its place."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from lorica import doors, formats
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.files import sync
from lorica.formats import Contents, engines, gguf, loralib, mlx, peft
from lorica.formats.updates import Difference, differences
from lorica.lowrank import LoRA
from lorica.models import BUILTIN
from lorica.models.builtin import place
from lorica.plan import config_of

FORMATS = ("peft", "loralib", "gguf", "mlx", "vllm", "ollama", "sglang", "ray")
_FILES = {"loralib": ".safetensors", "gguf": ".gguf"}
# What a rounding of both factors to a number format may do to an element of B A, relative to |B| |A|.
_ROUNDING = {"fp32": 2.0**-22, "bf16": 2.0**-7, "fp16": 2.0**-9}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        differences: between the update that the file holds and that of the adapter, by the path of the layer (and
            for what is kept beside updates, by name).
        notes: what was folded or padded to fit, and what the reader must be told.
        next: the command line that uses it.
    """

    path: Path
    differences: dict[str, Difference]
    notes: list[str]
    next: str


def export(adapter: Adapter, to: str, out: str | Path, dtype: str = "fp32", base: str = "", name: str = "") -> Exported:
    """Write `adapter` in the layout that `to` (one of `FORMATS`) names.

    Args:
        out: a file for `loralib` and `gguf` (its ending is added), else a folder; nothing there is overwritten.
        dtype: `fp32`, `bf16` or `fp16`.
        base: the base model, where the adapter names none, or another path of it is to stand in command lines.
        name: what the engines call the adapter; default: the name of `out`.

    Raises:
        LoricaError: the format cannot hold the adapter, or what was read back is not what was written; `out` is then
            not there.
    """
    out = Path(out)
    if to not in FORMATS:
        raise LoricaError(f"{to!r} is no format: {', '.join(FORMATS)}")
    if not isinstance(adapter.method, LoRA):
        other = f", since {adapter.method.unmergeable}" if adapter.method.unmergeable else f": lorica merge X -o {out}"
        merged = "it cannot be merged either" if adapter.method.unmergeable else "the merged model is for them"
        raise LoricaError(f"no other program knows {adapter.method.name}; {merged}{other}")
    if to in _FILES and out.suffix != _FILES[to]:
        out = out.with_name(out.name + _FILES[to])  # by which it is told what it is
    if out.exists():
        raise LoricaError(f"{out} is there already, and nothing is overwritten; give another name")
    name = name or re.sub(r"\W+", "-", out.stem)
    contents = adapter.contents()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        staged = Path(folder) / out.name
        if to not in _FILES:
            staged.mkdir()
        named = base or adapter.meta.get("base_model", "")
        notes = _write(staged, contents, to, dtype, named, name)
        found = differences(contents, _read_back(staged, to, name))
        _require_same(found, dtype, to)
        for file in staged.rglob("*"):
            sync(file)
        os.replace(staged, out)
        sync(out.parent)
    if zero := [path for path, each in found.items() if "#" not in path and not each.size]:
        notes.append(f"{len(zero)} of {len(found)} change nothing (they are zero): {zero[0]} ...")
    if packed := adapter.meta.get("quantize"):
        notes.append(f"trained on a base packed as {packed}: on another packing of it, expect slightly other answers")
    return Exported(out, found, notes, _next(to, out, _served(named), name))


def open_adapter(
    source: str | Path,
    kind: str = "auto",
    *,
    base: str = "",
    alpha: float | None = None,
    slots: dict[str, list[str]] | None = None,
    kernels: dict[str, int] | None = None,
) -> Adapter:
    """Read an adapter, or the best one of a run, with the facts that its file may lack.

    Args:
        kind: `auto`, or one of `peft`, `loralib`, `gguf`, `mlx`; naming `loralib` also opens its pickles.
        base: of a GGUF adapter that lorica did not write; remembered as the base of any adapter that names none.
        alpha, slots, kernels: of loralib's layers (see `formats.loralib.read`).
    """
    path = doors.place(source)
    path = next((each for each in (path / "best", path / "last") if each.is_dir()), path)
    kind = kind if kind != "auto" else (formats.recognise(path) if path.exists() else None) or "auto"
    if kind != "loralib" and (alpha is not None or slots or kernels):
        raise LoricaError(f"--alpha, --slots and --kernels are for loralib's files, and {source} is not read as one")
    if kind == "loralib":
        contents = loralib.read(path, alpha, slots, pickled=True, kernels=kernels)
    elif kind == "gguf":
        contents = gguf.read(formats.find(path), config_of(base) if base else None)
    elif kind == "mlx":
        contents = mlx.read(path)
    elif kind == "peft":
        contents = peft.read(path)
    else:
        return _based(Adapter.load(source), base)
    return _based(Adapter(*contents), base)


def _based(adapter: Adapter, base: str) -> Adapter:
    known = {key: value for key, value in adapter.meta.items() if value} | ({"base_model": base} if base else {})
    return dataclasses.replace(adapter, meta=known)


def _write(staged: Path, contents: Contents, to: str, dtype: str, base: str, name: str) -> list[str]:
    served = _served(base)
    if to == "peft":
        peft.write(staged, contents, dtype)
        return []
    if to == "loralib":
        return loralib.write(staged, contents, dtype)
    if to == "gguf":
        return gguf.write(staged, contents, _config(base, "a GGUF adapter"), dtype)
    if to == "mlx":
        ends = any(target.path in mlx.ENDS for target in contents.targets)
        tied = bool(_config(base, "this").tie_word_embeddings) if ends else None
        notes = mlx.write(staged, contents, dtype, tied)
        return [*notes, "checked against mlx-lm's layout only, never run: MLX needs a machine of Apple's"]
    if to == "ollama":
        notes = gguf.write(staged / f"{name}.gguf", contents, _config(base, "a GGUF adapter"), dtype)
        stops = json.loads(contents.meta.get("stop_tokens") or "[]")
        engines.write_modelfile(staged, served, f"{name}.gguf", stops)
        return notes
    if to == "ray":
        (staged / name).mkdir()
        notes = engines.write(staged / name, contents, dtype)
        engines.write_ray(staged, served, name)
        return notes
    return engines.write(staged, contents, dtype)


def _read_back(staged: Path, to: str, name: str) -> Contents:
    if to == "ray":
        staged = staged / name
    readers: dict[str, Callable[[Path], Contents]] = {"loralib": loralib.read, "gguf": gguf.read, "mlx": mlx.read}
    if to == "ollama":
        return gguf.read(staged / f"{name}.gguf")
    return readers.get(to, peft.read)(staged)


def _require_same(found: dict[str, Difference], dtype: str, to: str) -> None:
    faults = [
        f"{layer}: {each.largest:.2g} off, of at most {each.size:.2g}"
        for layer, each in found.items()
        if not each.largest <= _ROUNDING[dtype] * each.mass
    ]
    if faults:
        hint = "" if dtype == "fp32" else f"; {dtype} cannot hold these numbers: take bf16 or fp32"
        raise all_faults(f"what was written for {to} does not read back as it was{hint}:", faults)


def _config(base: str, what: str) -> PretrainedConfig:
    if not base:
        raise LoricaError(f"the adapter names no base model, and {what} needs its config: name it with --base")
    return config_of(base)


def _served(base: str) -> str:
    """What another program can open the base by: a built-in alias is known to lorica alone."""
    if base in BUILTIN:
        return str(place(base)) if place(base).is_dir() else BUILTIN[base].hub_id
    return base or "BASE"


def _next(to: str, out: Path, base: str, name: str) -> str:
    if to == "vllm":
        return engines.vllm_line(base, name, out)
    if to == "sglang":
        return engines.sglang_line(base, name, out)
    if to == "ray":
        return f"aws s3 sync {out / name} s3://BUCKET/loras/{name} && serve run {out / 'serve.yaml'}"
    return {
        "peft": f"lorica show {out}",
        "loralib": f"lorica show {out}",
        "gguf": shlex.join(["llama-cli", "-m", base if base.endswith(".gguf") else "BASE.gguf", "--lora", str(out)]),
        "mlx": shlex.join(["mlx_lm.generate", "--model", base, "--adapter-path", str(out), "--prompt", "..."]),
        "ollama": shlex.join(["ollama", "create", name, "-f", str(out / "Modelfile")]),
    }[to]
