"""Other people's files: each module turns one layout into `Contents` and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from lorica import tensorfiles
from lorica.doors import is_words, object_in, parsed
from lorica.errors import LoricaError, shown
from lorica.lowrank import LoRA
from lorica.targets import Target


class Contents(NamedTuple):
    """What an adapter file holds, whatever its layout.

    `tensors` are fp32 by canonical name (see `patch.trainable`); `meta` is text about where they came from. Of a
    value that algebra made, `shares` say how many times the base's own is to be added (see `beside`); no file has any.
    """

    method: Any  # a `patch.Method`; what only LoRA has is read where a format refused all others
    targets: tuple[Target, ...]
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]
    shares: Mapping[str, Tensor] = MappingProxyType({})


def meta_of(value: Any, path: Path) -> dict[str, str]:
    """What lorica wrote beside the tensors, as text; `target_modules` is left out, which is made when it is read."""
    if not isinstance(value, dict) or not all(isinstance(each, str | int | float | bool) for each in value.values()):
        raise LoricaError(f"the metadata of {path} is {shown(value)}, and must be text by name")
    meta = {key: str(each) for key, each in value.items() if key != "target_modules"}
    for key, good in _WRITTEN.items():
        try:
            sound = not meta.get(key) or good(parsed(meta[key]))
        except ValueError:
            sound = False
        if not sound:
            raise LoricaError(f"the metadata of {path} gives as {key} {shown(meta[key])}, which lorica does not write")
    return meta


def _is_making(value: Any) -> bool:
    known = isinstance(value, dict) and isinstance(value.get("expression"), str)
    return known and isinstance(made := value.get("adapters"), dict) and is_words(list(made.values()))


_WRITTEN: dict[str, Callable[[Any], bool]] = {"stop_tokens": is_words, "made_of": _is_making}  # values that are JSON


def recognise(path: Path) -> str | None:
    """Which layout lies at `path`: `peft`, `own`, `mlx`, `gguf` or `loralib`; None if none of them, as for a model.

    A folder with one GGUF adapter in it counts as that file (`find`). Only names and headers are read; a header that is
    damaged is an error. A pickle is none of them, whatever it holds.
    """
    from lorica.formats import mlx, own, pair

    if path.is_dir():
        if (path / mlx.TENSORS).is_file() and not (path / pair.TENSORS).is_file():
            return "mlx"
        if (path / pair.CONFIG).is_file():
            return "own" if own.is_ours(path) else "peft"
        return "gguf" if find(path) != path else None
    if path.suffix == ".gguf" and path.is_file():
        return "gguf" if _is_adapter(path) else None
    if path.suffix == ".safetensors" and any(key.endswith(".lora_A") for key in tensorfiles.header(path)):
        return "loralib"
    return None


def find(path: Path) -> Path:
    """The GGUF adapter in a folder that holds nothing else of that kind; else `path` itself."""
    files = list(path.glob("*.gguf")) if path.is_dir() else []
    return files[0] if len(files) == 1 and _is_adapter(files[0]) else path


def _is_adapter(path: Path) -> bool:
    from lorica.formats import gguf  # slow to import, and most adapters are no GGUF

    return gguf.is_adapter(path)


def read(path: Path) -> Contents:
    """Read an adapter in whatever layout it is; what needs facts that are not in the file says which."""
    from lorica.formats import loralib, mlx, own, peft

    kind = recognise(path)
    if kind == "gguf":
        from lorica.formats import gguf

        return gguf.read(find(path))
    if kind == "own":
        return own.read(path)
    if kind == "mlx":
        return mlx.read(path)
    if kind == "loralib":
        return loralib.read(path)
    if path.is_file():
        if path.suffix in loralib.PICKLES:
            raise LoricaError(loralib.pickle_refused(path))
        raise LoricaError(f"{path} is no adapter that is known: PEFT, loralib, GGUF (llama.cpp) and mlx-lm are")
    return peft.read(path)


def write(folder: Path, contents: Contents, dtype: str = "fp32") -> None:
    """Write an adapter in the native layout: PEFT's own for LoRA, the same two files for what PEFT has no type for."""
    from lorica.formats import own, peft

    (peft if type(contents.method) is LoRA else own).write(folder, contents, dtype)


def about(folder: Path) -> dict[str, str]:
    """What lorica wrote about an adapter in PEFT's layout (`chat_template`, ...), from the header of its file alone."""
    from lorica.formats import pair

    path = folder / pair.TENSORS
    return meta_of(object_in(tensorfiles.words(path).get("lorica", "{}"), f"the metadata of {path}"), path)


def chat_template(folder: Path) -> str:
    """The chat template that an adapter was trained through and carries; empty for none."""
    return about(folder).get("chat_template", "")
