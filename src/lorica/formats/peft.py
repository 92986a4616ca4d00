"""PEFT's layout, which is also ours: `adapter_config.json` and `adapter_model.safetensors` in one folder.

    base_model.model.<path>.lora_A.weight  [r, in]       .lora_B.weight  [out, r]
    base_model.model.<path>.lora_embedding_A  [r, num]   .lora_embedding_B  [dim, r]
    base_model.model.<path>.token_adapter.trainable_tokens_delta  [n, dim]   (the rows themselves, despite the name)
    base_model.model.<path>.lora_magnitude_vector  [out]           DoRA's m; [1, out, 1...] of a convolution
    (convolutions and experts: see `formats.stacks`)
    base_model.model.<name of a parameter>               biases and modules_to_save; a patched layer's own is
                                                         <path>.base_layer.bias

PEFT has no word for a slice of a fused projection, so parts of one layer are written as a single update of the summed
rank with a block-diagonal B. Which blocks are which is in the file's metadata, where PEFT does not look, together with
what PEFT has no place for: the base's fingerprint, the chat template, the stop tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica import doors, tensorfiles
from lorica.errors import LoricaError, all_faults, shown
from lorica.formats import Contents, meta_of, pair, stacks
from lorica.formats.pair import load_config, load_tensors
from lorica.formats.peft_config import kind_faults, slice_faults, sort_rows
from lorica.formats.updates import in_any_order, only
from lorica.lowrank import LoRA
from lorica.patterns import require_few
from lorica.targets import Target

PREFIX = "base_model.model."

_READ = {
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights",
    "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Settings of training or of PEFT itself: they change nothing about what the tensors mean.
_IRRELEVANT = {
    "arrow_config", "auto_mapping", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "monteclora_config", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "velora_config", "kasa_config", "lora_ranknum",
}  # fmt: skip
_PLAIN_INITS = {True, False, None, "gaussian", "orthogonal", "eva", "mica"}
_TENSOR = re.compile(
    r"(?P<path>.+)\.(?:(?P<linear>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|lora_(?P<size>magnitude)_vector(?:\.weight)?|token_adapter\.(?P<rows>trainable_tokens_delta))"
)


def write(folder: Path, contents: Contents, dtype: str = "fp32") -> None:
    """Write both files. A new folder appears whole; in a folder that is there, each file is replaced in one step."""
    pair.write(folder, _config(contents), _to_peft(contents), _metadata(contents), dtype)


def read(folder: Path) -> Contents:
    """Read both files strictly: every setting or tensor that is not understood is a fault, all of them in one error."""
    title = f"{folder} is not an adapter that can be used:"
    config = load_config(folder)
    if wrong := kind_faults(config):
        raise all_faults(title, wrong + _config_faults(config))
    faults = _config_faults(config)
    raw, metadata = load_tensors(folder)
    extra = doors.object_in(metadata.get("lorica", "{}"), f"the metadata of {folder / pair.TENSORS}")
    tensors, storages = _canonical(tensorfiles.floats(raw, faults), faults)
    listed = ("rank_pattern", "alpha_pattern", "target_parameters", "target_modules")
    require_few(sum(len(config.get(key) or ()) for key in listed), len(storages), folder)
    stacked, taken, stack_faults = stacks.from_peft(config, tensors, list(storages))
    plain = {path: storage for path, storage in storages.items() if path not in taken}
    slices = extra.pop("slices", {})
    faults += stack_faults + _pair_faults(tensors, plain, config, taken) + _magnitude_faults(tensors, storages, config)
    faults += slice_faults(tensors, plain, slices)
    token_rows = sort_rows(config, tensors, faults)
    if faults:
        raise all_faults(title, faults)
    method, targets = _from_peft(config, tensors, plain, slices, stacked)
    method = dataclasses.replace(method, token_rows=token_rows)
    for target in targets:
        if not math.isfinite(method.scale_of(target.key)):
            raise LoricaError(f"{folder}: the scale of {target} is no finite number")
    meta = meta_of(extra, folder)
    method = dataclasses.replace(method, modules_to_save=[m for m in method.modules_to_save if m not in _head(meta)])
    meta.setdefault("base_model", config.get("base_model_name_or_path") or "")
    meta.setdefault("task_type", config.get("task_type") or "")
    narrowed = config.get("layers_to_transform") or config.get("exclude_modules")
    if isinstance(config.get("target_modules"), list) and not narrowed:
        meta["target_modules"] = json.dumps(sorted(config["target_modules"]))
    return Contents(method, targets, tensors, meta)


def _canonical(raw: Mapping[str, Tensor], faults: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by canonical name, and the storage of each layer that has factors."""
    tensors: dict[str, Tensor] = {}
    storages: dict[str, str] = {}
    for key, tensor in raw.items():
        name = key.removeprefix(PREFIX)
        match = _TENSOR.fullmatch(name)
        if not key.startswith(PREFIX) or "#" in name or ("lora_" in name and not match):
            faults.append(f"unexpected  {tensorfiles.shown_name(key)} {tuple(tensor.shape)}")
            continue
        if not match:
            name = name.replace(".base_layer.", ".")
        elif match["rows"] or match["size"]:
            name = f"{match['path']}#{'tokens.rows' if match['rows'] else 'lora.m'}"
            tensor = tensor if match["rows"] else tensor.flatten()
        else:
            storages[match["path"]] = "embedding" if match["embedding"] else "linear"
            name = f"{match['path']}#lora.{match['embedding'] or match['linear'][-1]}"
        if name in tensors:
            faults.append(f"twice       {tensorfiles.shown_name(key)}, under two names")
        tensors[name] = tensor
    return tensors, storages


def _to_peft(contents: Contents) -> dict[str, Tensor]:
    """Canonical tensors under PEFT's names, the parts of a fused layer joined: A stacked, B block-diagonal."""
    tensors = dict(contents.tensors)
    out: dict[str, Tensor] = {}
    for path, parts in _by_path(contents.targets).items():
        if stacks.is_stack(parts[0]):
            out |= {PREFIX + key: tensor for key, tensor in stacks.to_peft(parts, tensors).items()}
            for key in (f"{path}#{target.part or 'lora'}.{factor}" for target in parts for factor in "ABm"):
                tensors.pop(key, None)
            continue
        A = [tensors.pop(f"{path}#{target.part or 'lora'}.A") for target in parts]
        B = [tensors.pop(f"{path}#{target.part or 'lora'}.B") for target in parts]
        if parts[0].rows:
            whole = B[0].new_zeros(parts[0].shape[0], sum(b.shape[1] for b in B))
            column = 0
            for target, b in zip(parts, B, strict=True):
                assert target.rows is not None
                whole[slice(*target.rows), column : column + b.shape[1]] = b
                column += b.shape[1]
            A, B = [torch.cat(A)], [whole]
        embedding = parts[0].storage == "embedding"
        out[f"{PREFIX}{path}.{'lora_embedding_A' if embedding else 'lora_A.weight'}"] = A[0]
        out[f"{PREFIX}{path}.{'lora_embedding_B' if embedding else 'lora_B.weight'}"] = B[0]
        if f"{path}#lora.m" in tensors:
            out[f"{PREFIX}{path}.lora_magnitude_vector"] = tensors.pop(f"{path}#lora.m")
    patched = _by_path(contents.targets)
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        name = f"{path}.base_layer.{last}" if path in patched else key
        out[PREFIX + name.replace("#tokens.rows", ".token_adapter.trainable_tokens_delta")] = tensor
    return out


def _config(contents: Contents) -> dict[str, Any]:
    method, meta = contents.method, contents.meta
    r, alpha, ranks, alphas = method.r, method.alpha, dict(method.ranks), dict(method.alphas)
    joined = {path: len(parts) for path, parts in _by_path(contents.targets).items() if parts[0].rows}
    if (
        joined
        and not ranks
        and not alphas
        and len(joined) == len(_by_path(contents.targets)) == Counter(joined.values()).most_common(1)[0][1]
    ):
        count = next(iter(joined.values()))
        r, alpha = method.r * count, _alpha(method, method.scale_of(""), method.r * count)
    elif joined:
        paths = _by_path(contents.targets)
        exact = {path: method.rank_of(path) * count for path, count in joined.items()}
        ranks = _first({only(path, paths): r for path, r in exact.items()}, ranks)
        scaled = {only(path, paths): _alpha(method, method.scale_of(path), r) for path, r in exact.items()}
        alphas = _first(scaled, alphas)
    keys = sorted({target.key for target in contents.targets})
    ranks, alphas = in_any_order(ranks, keys, r), in_any_order(alphas, keys, alpha)
    whole = [*method.modules_to_save, *_head(meta)]
    rows = {key.removesuffix("#tokens.rows") for key in contents.tensors if key.endswith("#tokens.rows")}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": meta.get("task_type") or None,
        "base_model_name_or_path": meta.get("base_model") or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": method.dropout,
        "bias": method.bias,
        "target_modules": json.loads(meta.get("target_modules", "null"))
        or sorted({target.path for target in contents.targets if target.storage != "experts"}),
    }
    optional: dict[str, Any] = {
        "ensure_weight_tying": method.tied,
        "fan_in_fan_out": any(target.storage == "conv1d" for target in contents.targets),
        "target_parameters": sorted(target.key for target in contents.targets if target.storage == "experts"),
        "use_dora": method.dora,
        "use_rslora": method.scaling == "alpha/sqrt(r)",
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        # PEFT compares the ends of names, dots or not, so only a whole path is safe from meaning more than it says.
        "modules_to_save": sorted(
            {match[1] for name in whole for key in contents.tensors if (match := _module(name, key))}
        ),
        "trainable_token_indices": {path.rsplit(".", 1)[-1]: list(method.token_rows) for path in sorted(rows)},
        "init_lora_weights": "gaussian" if method.init == "gaussian" else None,
    }
    return config | {key: value for key, value in optional.items() if value}


def _first(these: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Patterns of which these count before the others, and instead of those that are spelled alike."""
    return these | {key: value for key, value in others.items() if key not in these}


def _head(meta: Mapping[str, str]) -> list[str]:
    """The modules of a task head, which is trained whole whatever the method."""
    return json.loads(meta.get("head", "[]"))


def _module(name: str, key: str) -> re.Match[str] | None:
    """The path of the module called `name` that the parameter `key` lies in, as group 1."""
    return re.match(rf"((?:.*\.)?{re.escape(name)})\.", key)


def _metadata(contents: Contents) -> dict[str, Any]:
    slices = {
        path: {target.part: list(target.rows) for target in parts if target.rows}
        for path, parts in _by_path(contents.targets).items()
        if parts[0].rows
    }
    meta = {key: value for key, value in contents.meta.items() if key != "target_modules"}
    return {**meta, "slices": slices} if slices else meta


def _from_peft(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    storages: dict[str, str],
    slices: dict[str, dict[str, list[int]]],
    stacked: Sequence[Target],
) -> tuple[LoRA, tuple[Target, ...]]:
    """The method and targets; the joined update of a fused layer is taken apart in `tensors` where it still is one."""
    method = LoRA(
        r=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=config.get("lora_dropout", 0.0),
        scaling="alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        bias=config.get("bias", "none"),
        ranks=config.get("rank_pattern") or {},
        alphas=config.get("alpha_pattern") or {},
        # For a classifier PEFT names every head that it knows of, whichever the model has.
        modules_to_save=[
            name for name in config.get("modules_to_save") or () if any(_module(name, key) for key in tensors)
        ],
        tied=bool(config.get("ensure_weight_tying")),
        dora=bool(config.get("use_dora")),
    )
    targets = list(stacked)
    split: dict[str, int] = {}
    for path, storage in storages.items():
        A, B = tensors[f"{path}#lora.A"], tensors[f"{path}#lora.B"]
        shape = (B.shape[0], A.shape[1])
        storage = "conv1d" if config.get("fan_in_fan_out") and storage == "linear" else storage
        parts = slices.get(path, {})
        if parts and (pieces := _split(A, B, parts)):
            del tensors[f"{path}#lora.A"], tensors[f"{path}#lora.B"]
            split[path] = len(parts)
            for part, (a, b) in pieces.items():
                tensors[f"{path}#{part}.A"], tensors[f"{path}#{part}.B"] = a, b
                targets.append(Target(path, storage, shape, part, (parts[part][0], parts[part][1])))
        else:
            targets.append(Target(path, storage, shape))
    return _divided(method, split, _by_path(targets)), tuple(targets)


def _split(A: Tensor, B: Tensor, parts: dict[str, list[int]]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The parts of a block-diagonal update, or None if it no longer is one (trained on as a whole elsewhere)."""
    r, rest = divmod(A.shape[0], len(parts))
    if rest:
        return None
    pieces = {}
    others = B.clone()
    for place, (part, (start, stop)) in enumerate(parts.items()):
        block = slice(place * r, (place + 1) * r)
        pieces[part] = (A[block].clone(), B[start:stop, block].clone())
        others[start:stop, block] = 0
    return None if others.any() else pieces


def _divided(method: LoRA, split: dict[str, int], paths: Mapping[str, Any]) -> LoRA:
    """The method whose rank at a split layer is one part's, at the same scale."""
    if not split:
        return method
    ranks = {path: method.rank_of(path) // count for path, count in split.items()}
    alphas = {path: _alpha(method, method.scale_of(path), r) for path, r in ranks.items()}
    if len(split) == len(paths) and len(set(ranks.values())) == len(set(alphas.values())) == 1:
        r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        return dataclasses.replace(method, r=r, alpha=alpha, ranks={}, alphas={})
    keys = {path: only(path, paths) for path in split}
    plain = dataclasses.replace(
        method,
        ranks={key: r for key, r in method.ranks.items() if key not in keys.values()},
        alphas={key: alpha for key, alpha in method.alphas.items() if key not in keys.values()},
    )
    own_r = {keys[path]: r for path, r in ranks.items() if r != plain.rank_of(path)}
    # Square roots and back (rsLoRA) may leave a last bit that no setting had.
    own_alpha = {keys[p]: a for p, a in alphas.items() if not math.isclose(a, plain.alpha_of(p), rel_tol=1e-12)}
    return dataclasses.replace(plain, ranks=own_r | dict(plain.ranks), alphas=own_alpha | dict(plain.alphas))


def _alpha(method: LoRA, scale: float, r: int) -> float:
    """The alpha that gives `scale` at rank r under the method's scale rule."""
    return scale * (r if method.scaling == "alpha/r" else math.sqrt(r))


def _by_path(targets: Iterable[Target]) -> dict[str, list[Target]]:
    grouped: dict[str, list[Target]] = {}
    for target in targets:
        grouped.setdefault(target.path, []).append(target)
    return grouped


def _config_faults(config: dict[str, Any]) -> list[str]:
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type is {shown(config.get('peft_type'))}; only LORA is known")
    for key, value in config.items():
        if key not in _READ | _IRRELEVANT and value not in (None, False, [], {}, ""):
            faults.append(f"{key}={shown(value)} is not understood, so the adapter would not mean what it says")
    init = config.get("init_lora_weights")
    if not isinstance(init, (bool, str, type(None))) or init not in _PLAIN_INITS:
        faults.append(
            f"init_lora_weights={shown(init)} changed the base's weights when training began; convert it to a plain "
            "LoRA in PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return faults


def _magnitude_faults(tensors: Mapping[str, Tensor], paths: Iterable[str], config: dict[str, Any]) -> list[str]:
    """What is wrong with DoRA's magnitudes: one per output, of every layer or, without use_dora, of none."""
    faults = []
    for path in paths:
        m, B = (tensors.get(f"{path}#lora.{name}") for name in "mB")
        if (m is not None) != bool(config.get("use_dora")):
            said = "which use_dora asks for" if m is None else "and the config does not say use_dora"
            faults.append(f"{'missing' if m is None else 'unexpected':<11} {path}: its lora_magnitude_vector, {said}")
        elif m is not None and B is not None and len(m) != len(B):
            faults.append(f"shape       {path}: lora_magnitude_vector has {len(m)} of {len(B)} outputs")
    return faults


def _pair_faults(
    tensors: Mapping[str, Tensor], storages: dict[str, str], config: dict[str, Any], others: Sequence[str]
) -> list[str]:
    faults = []
    method = LoRA(r=config.get("r", 8), ranks=config.get("rank_pattern") or {})
    for path in storages:
        A, B = (tensors.get(f"{path}#lora.{factor}") for factor in "AB")
        if A is None or B is None:
            faults.append(f"missing     {path}: its lora_{'A' if A is None else 'B'}")
        elif A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            faults.append(f"shape       {path}: lora_A is {tuple(A.shape)} and lora_B is {tuple(B.shape)}")
        elif A.shape[0] != (r := method.rank_of(path)):
            faults.append(f"shape       {path}: its rank is {A.shape[0]}, the config says {r}")
    named = config.get("target_modules")
    for name in named if isinstance(named, list) else []:
        if not any(path == name or path.endswith(f".{name}") for path in [*storages, *others]):
            faults.append(f"missing     every tensor of target {name!r}")
    return faults
