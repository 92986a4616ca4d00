"""The native layout of what PEFT has no type for: the same two files under a type of our own, which PEFT refuses.

    adapter_config.json        {"peft_type": "LORICA_ADAPTER_H", "method": "adapter-h", "settings": {...}, ...}
    adapter_model.safetensors  tensors by canonical name (see `patch.trainable`)

Reading is strict: every key, setting or tensor that is not understood is a fault, all of them in one error.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from lorica import doors, methods, tensorfiles
from lorica.errors import LoricaError, all_faults
from lorica.formats import Contents, meta_of, pair
from lorica.targets import Target

_MARK = "LORICA_"
_KEYS = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "method", "settings", "targets"}


def is_ours(folder: Path) -> bool:
    """Whether a folder's config is marked as one of these."""
    try:
        return str(pair.load_config(folder).get("peft_type", "")).startswith(_MARK)
    except LoricaError:
        return False


def write(folder: Path, contents: Contents, dtype: str = "fp32") -> None:
    """Write both files (see `pair.write`)."""
    config = {
        "peft_type": methods.of(contents.method).peft_type,
        "task_type": contents.meta.get("task_type") or None,
        "base_model_name_or_path": contents.meta.get("base_model") or None,
        "inference_mode": True,
        "method": contents.method.name,
        "settings": dataclasses.asdict(contents.method),
    }
    if contents.targets:
        config["targets"] = [dataclasses.asdict(target) for target in contents.targets]
    pair.write(folder, config, contents.tensors, dict(contents.meta), dtype)


def read(folder: Path) -> Contents:
    """Read both files strictly."""
    config = pair.load_config(folder)
    raw, metadata = pair.load_tensors(folder)
    faults = [f"unexpected  {key}={config[key]!r} in {pair.CONFIG}" for key in sorted(set(config) - _KEYS)]
    if not raw:
        faults.append(f"missing     every tensor in {pair.TENSORS}")
    meta = meta_of(doors.object_in(metadata.get("lorica", "{}"), f"the metadata of {folder / pair.TENSORS}"), folder)
    tensors = tensorfiles.floats(raw, faults)
    method = None
    targets: tuple[Target, ...] = ()
    try:
        method = _method(config)
        targets = _targets(config, method)
    except LoricaError as fault:
        faults += [line.strip() for line in str(fault).splitlines()]
    if faults or method is None:
        raise all_faults(f"{folder} is not an adapter that can be used:", faults)
    meta.setdefault("base_model", config.get("base_model_name_or_path") or "")
    meta.setdefault("task_type", config.get("task_type") or "")
    return Contents(method, targets, tensors, meta)


def _method(config: dict[str, Any]) -> Any:
    """The method that a config describes; LoricaError with every fault of it."""
    entry, settings = methods.entry(str(config.get("method"))), config.get("settings")
    faults = []
    if config.get("peft_type") != entry.peft_type:
        faults.append(f"peft_type is {config.get('peft_type')!r}, of {entry.name} it is {entry.peft_type!r}")
    if not isinstance(settings, dict):
        raise all_faults(f"the settings of {entry.name} are {settings!r}:", [*faults, "they must be an object"])
    known = {field.name for field in dataclasses.fields(entry.kind)}
    faults += [f"unexpected  {name}={settings[name]!r}" for name in sorted(set(settings) - known)]
    faults += [f"missing     the setting {name}" for name in sorted(known - set(settings))]
    hints = typing.get_type_hints(entry.kind)
    faults += [
        f"unexpected  {name}={settings[name]!r}, which must be {getattr(hints[name], '__name__', hints[name])}"
        for name in sorted(known & set(settings))
        if isinstance(hints[name], type | UnionType)
        and not isinstance(settings[name], int | float if hints[name] is float else hints[name])
    ]
    if faults:
        raise all_faults(f"the settings of {entry.name} are not understood:", faults)
    return entry.kind(**settings)


def _targets(config: dict[str, Any], method: Any) -> tuple[Target, ...]:
    """The matrices that a config lists, of a method that takes targets."""
    listed, names = config.get("targets", []), {field.name for field in dataclasses.fields(Target)}
    if bool(listed) != method.takes_targets:
        raise LoricaError(f"{'missing' if method.takes_targets else 'unexpected'}  targets of {method.name}")
    if not isinstance(listed, list) or any(not isinstance(each, dict) or set(each) != names for each in listed):
        raise LoricaError(f"unexpected  targets: each must have {', '.join(sorted(names))} and nothing else")
    lists = {"shape", "rows", "sizes"}  # tuples, which JSON has not
    plain: list[dict[str, Any]] = [
        {key: tuple(value) if key in lists and value is not None else value for key, value in each.items()}
        for each in listed
    ]
    return tuple(Target(**each) for each in plain)
