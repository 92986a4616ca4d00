"""Where adapters lie, and what may be read: names are checked, and nothing outside the folder of adapters is opened
unless the operator named it.

The layout is vLLM's resolver's: ``<root>/<name>/adapter_config.json`` and ``adapter_model.safetensors``.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import LoricaError
from lorica.files import sha256

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Looks = tuple[tuple[int, int, int], ...]
_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


@dataclass(frozen=True)
class Place:
    """A folder, or a hub id until it is fetched. What the operator named at the start is `trusted`."""

    path: Path | str
    trusted: bool


class Places:
    """The rules of one server.

    Args:
        root: the folder of adapters.
        hub: patterns of hub ids that may be downloaded.
        reserved: names that no adapter may have.
    """

    def __init__(self, root: Path | None, hub: Iterable[str], reserved: Iterable[str]) -> None:
        if root is not None and not root.is_dir():
            raise LoricaError(f"there is no folder of adapters {root}")
        self.root = root.resolve() if root else None
        self._hub, self._reserved = tuple(hub), frozenset(reserved)

    def check(self, name: str) -> None:
        """Raise for what cannot be a name."""
        if not _NAME.fullmatch(name) or ".." in name:
            raise LoricaError(f"an adapter cannot be called {name!r}: use letters, digits, . _ - and at most one /")
        if name in self._reserved:
            raise LoricaError(f"{name!r} is the base model's name, so no adapter can have it")

    def place(self, given: str | Path, trusted: bool) -> Place:
        """A folder or hub id as somebody wrote it."""
        try:
            path = Path(given).expanduser()
            there = path.is_dir()
        except (OSError, RuntimeError):  # no path at all: too long, or of a user who is not known
            there = False
        if there:
            if trusted or self._inside(path):
                return Place(path.resolve(), trusted)
            raise LoricaError(f"{given} is not inside the folder of adapters")
        if any(fnmatch.fnmatchcase(str(given), pattern) for pattern in self._hub) and ".." not in str(given):
            return Place(str(given), trusted)
        raise LoricaError(f"{given} is no adapter folder here, and no hub id that this server may fetch")

    def find(self, name: str) -> Place | None:
        """The adapter of this name in the root, if there is one that may be read."""
        if self.root is None or name in self._reserved or "/" in name or not _NAME.fullmatch(name):
            return None
        path = self.root / name
        return Place(path, False) if looks(path) and self._inside(path) else None

    def names(self) -> list[str]:
        """Names of whatever is in the root."""
        return sorted(os.listdir(self.root)) if self.root else []

    def fetch(self, place: Place) -> Path:
        """The folder of a place, downloaded where it is a hub id; raises where it is not a whole adapter."""
        if isinstance(place.path, str):
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(place.path, allow_patterns=[CONFIG, TENSORS]))
        if not looks(place.path) or not (place.trusted or self._inside(place.path)):
            raise LoricaError(f"{place.path} is not an adapter: it needs {CONFIG} and {TENSORS}, both inside it")
        return place.path

    def _inside(self, path: Path) -> bool:
        """Whether a folder and its two files, links followed, are inside the root."""
        if self.root is None:
            return False
        try:
            return all((path / part).resolve().is_relative_to(self.root) for part in ("", CONFIG, TENSORS))
        except (OSError, RuntimeError):  # a link that leads in circles
            return False


def looks(path: Path | str) -> Looks | None:
    """Inode, size and time of change of an adapter's two files; None where one is missing."""
    try:
        stats = [(Path(path) / name).stat() for name in (CONFIG, TENSORS)]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def digest(folder: Path) -> str:
    """sha256 in hex of an adapter's two files."""
    return hashlib.sha256("".join(sha256(folder / name) for name in (CONFIG, TENSORS)).encode()).hexdigest()
