"""lorica: LoRA and what it is compared with, exact first. The public names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Adapter": "lorica.adapter",
    "LoRA": "lorica.lowrank",
    "LowRank": "lorica.lowrank",
    "LoricaError": "lorica.errors",
    "TrainSettings": "lorica.train.settings",
    "active": "lorica.patch",
    "adapters": "lorica.patch",
    "count": "lorica.patch",
    "disabled": "lorica.patch",
    "eject": "lorica.patch",
    "fingerprint": "lorica.patch",
    "inject": "lorica.patch",
    "load": "lorica.models",
    "merge": "lorica.patch",
    "select": "lorica.patch",
    "trainable": "lorica.patch",
    "unmerge": "lorica.patch",
}
# `lorica.train` is a function here and a package on the disk; the package makes itself callable.
_MODULES = {"train"}
__all__ = sorted([*_HOME, *_MODULES, "__version__"])

if TYPE_CHECKING:
    from lorica.adapter import Adapter
    from lorica.errors import LoricaError
    from lorica.lowrank import LoRA, LowRank
    from lorica.models import load
    from lorica.patch import (
        active,
        adapters,
        count,
        disabled,
        eject,
        fingerprint,
        inject,
        merge,
        select,
        trainable,
        unmerge,
    )
    from lorica.train.settings import TrainSettings


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"lorica.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lorica' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
