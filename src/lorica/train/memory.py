"""Peak memory of this process, as the operating system and the device count it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

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
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int:
    """Largest memory in use so far where the model lives: the GPU's, or else this process's."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()
