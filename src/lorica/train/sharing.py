"""Which trainings can share the passes of one base, and why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn

from lorica import patch
from lorica.methods import METHODS
from lorica.targets import CHILD
from lorica.tasks import task_of
from lorica.train.settings import TrainSettings

# What all members have in common, because there is one base and one pass.
SHARED = ("dtype", "device", "quantize", "micro", "checkpointing", "label_smoothing")


def unusable(model: nn.Module, data: Any, members: Mapping[str, TrainSettings]) -> list[str]:
    """Everything that can be told before data or adapters are touched."""
    if not members:
        return ["there is none"]
    if Accelerator(mixed_precision="no", device_placement=False).num_processes > 1:
        return ["this is one of several processes, and members share one pass; start it as a single one"]
    if there := patch.adapters(model):
        return [f"the model has an adapter already ({', '.join(there)}); eject it first"]
    if (task := task_of(model).name) != "lm":
        return [f"they share passes of a language model, and this model is made for {task!r}: train one after another"]
    faults = []
    first = next(iter(members.values()))
    for name, settings in members.items():
        faults += [f"{name}: {fault}" for fault in settings.check()]
        if settings.method in METHODS and not METHODS[settings.method].shares:
            faults.append(f"{name}: method {settings.method} cannot share a pass; train its members one after another")
        faults += [
            f"{name}: {key} {getattr(settings, key)!r} changes the base itself, which the others use too"
            for key, off in (("bias", "none"), ("modules_to_save", ""), ("token_rows", ""), ("tied", False))
            if getattr(settings, key) != off
        ]
        faults += [
            f"{name}: {key} is {getattr(settings, key)!r}, of the first {getattr(first, key)!r}; all share one"
            for key in SHARED
            if getattr(settings, key) != getattr(first, key)
        ]
        if isinstance(data, Mapping) and name not in data:
            faults.append(f"{name}: there is no data for it")
    return faults


def own_dropout(model: nn.Module) -> str:
    """A note where the base drops out by itself: its random numbers depend on what else is in a pass."""
    for path, module in model.named_modules():
        own = getattr(module, "attention_dropout", 0.0) or (isinstance(module, nn.Dropout) and module.p)
        if f".{CHILD}." not in path and own:
            return f"the base has dropout of its own ({path}), which draws other numbers than for a member alone"
    return ""
