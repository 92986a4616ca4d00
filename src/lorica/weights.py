"""How a weight is kept, and how a patch reads and writes it: one entry of `STORAGES` per kind of layer.

Every entry shows its weight as a matrix ``W [out, in]`` with ``y = x W^T``, whatever the layer stores:

| storage   | layer                | stored as    | input of the layer          |
|-----------|----------------------|--------------|-----------------------------|
| linear    | `nn.Linear`          | `[out, in]`  | vectors `[..., in]`         |
| conv1d    | transformers' Conv1D | `[in, out]`  | vectors `[..., in]`         |
| embedding | `nn.Embedding`       | `[in, out]`  | ids, read as one-hot `[in]` |

Methods know no storages and storages know no methods, so a new kind of layer is a new entry here and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Storage:
    """One way of keeping a weight.

    `stored` maps between the matrix `[out, in]` and the layout of `layer.weight`; it is its own inverse (a transpose
    or nothing). `down` is how the layer's input meets ``A [r, in]``, giving ``[..., r]``; `up` is how that meets
    ``B [out, r]``, giving what is added to the layer's output.
    """

    name: str
    stored: Callable[[Tensor], Tensor]
    down: Callable[[nn.Module, Tensor, Tensor], Tensor]
    up: Callable[[nn.Module, Tensor, Tensor], Tensor]
    takes_ids: bool = False

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """``(out, in)`` of the layer's matrix."""
        out_features, in_features = self.stored(layer.get_parameter("weight")).shape
        return out_features, in_features

    def read(self, layer: nn.Module) -> Tensor:
        """The layer's matrix ``W [out, in]`` in fp32; it may share memory with the layer and is not to be written."""
        return self.stored(layer.get_parameter("weight").detach()).float()

    def as_stored(self, layer: nn.Module, W: Tensor) -> Tensor:
        """``W [out, in]`` rounded once to the layer's dtype and laid out as the layer keeps it."""
        return self.stored(W).to(layer.get_parameter("weight").dtype).contiguous()


def _same(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.T


def _vector_down(layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    return F.linear(x.to(A.dtype), A)


def _vector_up(layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    return F.linear(h, B)


def _ids_down(layer: nn.Module, ids: Tensor, A: Tensor) -> Tensor:
    return F.embedding(ids, A.T, getattr(layer, "padding_idx", None))


def _embedding_up(layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    # Gemma's embedding multiplies what it looked up; the added rows belong to the same matrix.
    return (h @ B.T) * getattr(layer, "embed_scale", 1.0)


STORAGES: dict[type[nn.Module], Storage] = {
    nn.Linear: Storage("linear", _same, _vector_down, _vector_up),
    Conv1D: Storage("conv1d", _transposed, _vector_down, _vector_up),
    nn.Embedding: Storage("embedding", _transposed, _ids_down, _embedding_up, takes_ids=True),
}


def storage(layer: nn.Module) -> Storage | None:
    """The entry for a layer, found along its classes so that a subclass may have its own; None if it has none.

    A layer whose weight is not a floating-point matrix (packed 4-bit, int8) is not what its class says, and has none.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    return next((STORAGES[cls] for cls in type(layer).__mro__ if cls in STORAGES), None)


def fingerprint(parameters: Iterable[tuple[str, Tensor]], samples: int = 4096) -> str:
    """Hex sha256 that names a set of weights: of each tensor's name, shape and up to `samples` evenly spaced values.

    Values are hashed as bf16, so the same checkpoint has one fingerprint whether it was loaded as bf16 or fp32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // samples))
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
