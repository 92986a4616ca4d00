"""Convolutions and experts in PEFT's layout, where the factors of a matrix are not ``[r, in]`` and ``[out, r]``.

    <path>.lora_A.weight  [r, channels, k...]   .lora_B.weight  [out, r / groups, 1...]      a convolution
    <path>.lora_A.weight  [E r, in]             .lora_B.weight  [out, r E]                   one parameter of experts

The rows of an experts' A go expert by expert; the columns of its B go rank by rank, an expert's beside the next one's.
PEFT wraps a module once per parameter, the first of them innermost, so the keys of all but the last have a
`.base_layer` for each wrapper around theirs; which parameters these are, only the config says (`target_parameters`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lorica.lowrank import LoRA
from lorica.patterns import fits
from lorica.targets import Target
from lorica.weights import EXPERT_MATRICES

INNER = ".base_layer"


def is_stack(target: Target) -> bool:
    """Whether a target's factors are laid out as here."""
    return target.storage in ("conv", "experts")


def to_peft(parts: Sequence[Target], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of a layer's targets by their key after the prefix."""
    out: dict[str, Tensor] = {}
    for place, target in enumerate(sorted(parts, key=_place)):
        A, B = (tensors[f"{target.path}#{target.part or 'lora'}.{factor}"] for factor in "AB")
        if target.storage == "conv":
            _, *kernel = target.sizes
            A = A.reshape(-1, A.shape[-1] // math.prod(kernel), *kernel)
            B = B.reshape(-1, B.shape[-1], *(1 for _ in kernel))
            if (m := tensors.get(f"{target.path}#lora.m")) is not None:
                out[f"{target.path}.lora_magnitude_vector"] = m.reshape(1, -1, *(1 for _ in kernel))
        else:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        path = target.path + INNER * (len(parts) - 1 - place)
        out |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    return out


def from_peft(
    config: Mapping[str, Any], tensors: dict[str, Tensor], paths: Sequence[str]
) -> tuple[list[Target], list[str], list[str]]:
    """Take the stacks among the layers at `paths`: rename and reshape their tensors in place.

    Returns:
        The targets, the paths that they were found at, and what is wrong.
    """
    wanted = config.get("target_parameters") or []
    faults = [
        f"target_parameters names {name!r}; only {', '.join(EXPERT_MATRICES)} of experts are known"
        for name in wanted
        if name.rpartition(".")[2] not in EXPERT_MATRICES
    ]
    targets: list[Target] = []
    taken: list[str] = []
    wrapped: dict[str, list[str]] = {}
    for path in paths:
        module = re.sub(rf"({re.escape(INNER)})+$", "", path)
        if module != path or (_parameters(wanted, module) and not _is_module(config.get("target_modules"), module)):
            wrapped.setdefault(module, []).append(path)
            continue
        A, B = (tensors.get(f"{path}#lora.{factor}") for factor in "AB")
        if A is not None and B is not None and A.ndim == B.ndim > 2:
            taken.append(path)
            if not A.shape[0] % B.shape[1] == B.shape[0] % (A.shape[0] // B.shape[1] or 1) == 0 or B[0, 0].numel() > 1:
                faults.append(f"shape       {path}: lora_A is {tuple(A.shape)} and lora_B is {tuple(B.shape)}")
                continue
            targets.append(_convolution(path, A, B, tensors))
    for module, found in wrapped.items():
        taken += found
        parts = _parameters(wanted, module)
        if len(parts) != len(found) or any(f"{path}#lora.{factor}" not in tensors for path in found for factor in "AB"):
            faults.append(f"shape       {module}: the config names {parts}, the file has {len(found)} of them")
            continue
        # The outermost wrapper has the shortest key and the last parameter.
        for part, path in zip(parts, sorted(found, key=len, reverse=True), strict=True):
            target = Target(module, "experts", (0, 0), part)
            r = LoRA(r=config.get("r", 8), ranks=config.get("rank_pattern") or {}).rank_of(target.key)
            targets += _experts(target, r, tensors, path, faults)
    return targets, taken, faults


def _convolution(path: str, A: Tensor, B: Tensor, tensors: dict[str, Tensor]) -> Target:
    groups, kernel = max(1, A.shape[0] // max(1, B.shape[1])), A.shape[2:]
    A, B = A.flatten(1), B.flatten(1)
    shape = (B.shape[0] // groups, A.shape[1])
    if groups > 1:
        A, B = A.unflatten(0, (groups, -1)), B.unflatten(0, (groups, -1))
    tensors[f"{path}#lora.A"], tensors[f"{path}#lora.B"] = A, B
    return Target(path, "conv", shape, sizes=(groups, *kernel))


def _experts(target: Target, r: int, tensors: dict[str, Tensor], path: str, faults: list[str]) -> list[Target]:
    A, B = tensors.pop(f"{path}#lora.A"), tensors.pop(f"{path}#lora.B")
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % r:
        shapes = f"lora_A is {tuple(A.shape)} and lora_B is {tuple(B.shape)}"
        faults.append(f"shape       {target}: {shapes}, which is no rank {r} of each expert")
        return []
    tensors[f"{target.path}#{target.part}.A"] = A.unflatten(0, (-1, r))
    tensors[f"{target.path}#{target.part}.B"] = B.unflatten(1, (r, -1)).permute(2, 0, 1).contiguous()
    return [Target(target.path, "experts", (B.shape[0], A.shape[1]), target.part, sizes=(A.shape[0] // r,))]


def _parameters(wanted: Sequence[str], module: str) -> list[str]:
    """The parameters of a module that `target_parameters` names, in the order in which they act."""
    keys = {part: f"{module}.{part}" for part in EXPERT_MATRICES}
    return [part for part, key in keys.items() if any(key == name or key.endswith(f".{name}") for name in wanted)]


def _is_module(wanted: Any, path: str) -> bool:
    """Whether `target_modules` names a layer."""
    if isinstance(wanted, str):
        return fits(wanted, path)
    return any(path == name or path.endswith(f".{name}") for name in wanted or ())


def _place(target: Target) -> int:
    return EXPERT_MATRICES.index(target.part) if target.part in EXPERT_MATRICES else 0
