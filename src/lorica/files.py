"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """Where downloads are kept: `LORICA_CACHE`, else `$XDG_CACHE_HOME/lorica`, else `~/.cache/lorica`."""
    if given := os.environ.get("LORICA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorica"


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def file_atomic(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    A reader, or a crash at any moment, sees the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step (see `file_atomic`)."""
    with file_atomic(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well it takes the place of `path`, else it is removed.

    A folder cannot be replaced in one step, so an existing `path` is first renamed to `.<name>.old`; a reader that
    finds no `path` after a crash finds it there (see `recover`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        sync(temporary)
        old = path.parent / f".{path.name}.old"
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(path)
        raise


def folder_for(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Where files that are replaced one by one go: the folder that is there, or a new one that appears whole."""
    return contextlib.nullcontext(path) if path.is_dir() else folder_atomic(path)


def recover(path: Path) -> None:
    """Undo a replacement of `path` that stopped between its two renames."""
    path = Path(path)
    old = path.parent / f".{path.name}.old"
    if old.exists() and not path.exists():
        os.replace(old, path)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
