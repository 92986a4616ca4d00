"""How a weight is kept, and how a patch reads and writes it: one entry of `STORAGES` per kind of layer.

Every entry shows its weight as a matrix ``W [out, in]`` with ``y = x W^T``, whatever the layer stores:

| storage   | layer                | stored as    | input of the layer          |
|-----------|----------------------|--------------|-----------------------------|
| linear    | `nn.Linear`          | `[out, in]`  | vectors `[..., in]`         |
| conv1d    | transformers' Conv1D | `[in, out]`  | vectors `[..., in]`         |
| embedding | `nn.Embedding`       | `[in, out]`  | ids, read as one-hot `[in]` |
| nf4, fp4  | bnb's Linear4bit     | packed       | vectors `[..., in]`         |
| int8      | bnb's Linear8bitLt   | `[out, in]`  | vectors `[..., in]`         |

Methods know no storages and storages know no methods, so a new kind of layer is a new entry here and nothing else.
bitsandbytes (bnb) is an extra: its weights are told by the names of their classes, and it is imported when one is read.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.errors import LoricaError


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

    @property
    def packed(self) -> bool:
        """Whether the weight is kept in fewer than 16 bits, so that a merged one needs a layer of another class."""
        return self.name in PACKED

    def shape(self, layer: nn.Module) -> tuple[int, int]:
        """``(out, in)`` of the layer's matrix."""
        rows, columns = shape_of(layer.get_parameter("weight"))
        return (rows, columns) if self.stored is _same else (columns, rows)

    def read(self, layer: nn.Module) -> Tensor:
        """The layer's matrix ``W [out, in]`` in fp32; it may share memory with the layer and is not to be written."""
        with at_hand(layer):
            weight = layer.get_parameter("weight").detach()
            return self.stored(_dense(layer) if self.packed else weight.float())

    def as_stored(self, layer: nn.Module, W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``W [out, in]`` rounded once to `dtype` (default: the layer's) and laid out as the layer keeps it.

        For a packed weight it is laid out as in the layer that `plain` describes, and `dtype` is needed.
        """
        kind = STORAGES[plain(layer)["__class__"]] if self.packed else self
        return kind.stored(W).to(dtype or layer.get_parameter("weight").dtype).contiguous()


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


PACKED: dict[str, Storage] = {name: Storage(name, _same, _vector_down, _vector_up) for name in ("nf4", "fp4", "int8")}


def storage(layer: nn.Module) -> Storage | None:
    """The entry for a layer, found along its classes so that a subclass may have its own; None if it has none.

    A weight that is neither a floating-point matrix nor packed in a way that is known is not what its class says.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if type(weight).__module__.startswith("bitsandbytes."):
        return PACKED.get(format_of(weight)) if isinstance(layer, nn.Linear) else None
    if weight.ndim != 2 or not weight.is_floating_point():
        return None
    return next((STORAGES[cls] for cls in type(layer).__mro__ if cls in STORAGES), None)


def format_of(parameter: Tensor) -> str:
    """How a parameter is kept: `nf4`, `fp4`, `int8`, or its dtype's name."""
    if type(parameter).__name__ == "Params4bit" and getattr(parameter, "quant_state", None) is not None:
        return parameter.quant_state.quant_type  # type: ignore[attr-defined]
    return str(parameter.dtype).removeprefix("torch.")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of what a parameter stands for, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


PACKING = ("state", "quant_state")  # where bitsandbytes' layers keep what belongs to a packed weight


def plain(layer: nn.Module) -> dict[str, Any]:
    """What makes a packed layer one with a 16-bit weight: its `__class__`, and what that reads of the instance."""
    # transformers notes the class, because it turns GPT-2's Conv1D into bitsandbytes' linear layer too.
    if getattr(layer, "source_cls", nn.Linear) is not Conv1D:
        return {"__class__": nn.Linear}
    return {"__class__": Conv1D, "nf": layer.out_features, "nx": layer.in_features}


def unpacked(model: nn.Module) -> nn.Module | None:
    """A quantized model as it was before, read anew; None if where it came from is not known."""
    read = getattr(model, "_lorica_unpacked", None)
    return read()[0] if read else None


def lost(model: nn.Module, whole: nn.Module, path: str) -> Tensor:
    """What quantizing took away from a layer's matrix, ``W - Q [out, in]`` in fp32, where the layer computes."""
    layer, before = model.get_submodule(path), whole.get_submodule(path)
    ours, theirs = storage(layer), storage(before)
    assert ours is not None and theirs is not None, path
    return theirs.read(before).to(device(layer)) - ours.read(layer)


def device(layer: nn.Module) -> torch.device:
    """Where a layer computes. Weights that accelerate offloads are elsewhere between its calls."""
    weight = layer.get_parameter("weight")
    there = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device(there) if weight.is_meta and there is not None else weight.device


def offloaded(layer: nn.Module) -> bool:
    """Whether accelerate keeps the layer's weight elsewhere and brings it for each call."""
    return hasattr(layer, "_hf_hook") and any(each.is_meta for each in layer.parameters(recurse=False))


@contextlib.contextmanager
def at_hand(layer: nn.Module) -> Iterator[None]:
    """The layer's weights can be read inside, wherever accelerate keeps them."""
    if not offloaded(layer):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield


def keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU that has AVX512-BF16.

    There is no exact way back from that, it has no backward pass, and it fails on widths that are not multiples of its
    blocks. Raises for a model where it has happened.
    """
    repacked = []
    for path, layer in model.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                repacked.append(path)
    if repacked:
        raise LoricaError(
            f"bitsandbytes repacked {len(repacked)} 4-bit layers for inference on this CPU ({repacked[0]}, ...), and"
            " that loses digits and the gradient: load the model with lorica.load, or inject before it is run"
        )


def _dense(layer: Any) -> Tensor:
    """The floats that a packed weight stands for, ``[out, in]`` in fp32."""
    weight = layer.weight
    if format_of(weight) == "int8":
        return weight.detach().float().as_subclass(Tensor) * (_scale(layer, weight).float()[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # else the products of code and scale are rounded to what was packed once
    return dequantize_4bit(weight.data, state)


def _scale(layer: Any, weight: Any) -> Tensor:
    """The largest absolute value of each row of an int8 matrix ``[out]``; the first call moves it off the weight."""
    return weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB


def _kept(layer: nn.Module, parameter: Any) -> list[Tensor]:
    """The tensors that say what a parameter is: itself, and the scales of a packed one."""
    if not type(parameter).__module__.startswith("bitsandbytes.") or parameter.is_floating_point():
        return [parameter.detach()]
    if format_of(parameter) == "int8":
        return [parameter.data, _scale(layer, parameter)]
    state = parameter.quant_state
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [parameter.data.view(torch.uint8), state.absmax, *nested]


def nbytes(layer: nn.Module, parameter: Tensor) -> int:
    """Memory of a parameter, the scales of a packed one included."""
    return sum(tensor.nbytes for tensor in _kept(layer, parameter))


def fingerprint(parameters: Iterable[tuple[str, nn.Module, Tensor]], samples: int = 4096) -> str:
    """Hex sha256 that names a set of weights: of each tensor's name, shape and up to `samples` evenly spaced values.

    Values are hashed as bf16, so the same checkpoint has one fingerprint whether it was loaded as bf16 or fp32. Of a
    packed weight these are codes and scales, so that each packing of a checkpoint has its own.

    Args:
        parameters: name, the layer that owns it, and the parameter.
    """
    digest = hashlib.sha256()
    for name, layer, parameter in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name} {shape_of(parameter)}".encode())
        with at_hand(layer):
            here = getattr(layer, name.rpartition(".")[2]) if parameter.is_meta else parameter
            for tensor in _kept(layer, here):
                flat = tensor.reshape(-1)
                step = max(1, -(-flat.numel() // samples))
                digest.update(flat[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
