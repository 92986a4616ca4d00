"""llama.cpp's layout of an adapter: one `.gguf` file, its tensors named as those of the base's GGUF.

    blk.0.attn_q.weight.lora_a  [r, in]     .lora_b  [out, r]        y += s B (A x)
    token_embd.weight.lora_a  [num, r]      .lora_b  [dim, r]        (A transposed)

s is ``adapter.lora.alpha / r`` with the r of each tensor, in fp32, or 1 where alpha is 0: what one alpha cannot say is
folded into B, and alpha written as 0. The rows of q and k of the Llama family stand in another order there (rotary
pairs side by side), so the rows of their B are moved alike. What the file has no key for (names in the model, heads,
the base) is in a key of our own, which llama.cpp passes over; a file of another program needs the base's config.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lorica import doors, tensorfiles, weights
from lorica.errors import LoricaError, all_faults, shown
from lorica.files import file_atomic
from lorica.formats import Contents, gguf_header, meta_of
from lorica.formats.updates import STORED, Update, contents_of, one_alpha, updates
from lorica.targets import candidates

# model_type in transformers -> architecture in llama.cpp, and whether its converter moves the rows of q and k.
ARCHITECTURES = {
    "llama": ("llama", True), "mistral": ("llama", True), "granite": ("granite", True), "smollm3": ("smollm3", True),
    "qwen2": ("qwen2", False), "qwen3": ("qwen3", False), "gemma": ("gemma", False), "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False), "phi3": ("phi3", False), "gpt2": ("gpt2", False), "olmo2": ("olmo2", False),
    "cohere": ("command-r", False), "starcoder2": ("starcoder2", False),
}  # fmt: skip
DTYPES = {
    "fp32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "fp16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_OURS = "lorica.adapter"
_ELEMENTS = 1 << 16  # of all lists in the header: an adapter has no vocabulary
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class _Base:
    """What must be known of the base to name and order its tensors; `heads` are those of q and of k, if moved."""

    arch: str
    blocks: int
    tied: bool
    heads: tuple[int, int] | None

    def name(self, path: str) -> str | None:
        """The tensor of a layer, ``blk.0.attn_q.weight``; None if llama.cpp applies no adapter to such a one."""
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        found = gguf.get_tensor_name_map(known, self.blocks).get_name(path)
        kind = (found or "").split(".")[-1]
        return f"{found}.weight" if kind.startswith(("attn_", "ffn_")) or kind in ("token_embd", "output") else None


def write(path: Path, contents: Contents, config: PretrainedConfig, dtype: str = "fp32") -> list[str]:
    """Write the file, atomically; returns what had to be changed to fit.

    Args:
        config: of the base model, in transformers' terms.

    Raises:
        LoricaError: an architecture, a target or a kind of update that llama.cpp's adapters cannot hold.
    """
    base = _base(config)
    found = updates(contents, "a GGUF adapter")
    names = {layer: base.name(layer) for layer in found}
    if faults := _faults(names, base):
        raise all_faults(f"llama.cpp could not use this as an adapter of its architecture {base.arch!r}:", faults)
    notes = []
    alpha = one_alpha(found.values())
    # Zero stands for a scale of 1, so an alpha that is zero must be folded too.
    if not alpha or float(np.float32(alpha)) != alpha:
        notes.append(f"folded the scales into B: {', '.join(sorted({f'{each.scale:g}' for each in found.values()}))}")
        found, alpha = {layer: update.folded() for layer, update in found.items()}, 0.0
    ours = {
        "paths": {names[layer]: [layer, update.storage] for layer, update in found.items()},
        "heads": base.heads,
        "dropout": contents.method.dropout,
        "meta": {key: value for key, value in contents.meta.items() if key != "target_modules"},
    }
    with file_atomic(path) as file:
        writer = gguf.GGUFWriter(file, base.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(DTYPES[dtype][2])
        writer.add_string(_OURS, json.dumps(ours, sort_keys=True))
        for layer, update in found.items():
            _add(writer, str(names[layer]), update, base.heads, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return notes


def read(path: Path, config: PretrainedConfig | None = None) -> Contents:
    """Read an adapter of llama.cpp's; `config` of the base is needed for a file that lorica did not write."""
    reader = _open(path)
    if (kind := _text(reader, gguf.Keys.Adapter.TYPE)) != "lora":
        raise LoricaError(f"{path} is not a LoRA adapter: its adapter.type is {kind or 'missing'!r}")
    alpha = _value(reader, gguf.Keys.Adapter.LORA_ALPHA) or 0.0
    if not doors.is_number(alpha):
        raise LoricaError(f"{path} gives as its alpha {shown(alpha)}; it must be a finite number")
    ours = _written(path, reader) or _facts(path, reader, config)
    heads = tuple(ours["heads"]) if ours["heads"] else None
    faults: list[str] = []
    raw = tensorfiles.floats({tensor.name: _tensor(tensor) for tensor in reader.tensors}, faults)
    names = dict.fromkeys(key.rpartition(".")[0] for key in raw)
    faults += [f"unexpected  {tensorfiles.shown_name(key)}" for key in raw if not key.endswith((".lora_a", ".lora_b"))]
    found = {}
    for name in names:
        a, b = raw.get(f"{name}.lora_a"), raw.get(f"{name}.lora_b")
        if name not in ours["paths"]:
            faults.append(f"unexpected  {name}: the base has no such layer")
        elif a is None or b is None:
            faults.append(f"missing     {name}.lora_{'a' if a is None else 'b'}")
        else:
            layer, storage = ours["paths"][name]
            r = (a.shape[1] if name == _EMBEDDING else a.shape[0]) if a.ndim == b.ndim == 2 else None
            if r is None or r != b.shape[-1] or not _can_move(b, name, heads):
                faults.append(f"shape       {name}: lora_a is {tuple(a.shape)} and lora_b is {tuple(b.shape)}")
                continue
            A, B = (a.T.contiguous(), b) if name == _EMBEDDING else (a, _moved(b, name, heads, back=True))
            found[layer] = Update(A, B, alpha / B.shape[1] if alpha else 1.0, storage)
    if faults:
        raise all_faults(f"{path} is not an adapter that can be used:", faults)
    return contents_of(found, meta_of(ours["meta"], path), ours["dropout"])


def is_adapter(path: Path) -> bool:
    """Whether a `.gguf` file says that it holds an adapter, and not a model, whose vocabulary would be long to read."""
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 16)
    except OSError as fault:
        raise LoricaError(f"{path} cannot be read: {fault.strerror}") from fault
    # Keys come before the tensors, the general ones first: the name, the type of the value, its length, its text.
    _, found, value = start.partition(gguf.Keys.General.TYPE.encode() + struct.pack("<I", gguf.GGUFValueType.STRING))
    return start[:4] == b"GGUF" and bool(found) and value[8:].startswith(gguf.GGUFType.ADAPTER.encode())


def _open(path: Path) -> Any:
    """The file's reader; a file that is no GGUF is an error."""
    gguf_header.check(path, _ELEMENTS)
    return gguf.GGUFReader(path)


def _base(config: PretrainedConfig) -> _Base:
    if config.model_type not in ARCHITECTURES:
        raise LoricaError(
            f"how llama.cpp names and orders the tensors of {config.model_type!r} is not known here; known:"
            f" {', '.join(ARCHITECTURES)}; convert with llama.cpp's own convert_lora_to_gguf.py instead"
        )
    arch, moved = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return _Base(arch, config.num_hidden_layers, bool(config.tie_word_embeddings), (heads, keys) if moved else None)


def _faults(names: dict[str, str | None], base: _Base) -> list[str]:
    faults = [f"{layer}: it applies no adapter to such a layer" for layer, name in names.items() if name is None]
    for layer, name in names.items():
        if base.tied and name == _HEAD:
            faults.append(f"{layer}: the base ties it to the embedding, so its GGUF has no {_HEAD}")
        if base.tied and name == _EMBEDDING:
            faults.append(
                f"{layer}: the base ties it to the head, and llama.cpp would use the update there too, and stop"
            )
    return faults


def _add(writer: Any, name: str, update: Update, heads: tuple[int, int] | None, dtype: str) -> None:
    embedding = name == _EMBEDDING
    A, B = update.A.T if embedding else update.A, _moved(update.B, name, heads)
    kind, raw, _ = DTYPES[dtype]
    for end, factor in (("lora_a", A), ("lora_b", B)):
        kept = factor.to(kind).contiguous()
        array = kept.view(torch.uint8).numpy() if kind == torch.bfloat16 else kept.numpy()
        writer.add_tensor(f"{name}.{end}", array, raw_dtype=raw)


def _can_move(B: Tensor, name: str, heads: tuple[int, int] | None) -> bool:
    """Whether the rows of B are those of so many heads, in halves."""
    part = name.split(".")[-2:-1]
    return heads is None or part not in (["attn_q"], ["attn_k"]) or not B.shape[0] % (2 * heads[part == ["attn_k"]])


def _moved(B: Tensor, name: str, heads: tuple[int, int] | None, back: bool = False) -> Tensor:
    """Rows of B where the Llama family's converter puts them: of a head's two halves in turn; or `back`."""
    part = name.split(".")[-2]
    if heads is None or part not in ("attn_q", "attn_k"):
        return B
    count = heads[0] if part == "attn_q" else heads[1]
    half = B.shape[0] // count // 2
    order = (count, half, 2) if back else (count, 2, half)
    return B.reshape(*order, -1).transpose(1, 2).reshape(B.shape)


def _written(path: Path, reader: Any) -> dict[str, Any]:
    """What our own key says; empty for a file of another program."""
    if not (text := _text(reader, _OURS)):
        return {}
    ours = doors.object_in(text, f"the key {_OURS} of {path}")
    faults = [f"{key} is missing" for key in _KINDS if key not in ours] + doors.faults_of(ours, _KINDS)
    if faults:
        raise all_faults(f"the key {_OURS} of {path} cannot be used:", faults)
    return ours


def _are_paths(value: Any) -> bool:
    """``{name of a tensor: [path of the layer, its storage]}``"""
    if not isinstance(value, dict):
        return False
    known = all(doors.is_words(each) and len(each) == 2 and each[1] in STORED for each in value.values())
    return known and len({path for path, _ in value.values()}) == len(value)


_KINDS: dict[str, Any] = {
    "paths": (_are_paths, f"a path and one of {', '.join(STORED)} by name, no path twice"),
    "heads": (
        lambda heads: (
            heads is None
            or (isinstance(heads, list) and len(heads) == 2 and all(doors.is_count(each, 1) for each in heads))
        ),
        "two whole numbers from 1 up, or nothing",
    ),
    "dropout": (lambda value: doors.is_number(value) and 0 <= value < 1, "at least 0 and below 1"),
    "meta": (lambda value: isinstance(value, dict), "text by name"),
}


def _facts(path: Path, reader: Any, config: PretrainedConfig | None) -> dict[str, Any]:
    """What our own key says, for a file without it."""
    if config is None:
        raise LoricaError(
            f"{path} does not say which layers of a model its tensors are: name the base, as in"
            f" lorica convert {path} --to peft --base MODEL -o OUT"
        )
    base = _base(config)
    if (arch := _text(reader, gguf.Keys.General.ARCHITECTURE)) != base.arch:
        raise LoricaError(f"{path} is an adapter for {arch!r}, the base is {base.arch!r}")
    with torch.device("meta"):
        layers = candidates(AutoModelForCausalLM.from_config(config))
    paths = {
        name: [layer, kind.name]
        for layer, module in layers.items()
        if (name := base.name(layer)) and (kind := weights.storage(module))
    }
    return {"paths": paths, "heads": base.heads, "dropout": 0.0, "meta": {}}


def _tensor(tensor: Any) -> Tensor:
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as fault:
        kind = tensor.tensor_type.name
        raise LoricaError(
            f"{tensorfiles.shown_name(tensor.name)} is in {kind}, which cannot be unpacked here"
        ) from fault
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return field.contents() if field else None


def _text(reader: Any, key: str) -> str:
    return str(_value(reader, key) or "")
