"""Peak memory of this process, as the operating system and the device count it, and giving back what is idle."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch


def peak_rss_bytes() -> int:
    """Largest resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what a larger parent process held before it started this one.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far where the model lives: the GPU's, or else this process's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def relieve() -> None:
    """Give the heap's idle pages back to the system, where they are more than it has left.

    glibc keeps what a pass frees and may find little of it fit for the next one (docs/LOG.md); to hand the pages back
    costs a few percent of a pass, so it is done only where they are wanted.
    """
    libc = _glibc()
    if libc and libc.mallinfo2().fordblks > psutil.virtual_memory().available:
        libc.malloc_trim(0)


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@functools.cache
def _glibc() -> Any:
    """The C library of this process, None where it is another one or an old one."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallinfo2") and hasattr(libc, "malloc_trim")):
        return None
    libc.mallinfo2.restype = _Heap
    return libc
