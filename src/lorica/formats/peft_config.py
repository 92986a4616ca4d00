"""What the values of an `adapter_config.json` must be, before any is used. PEFT itself checks few of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorica.doors import faults_of, is_count, is_number, is_words
from lorica.errors import LoricaError, shown
from lorica.lowrank import BIASES
from lorica.patterns import check, exactly

_EXPRESSIONS = 100


def kind_faults(config: Mapping[str, Any]) -> list[str]:
    """Every setting that is not of its kind, and every pattern that is none."""
    faults = faults_of(config, _KINDS)
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key)
        faults += _pattern_faults(key, value if isinstance(value, dict) else ())
    if isinstance(config.get("target_modules"), str):
        faults += _pattern_faults("target_modules", [config["target_modules"]])
    return faults


def sort_rows(config: dict[str, Any], tensors: dict[str, Tensor], faults: list[str]) -> list[int]:
    """Put token rows in the order of their ids, in place, which PEFT keeps in that of its config; returns the ids."""
    named = config.get("trainable_token_indices") or []
    lists = named if isinstance(named, dict) else {"": named}
    for key in [key for key in tensors if key.endswith("#tokens.rows")]:
        path = key.removesuffix("#tokens.rows")
        ids = next((ids for name, ids in lists.items() if not name or f".{path}".endswith(f".{name}")), [])
        if len(set(ids)) != len(tensors[key]) or len(ids) != len(tensors[key]):
            faults.append(f"shape       {path}: {len(tensors[key])} token rows, the config names {len(set(ids))}")
        else:
            tensors[key] = tensors[key][sorted(range(len(ids)), key=ids.__getitem__)]
    if len({frozenset(ids) for ids in lists.values()}) > 1:
        faults.append("trainable_token_indices names other rows for one layer than for another")
    return sorted({each for ids in lists.values() for each in ids})


def slice_faults(tensors: Mapping[str, Tensor], storages: dict[str, str], slices: Any) -> list[str]:
    """What is wrong with the slices of the layers: they must be rows of them, apart from one another."""
    if not isinstance(slices, dict):
        return [f"slices      {shown(slices)} are no ranges of rows by layer"]
    return [
        fault
        for path, parts in slices.items()
        if path in storages and (B := tensors.get(f"{path}#lora.B")) is not None
        for fault in _slices(path, parts, B.shape[0])
    ]


def _slices(path: str, parts: Any, rows: int) -> list[str]:
    """What is wrong with the slices ``{part: [start, stop]}`` of a layer with so many output rows."""
    named = isinstance(parts, dict) and all(re.fullmatch(r"\w+", part) for part in parts)
    if not named or not all(_is_range(each, rows) for each in parts.values()):
        return [f"slices      {path}: {shown(parts)} are no ranges of its {rows:,} rows"]
    ordered = sorted(parts.values())
    if any(one[1] > other[0] for one, other in itertools.pairwise(ordered)):
        return [f"slices      {path}: {shown(parts)} overlap"]
    return []


def _is_range(value: Any, rows: int) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value)) and value[0] < value[1] <= rows


def _pattern_faults(key: str, patterns: Any) -> list[str]:
    faults = []
    if (signs := sum(exactly(pattern) != pattern for pattern in patterns)) > _EXPRESSIONS:
        return [f"{key} has {signs:,} regular expressions; at most {_EXPRESSIONS} are taken, and names without number"]
    for pattern in patterns:
        try:
            check(pattern)
        except LoricaError as fault:
            faults.append(f"{key}: {fault}")
    return faults


def _or_none(good: Any) -> Any:
    return lambda value: value is None or good(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return is_count(value, 1)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_count, value)) and len(set(value)) == len(value)


def _by_name(good: Any) -> Any:
    return lambda value: isinstance(value, dict) and all(map(good, value.values()))


_KINDS: dict[str, tuple[Any, str]] = {
    "r": (_is_rank, "a whole number from 1 up"),
    "lora_alpha": (is_number, "a finite number"),
    "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "at least 0 and below 1"),
    "bias": (lambda value: value in BIASES, f"one of {', '.join(BIASES)}"),
    "rank_pattern": (_or_none(_by_name(_is_rank)), "whole numbers from 1 up by pattern"),
    "alpha_pattern": (_or_none(_by_name(is_number)), "finite numbers by pattern"),
    "target_modules": (_or_none(lambda value: _is_text(value) or is_words(value)), "a list of names, or a pattern"),
    "target_parameters": (_or_none(is_words), "a list of names"),
    "modules_to_save": (_or_none(is_words), "a list of names"),
    "trainable_token_indices": (
        _or_none(lambda value: value in ([], {}) or _are_ids(value) or _by_name(_are_ids)(value)),
        "a list of different token ids, or such lists by name",
    ),
    **{
        key: (_or_none(_is_flag), "true or false")
        for key in ("use_rslora", "use_dora", "fan_in_fan_out", "ensure_weight_tying")
    },
    **{key: (_or_none(_is_text), "text") for key in ("base_model_name_or_path", "task_type", "peft_type")},
}  # fmt: skip
