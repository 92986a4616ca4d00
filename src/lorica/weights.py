"""How a weight is kept, and how a patch reads and writes it: one entry of `STORAGES` per kind of layer.

Every entry shows its weight as a matrix ``W [out, in]`` with ``y = x W^T``, whatever the layer stores:

| storage   | layer                | stored as                                 | input of the layer                  |
|-----------|----------------------|-------------------------------------------|-------------------------------------|
| linear    | `nn.Linear`          | `[out, in]`                               | vectors `[..., in]`                 |
| conv1d    | transformers' Conv1D | `[in, out]`                               | vectors `[..., in]`                 |
| embedding | `nn.Embedding`       | `[in, out]`                               | ids, read as one-hot `[in]`         |
| conv      | `nn.Conv1d/2d/3d`    | `[out, channels, k...]`                   | images, `in` is one patch of them   |
| experts   | a mixture's experts  | `[E, out, in]`, `[E, in, out]`            | vectors, and the expert of each     |
| nf4, fp4  | bnb's Linear4bit     | packed                                    | vectors `[..., in]`                 |
| int8      | bnb's Linear8bitLt   | `[out, in]`                               | vectors `[..., in]`                 |

Experts are E matrices in one parameter, and a layer has two of them; a part names which. Their factors are stacks too,
``A [E, r, in]`` and ``B [E, out, r]``, so that ``B A`` means what it says. So are those of a convolution in g groups:
``A [g, r/g, in]``, ``B [g, out/g, r/g]``, where each A reads all channels, as PEFT has it.

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
    ``B [out, r]``, giving what is added to the layer's output; for experts, see `kernels.experts`.
    """

    name: str
    stored: Callable[[Tensor], Tensor]
    down: Callable[[nn.Module, Tensor, Tensor], Tensor]
    up: Callable[[nn.Module, Tensor, Tensor], Tensor]
    takes_ids: bool = False
    inside: bool = False

    @property
    def packed(self) -> bool:
        """Whether the weight is kept in fewer than 16 bits, so that a merged one needs a layer of another class."""
        return self.name in PACKED

    def parameter(self, part: str | None = None) -> str:
        """The name of the layer's parameter that holds the matrix, or the matrix called `part`."""
        return part if self.inside and part else "weight"

    def parts(self, layer: nn.Module) -> list[str]:
        """The matrices of a layer that has several; of any other none."""
        return [name for name in EXPERT_MATRICES if layer._parameters.get(name) is not None] if self.inside else []

    def facts(self, layer: nn.Module, part: str | None = None) -> dict[str, Any]:
        """What a target says of its matrix: the name of the storage, ``(out, in)``, and its sizes.

        Sizes are ``(groups, k...)`` of a convolution, ``(E,)`` of experts. Each of E or of the groups is ``[out, in]``.
        """
        shape = shape_of(layer.get_parameter(self.parameter(part)))
        rows, columns = self.stored(torch.empty(shape, device="meta")).shape[-2:]
        if self.name != "conv":
            return {"storage": self.name, "shape": (rows, columns), "sizes": shape[:1] if self.inside else ()}
        groups: int = layer.groups  # type: ignore[assignment]
        return {"storage": self.name, "shape": (rows // groups, columns * groups), "sizes": (groups, *shape[2:])}

    def shape(self, layer: nn.Module, part: str | None = None) -> tuple[int, int]:
        """``(out, in)`` of the layer's matrix."""
        return self.facts(layer, part)["shape"]

    def read(self, layer: nn.Module, part: str | None = None) -> Tensor:
        """The layer's matrix ``W [out, in]`` in fp32; it may share memory with the layer and is not to be written."""
        with at_hand(layer):
            weight = layer.get_parameter(self.parameter(part)).detach()
            return self.stored(_dense(layer) if self.packed else weight.float())

    def as_stored(
        self, layer: nn.Module, W: Tensor, dtype: torch.dtype | None = None, part: str | None = None
    ) -> Tensor:
        """``W [out, in]`` rounded once to `dtype` (default: the layer's) and laid out as the layer keeps it.

        For a packed weight it is laid out as in the layer that `plain` describes, and `dtype` is needed.
        """
        if self.packed:
            return STORAGES[plain(layer)["__class__"]].stored(W).to(dtype).contiguous()
        weight = layer.get_parameter(self.parameter(part))
        return self.stored(W).to(dtype or weight.dtype).contiguous().view(weight.shape)

    def per_output(self, layer: Any, values: Tensor) -> Tensor:
        """One value per output ``[out]``, in the shape in which it meets the layer's output."""
        return values.reshape(-1, *(1 for _ in layer.kernel_size)) if self.name == "conv" else values


def _same(weight: Tensor) -> Tensor:
    return weight


def _transposed(weight: Tensor) -> Tensor:
    return weight.mT


def _patches(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _vector_down(layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    return F.linear(x.to(A.dtype), A)


def _vector_up(layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    return F.linear(h, B)


def _ids_down(layer: nn.Module, ids: Tensor, A: Tensor) -> Tensor:
    return F.embedding(ids, A.T, getattr(layer, "padding_idx", None))


def _embedding_up(layer: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    # Gemma's embedding multiplies what it looked up; the added rows belong to the same matrix.
    return (h @ B.T) * getattr(layer, "embed_scale", 1.0)


def _convolved_down(layer: Any, x: Tensor, A: Tensor) -> Tensor:
    """The layer's own kernel, stride, padding and dilation; of its groups only B knows."""
    if layer.padding_mode == "zeros":
        padding = layer.padding
    else:
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    kernels = A.reshape(-1, layer.in_channels, *layer.kernel_size)
    return _CONVOLVE[len(layer.kernel_size)](x.to(A.dtype), kernels, None, layer.stride, padding, layer.dilation)


def _convolved_up(layer: Any, h: Tensor, B: Tensor) -> Tensor:
    kernels = B.reshape(layer.out_channels, -1, *(1 for _ in layer.kernel_size))
    return _CONVOLVE[len(layer.kernel_size)](h, kernels, groups=layer.groups)


def _inside(layer: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
    raise LoricaError(
        f"the matrices of {type(layer).__name__} multiply inside it, each for the tokens that are sent to it: only a"
        " method that gives LoRA's A and B can adapt them"
    )


_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV = Storage("conv", _patches, _convolved_down, _convolved_up)
STORAGES: dict[type[nn.Module], Storage] = {
    nn.Linear: Storage("linear", _same, _vector_down, _vector_up),
    Conv1D: Storage("conv1d", _transposed, _vector_down, _vector_up),
    nn.Embedding: Storage("embedding", _transposed, _ids_down, _embedding_up, takes_ids=True),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
}
# How transformers names the parameters of a module that holds all experts of a layer, in the order in which they act.
EXPERT_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
EXPERTS: dict[bool, Storage] = {  # by whether a matrix is kept as [in, out]
    False: Storage("experts", _same, _inside, _inside, inside=True),
    True: Storage("experts", _transposed, _inside, _inside, inside=True),
}

PACKED: dict[str, Storage] = {name: Storage(name, _same, _vector_down, _vector_up) for name in ("nf4", "fp4", "int8")}


def storage(layer: Any) -> Storage | None:
    """The entry for a layer, found along its classes so that a subclass may have its own; None if it has none.

    A weight that is neither a floating-point matrix nor packed in a way that is known is not what its class says.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        return EXPERTS[getattr(layer, "is_transposed", False)] if _holds_experts(layer) else None
    if type(weight).__module__.startswith("bitsandbytes."):
        return PACKED.get(format_of(weight)) if isinstance(layer, nn.Linear) else None
    found = next((STORAGES[cls] for cls in type(layer).__mro__ if cls in STORAGES), None)
    usable = weight.is_floating_point() and weight.ndim == (len(layer.kernel_size) + 2 if found is _CONV else 2)
    return found if usable else None


def storage_of(layer: Any) -> Storage:
    """The entry for a layer that is known to have one."""
    found = storage(layer)
    assert found is not None, type(layer)
    return found


def _holds_experts(layer: nn.Module) -> bool:
    found = [layer._parameters.get(name) for name in EXPERT_MATRICES]
    stacks = [each for each in found if each is not None]
    known = (torch.float32, torch.bfloat16, torch.float16)
    return bool(stacks) and all(each.ndim == 3 and each.dtype in known for each in stacks)


# What transformers says of a module whose experts it lets an implementation multiply.
_SAID = ("config", "num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


def refusal(layer: nn.Module) -> str | None:
    """Why no patch can reach a layer's weight although it is kept in a way that is known; None if one can."""
    kind, name = storage(layer), type(layer).__name__
    if kind is not None and kind.inside and not all(hasattr(layer, said) for said in _SAID):
        return f"{name} does not go through transformers' experts interface; a patch of its experts would do nothing"
    if kind is _CONV:
        forward = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls) and issubclass(cls, nn.Module))
        if forward not in STORAGES:
            return f"{name} does more than convolve, and what its weight is multiplied with is not known"
    return None


def factor_shapes(facts: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B at rank r for a matrix, or a stack of them, with these facts (or a target, as well)."""
    rows, columns = facts.shape
    groups = facts.sizes[0] if facts.storage == "conv" else 1
    stack = facts.sizes[:1] if facts.storage == "experts" or groups > 1 else ()
    return (*stack, r // groups, columns), (*stack, rows, r // groups)


def unfit(target: Any, r: int, dropout: float) -> str | None:
    """Why a low-rank update of this rank and dropout cannot be put at a target; None if it can."""
    if target.storage == "experts" and dropout:
        return "dropout on the input of experts is refused (as in PEFT, where it cannot be had): use dropout=0"
    if target.storage == "conv" and r % target.sizes[0]:
        return f"the rank is {r}, which must be a multiple of its {target.sizes[0]} groups"
    return None


def unmergeable(layer: nn.Module) -> str | None:
    """Why no update can be folded into a layer's weight; None if one can."""
    if storage(layer) is _CONV and layer.groups != 1:  # type: ignore[comparison-overlap]
        return (
            f"it is a convolution in {layer.groups} groups, and its update reads all channels, as PEFT's does: that"
            " is no weight that the layer could hold"
        )
    return None


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
    """Where a layer, or a module of layers, computes. What accelerate offloads is elsewhere between its calls."""
    weight = next(layer.parameters())
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
