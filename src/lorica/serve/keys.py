"""Who may ask for what: a file of API keys.

[support]                       # the tenant: in logs, in fair turns, in limits
key = "sk-..."                  # or key_sha256, the hex digest of the key
models = ["support-*", "smollm2-135m"]
concurrency = 4                 # requests under way at once
rate = 120                      # requests a minute

[ops]
key_sha256 = "9f86d0..."
admin = true                    # may load, unload and rename adapters
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError, all_faults, nearest

_FIELDS = {"key", "key_sha256", "models", "admin", "concurrency", "rate"}
_SHORTEST = 16


@dataclass(frozen=True)
class Tenant:
    """Whoever holds one key.

    Attributes:
        models: globs of the names it may use, of adapters and of the base.
        admin: whether it may load, unload and rename adapters.
        concurrency: most requests under way at once (None: no limit of its own).
        rate: most requests a minute, in bursts of as many (None: no limit).
    """

    name: str
    models: tuple[str, ...] = ("*",)
    admin: bool = False
    concurrency: int | None = None
    rate: float | None = None

    def may_use(self, model: str) -> bool:
        """Whether it may ask for this name."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)


class Keys:
    """The tenants by the sha256 of their keys."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._tenants = dict(tenants)

    @classmethod
    def read(cls, path: str | Path) -> Keys:
        """Read a file of keys. LoricaError with every fault in it."""
        try:
            found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as fault:
            raise LoricaError(f"{path}: {fault.strerror}") from fault
        except ValueError as fault:
            raise LoricaError(f"{path}: not TOML: {fault}") from fault
        tenants: dict[str, Tenant] = {}
        faults: list[str] = []
        for name, values in found.items():
            wrong = _faults(values)
            if not wrong:
                digest = values.get("key_sha256", "").lower() or _digest(values["key"])
                if digest in tenants:
                    wrong = [f"the same key as [{tenants[digest].name}]"]
                tenants[digest] = Tenant(
                    name,
                    models=tuple(values.get("models", ("*",))),
                    **{key: values[key] for key in ("admin", "concurrency", "rate") if key in values},
                )
            faults += [f"[{name}] {fault}" for fault in wrong]
        if not found:
            faults.append('no tenant: write [name] and below it key = "..."')
        if faults:
            raise all_faults(f"{path}:", faults)
        return cls(tenants)

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, key: str) -> Tenant | None:
        """Whose key this is; every key is compared, and each comparison takes the same time."""
        presented = _digest(key)
        found = None
        for digest, tenant in self._tenants.items():
            if hmac.compare_digest(digest, presented):
                found = tenant
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _faults(values: Any) -> list[str]:
    """What is wrong with one tenant's table."""
    if not isinstance(values, dict):
        return ["must be a table"]
    faults = [f"unknown {key!r}{nearest(key, _FIELDS)}" for key in values if key not in _FIELDS]
    if ("key" in values) == ("key_sha256" in values):
        faults.append("needs one of key and key_sha256")
    elif "key" in values and not (isinstance(values["key"], str) and len(values["key"]) >= _SHORTEST):
        faults.append(f"key must be text of at least {_SHORTEST} characters")
    elif "key_sha256" in values and not re.fullmatch("[0-9a-fA-F]{64}", _text(values["key_sha256"])):
        faults.append("key_sha256 must be 64 hex digits")
    models = values.get("models", [])
    if not isinstance(models, list) or not all(isinstance(each, str) for each in models):
        faults.append("models must be a list of names or globs")
    if not isinstance(values.get("admin", False), bool):
        faults.append("admin must be true or false")
    for key, kinds in (("concurrency", (int,)), ("rate", (int, float))):
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:  # as no nan is
            faults.append(f"{key} must be a {'whole ' if key == 'concurrency' else ''}number above 0")
    return faults
