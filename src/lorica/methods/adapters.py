"""Adapter layers: two small matrices with a nonlinearity between them, on a residual connection (section 5.1).

    update(y) = up(act(down(y)))        down [r, d] with bias, up [d, r] with bias; up is zero at the start

| method    | where                                                            | parameters                  |
|-----------|------------------------------------------------------------------|-----------------------------|
| adapter-h | after the output projection of each attention, and of the MLP    | 2 L (2 d r + r + d)         |
| adapter-l | after each block, reading through a LayerNorm of its own         | L (2 d r + r + d) + 2 L d   |
| adapter-p | after each block's MLP, reading what the LayerNorm there gives   | L (2 d r + r + d)           |
| adapter-d | as adapter-p, in the upper blocks only                           | the same with fewer blocks  |

Houlsby et al. (arXiv 1902.00751) put theirs between a sublayer's projection and its residual connection. Here it acts
on the output of the projection itself, before the dropout that BERT and GPT-2 have there: a layer that every model has,
and without dropout the same function. Lin et al. (arXiv 2004.03829) stack theirs on a block. Pfeiffer et al. (arXiv
2005.00247) read ``n = LN(h + x)``, where the block ends in a norm, and give ``LN(h + x + update(n))``; where a block
ends in the residual connection, it is ``h + x + update(h + x)``. Rücklé et al. (arXiv 2010.11918) drop the lower ones.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica.errors import all_faults
from lorica.methods import places
from lorica.targets import Target

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
# Rücklé et al. drop the lowest 5 of 12.
KEPT = 7 / 12


class Bottleneck(nn.Module):
    """``y + update(y)`` of what a layer or a module gives, ``[..., d]``; of a tuple, of its first.

    Args:
        d: width.
        r: of the bottleneck.
        activation: a key of `ACTIVATIONS`.
        norm: read through a LayerNorm of its own.

    Its matrices are fp32 whatever the base is kept in, as LoRA's.
    """

    by_token: ClassVar[bool] = True  # it asks for the layer's output once, and changes each token of it by itself

    def __init__(self, d: int, r: int, activation: str, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, dtype=torch.float32) if norm else nn.Identity()
        self.down = nn.Linear(d, r, dtype=torch.float32)
        self.act = ACTIVATIONS[activation]()
        self.up = nn.Linear(r, d, dtype=torch.float32)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def update(self, y: Tensor) -> Tensor:
        """``up(act(down(y)))`` in fp32."""
        return self.up(self.act(self.down(self.norm(y.to(self.down.weight.dtype)))))

    def forward(self, layer: nn.Module, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the layer gives, and its update."""
        output = base(*args, **kwargs)
        if isinstance(output, tuple):
            return (self._added(output[0]), *output[1:])
        return self._added(output)

    def silent(self) -> bool:
        """Whether it still changes nothing."""
        return not (self.up.weight.any() or self.up.bias.any())

    def _added(self, y: Tensor) -> Tensor:
        return (y + self.update(y)).to(y.dtype)


class BeforeNorm(Bottleneck):
    """``LN(z + update(LN(z)))`` at the norm that ends a block, for ``z [..., d]``."""

    by_token: ClassVar[bool] = False

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], z: Tensor) -> Tensor:
        """The norm of what it is given and of the update of its own output."""
        return base((z + self.update(base(z))).to(z.dtype))


@dataclass(frozen=True)
class _Adapters(ABC):
    """What the four have in common.

    Attributes:
        bottleneck: r, the width between the two matrices.
        activation: a key of `ACTIVATIONS`.
    """

    bottleneck: int = 64
    activation: str = "relu"
    takes_targets: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "a nonlinearity is no part of a matrix"

    def __post_init__(self) -> None:
        faults = []
        if self.bottleneck < 1:
            faults.append(f"bottleneck is {self.bottleneck!r}, which must be a whole number from 1 up")
        if self.activation not in ACTIVATIONS:
            faults.append(f"activation is {self.activation!r}, which must be one of {', '.join(ACTIVATIONS)}")
        if faults:
            raise all_faults("these settings of an adapter cannot be used:", faults)

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Iterator[tuple[str, str, nn.Module]]:
        """An adapter layer at each place of each block; LoricaError with every block that lacks one."""
        blocks = [block for stack in places.stacks(model) for block in places.inside(model, self._kept(stack))]
        found = [place for block in blocks for place in self._places(block)]
        places.usable(model, [path for path, _ in found])
        for path, make in found:
            yield path, "adapter", make(places.width(model, path), self.bottleneck, self.activation)

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> Sequence[str]:
        """None."""
        return ()

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """The places whose `up` is still all zero."""
        moved = {key.split("#")[0] for key, tensor in tensors.items() if "#adapter.up." in key and tensor.any()}
        return [path for path in dict.fromkeys(key.split("#")[0] for key in tensors) if path not in moved]

    def _kept(self, stack: Sequence[str]) -> Sequence[str]:
        return stack

    @abstractmethod
    def _places(self, block: places.Block) -> list[tuple[str, Callable[..., Bottleneck]]]:
        """Where in a block, and which patch."""


class AdapterH(_Adapters):
    """Houlsby et al.: after attention and after the MLP, before their residual connections; "Adapter^H"."""

    name: ClassVar[str] = "adapter-h"

    def _places(self, block: places.Block) -> list[tuple[str, Callable[..., Bottleneck]]]:
        if faults := [what for what, there in (("attention", block.attention), ("MLP", block.mlp)) if not there]:
            raise all_faults(f"an adapter layer has no place in {block.path}, which lacks:", faults)
        return [(path, Bottleneck) for path in (*block.attention, block.mlp)]


class AdapterL(_Adapters):
    """Lin et al.: after each block, through a LayerNorm of its own; "Adapter^L"."""

    name: ClassVar[str] = "adapter-l"

    def _places(self, block: places.Block) -> list[tuple[str, Callable[..., Bottleneck]]]:
        return [(block.path, functools.partial(Bottleneck, norm=True))]


class AdapterP(_Adapters):
    """Pfeiffer et al.: after each block's MLP and the LayerNorm there; "Adapter^P"."""

    name: ClassVar[str] = "adapter-p"

    def _places(self, block: places.Block) -> list[tuple[str, Callable[..., Bottleneck]]]:
        return [(block.norm, BeforeNorm) if block.norm else (block.path, Bottleneck)]


@dataclass(frozen=True)
class AdapterD(AdapterP):
    """Rücklé et al., AdapterDrop: adapter-p without the lower blocks, in training and after; "Adapter^D".

    Attributes:
        blocks: how many of the upper ones have an adapter layer, of each stack. Default: 7 of 12.
    """

    blocks: int | None = None
    name: ClassVar[str] = "adapter-d"

    def _kept(self, stack: Sequence[str]) -> Sequence[str]:
        return places.last(stack, self.blocks or max(1, round(KEPT * len(stack))))
