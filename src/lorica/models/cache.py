"""Folders that are made once: by the first process that needs one, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from lorica.errors import LoricaError
from lorica.files import folder_atomic


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(temporary)` if it is not there yet.

    Processes that come at the same time wait for the first one. A process that is killed leaves a temporary folder,
    which the next one removes; the lock goes with its holder.

    Raises:
        LoricaError: no room on the disk, or the cache cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir():
        return folder
    with explained(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                _sweep(folder)
                with folder_atomic(folder) as temporary:
                    make(temporary)
    return folder


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Turn what the disk can refuse into an error that says what to do."""
    remedy = "set LORICA_CACHE to a folder on another disk"
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            raise LoricaError(f"no space left on the disk of {place}: free some, or {remedy}") from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise LoricaError(f"{place} cannot be written to: change its permissions, or {remedy}") from error
        raise


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is the disk's; safetensors gives only the system's text for it."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and disk_is_full(cause)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left; the caller holds the lock, so nobody works there."""
    pattern = f".{glob.escape(folder.name)}.{'[a-z0-9_]' * 8}"  # the names that folder_atomic gives
    for leftover in folder.parent.glob(pattern):
        shutil.rmtree(leftover, ignore_errors=True)
