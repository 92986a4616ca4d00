"""What a piece of code allocates and multiplies, counted tensor by tensor; on the meta device it costs nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Account(TorchDispatchMode):
    """Keeps count of the bytes of all tensors made in a block and still alive, and of the operations on matrices.

    What was `there` before, such as a model's parameters, does not count, nor do views of anything.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self._held = {each.untyped_storage()._cdata for each in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args)
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._held:
                self._held.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.live -= size


_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


def _flops(func: Any, args: Sequence[Any]) -> float:
    """Operations of a matrix product, or of attention in one kernel: half a square each way, 2 products and then 5."""
    name = func._schema.name.removeprefix("aten::")
    if name in _PRODUCTS:
        a, b = [each for each in args if isinstance(each, torch.Tensor)][-2:]
        return 2.0 * a.numel() * b.shape[-1]
    if name.startswith("_scaled_dot_product") and name.endswith(("for_cpu", "for_cpu_backward")):
        q = args[1] if name.endswith("backward") else args[0]
        return (5 if name.endswith("backward") else 2) * q.numel() * q.shape[-2]
    return 0.0
