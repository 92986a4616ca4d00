"""From host memory to the device, on a stream of its own: no step waits for a load, and no load for a step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def loading(device: torch.device) -> Iterator[None]:
    """What the block does on a GPU goes beside what is decoded there, and is done when the block ends.

    Its tensors may be used on any stream then. They must be let go only when no step uses them any more: memory of
    this stream is given to the next load without asking the others. A lease ends after its request's last step.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def onto(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor on a device, to a GPU through pinned memory: from other memory a copy holds up all streams."""
    tensor = tensor.to(dtype)
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
