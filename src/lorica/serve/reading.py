"""An adapter as the layers of a base take it, or every reason why it cannot be mixed with others there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorica import methods
from lorica.adapter import Adapter
from lorica.errors import LoricaError, all_faults
from lorica.serve.stack import Rows, Up
from lorica.serve.staging import onto

if TYPE_CHECKING:
    from lorica.serve.rows import Layers


def rows(layers: Layers, adapter: Adapter) -> Rows:
    """See `Layers.rows`."""
    if reason := methods.alone(adapter.method):
        raise LoricaError(f"{reason}; generate and chat take it by itself")
    tensors = dict(adapter.tensors)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    gains: dict[int, Tensor] = {}
    faults = []
    for target in adapter.targets:
        layer, part = layers.by_path.get(target.path), target.part or "lora"
        A, B, m = (tensors.pop(f"{target.path}#{part}.{name}", None) for name in "ABm")
        if layer is None or A is None or B is None:
            faults.append(f"{target}: no linear layer of this model, so it is served merged only")
            continue
        if layer.index not in layers.whole:
            faults.append(f"{target}: it does not see every token, as an expert, so it is served merged only")
            continue
        start, stop = target.rows or (0, layer.out)
        if A.shape[-1] != layer.into or B.shape[0] != stop - start or stop > layer.out:
            faults.append(f"{target}: A {tuple(A.shape)}, B {tuple(B.shape)}; layer ({layer.out}, {layer.into})")
            continue
        scale = adapter.method.scale_of(target.key)
        whole = B.new_zeros(A.shape[0], layer.out)
        whole[:, start:stop] = B.T * scale
        if m is not None:
            with layers.lock:
                gains[layer.index] = gain = layer.gain(A, B, m, scale)
            whole *= gain
        found.setdefault(layer.index, []).append((A, whole))
    faults += [f"{key}: trained beside the low-rank updates, so it is served merged only" for key in tensors]
    if faults or not found:
        raise all_faults("this adapter cannot be mixed with others on this base:", faults or ["it has no targets"])
    return _made(layers, found, gains)


def _made(layers: Layers, found: dict[int, list[tuple[Tensor, Tensor]]], gains: dict[int, Tensor]) -> Rows:
    above: dict[int, list[Tensor]] = {}  # by group, the A of its layers so far
    ups: dict[int, Up] = {}
    for index in sorted(found):
        layer = layers.layers[index]
        like = next(layer.module.parameters())
        to: Any = {"device": like.device, "dtype": like.dtype if like.is_floating_point() else layers.model.dtype}
        A, B = (onto(torch.cat(each), **to) for each in zip(*found[index], strict=True))
        stack = above.setdefault(layer.group.index, [])
        lo = sum(each.shape[0] for each in stack)
        stack.append(A)
        ups[index] = Up(lo, lo + A.shape[0], B, onto(gains[index], **to) if index in gains else None)
    downs = {group: torch.cat(each).contiguous() for group, each in above.items()}
    kept = [*downs.values(), *(up.B for up in ups.values()), *(up.gain for up in ups.values())]
    shape = tuple((index, up.hi - up.lo, up.gain is not None) for index, up in ups.items())
    nbytes = sum(tensor.nbytes for tensor in kept if tensor is not None)
    return Rows(downs, ups, shape, max(r for _, r, _ in shape), nbytes)
