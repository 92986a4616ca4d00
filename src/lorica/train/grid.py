"""`r=1,2,4,8 lr=1e-4,3e-4` -> the settings of every combination, each under a name of its own."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorica.errors import all_faults, nearest
from lorica.train.settings import TrainSettings

FIELDS = (
    "rank", "alpha", "dropout", "targets", "scaling", "init", "lr", "lr_ratio", "epochs", "steps", "batch", "schedule",
    "warmup", "clip", "weight_decay", "betas", "seed", "dora", "bottleneck", "activation", "blocks",
)  # fmt: skip
ALIASES = {
    "r": "rank",
    "learning_rate": "lr",
    "batch_size": "batch",
    "lora_alpha": "alpha",
    "target_modules": "targets",
}
MOST = 256


def members(settings: TrainSettings, values: Mapping[str, Sequence[Any]]) -> dict[str, TrainSettings]:
    """Every combination of the values, the last setting changing fastest, as changes of `settings`.

    LoricaError with every setting that cannot be swept and every combination that cannot be used.
    """
    faults = [fault for key in values if (fault := refused(key))]
    if not faults and (count := _product(values)) > MOST:
        faults.append(f"these are {count:,} combinations; at most {MOST} are trained together")
    if faults:
        raise all_faults("this sweep cannot be made:", faults)
    found: dict[str, TrainSettings] = {}
    for each in itertools.product(*(dict.fromkeys(row) for row in values.values())):
        changes = dict(zip(values, each, strict=True))
        if "steps" in changes:
            changes["epochs"] = None
        elif "epochs" in changes:
            changes["steps"] = None
        name = name_of(dict(zip(values, each, strict=True)))
        # Values that only differ in signs a name cannot have are told apart by a number.
        name = f"{name}-{len(found)}" if name in found else name
        found[name] = dataclasses.replace(settings, **changes)
    if faults := [f"{name}: {fault}" for name, each in found.items() for fault in each.check()]:
        raise all_faults("this sweep cannot be made:", faults)
    return found


def refused(key: str) -> str:
    """Why a setting cannot differ among members; empty if it can."""
    if key in FIELDS:
        return ""
    if key in {field.name for field in dataclasses.fields(TrainSettings)}:
        return f"{key} is the same for all members: give it as --{key.replace('_', '-')}"
    return f"there is no setting {key!r}{nearest(key, [*FIELDS, *ALIASES])}; these can differ: {', '.join(FIELDS)}"


def name_of(values: Mapping[str, Any]) -> str:
    """A member's name from its settings: ``rank4-lr3e-4``."""
    parts = []
    for key, value in values.items():
        text = f"{value:g}" if isinstance(value, int | float) else str(value)
        if isinstance(value, float) and 0 < abs(value) < 0.01:
            mantissa, _, exponent = f"{value:e}".partition("e")
            text = f"{float(mantissa):g}e{int(exponent)}"
        parts.append(key + re.sub(r"[^\w-]+", "_", text).strip("_"))
    return "-".join(parts)


def _product(values: Mapping[str, Sequence[Any]]) -> int:
    count = 1
    for row in values.values():
        count *= len(row)
    return count
