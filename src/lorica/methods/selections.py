"""Methods that train the model's own parameters: all of them, the last blocks, the biases (section 5.1).

Nothing is put beside a layer but where BitFit is to add biases. The parameters that are trained are copies which stand
in the places of the base's while the adapter is active (see `patch`), so that taking it off is exact; that costs the
memory of what is trained once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica.errors import all_faults
from lorica.methods import places
from lorica.patch import base_parameters
from lorica.targets import Target, resolve

Patched = Iterator[tuple[str, str, nn.Module]]


@dataclass(frozen=True)
class Full:
    """Full fine-tuning, "FT": every parameter."""

    name: ClassVar[str] = "full"
    takes_targets: ClassVar[bool] = False
    unmergeable: ClassVar[str] = ""

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Patched:
        """None."""
        return iter(())

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Every name."""
        return [name for name, _ in base_parameters(model)]

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """None: whether a parameter moved cannot be told without the base."""
        return []


@dataclass(frozen=True)
class Top:
    """ "FT-Top2" (Li and Liang, arXiv 2101.00190): the last blocks, 2 of them; neither embeddings nor head.

    Attributes:
        blocks: how many, of the decoder's where there is an encoder too.
    """

    blocks: int = 2
    name: ClassVar[str] = "top2"
    takes_targets: ClassVar[bool] = False
    unmergeable: ClassVar[str] = ""

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Patched:
        """None."""
        return iter(())

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Every name in the last blocks."""
        chosen = tuple(f"{path}." for path in places.last(places.stacks(model)[-1], self.blocks))
        return [name for name, _ in base_parameters(model) if name.startswith(chosen)]

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """None: whether a parameter moved cannot be told without the base."""
        return []


@dataclass(frozen=True)
class BitFit:
    """ "BitFit" (Zaken et al., arXiv 2106.10199): every bias.

    Attributes:
        add_biases: give each linear layer but the output head a bias of zero where it has none. Without it, a model
            that has no bias is refused.
    """

    add_biases: bool = False
    name: ClassVar[str] = "bitfit"
    takes_targets: ClassVar[bool] = False

    @property
    def unmergeable(self) -> str:
        """Added biases have no place in the model as it is."""
        return "layers without a bias have no place for an added one" if self.add_biases else ""

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Patched:
        """A bias of zero for each layer without, where they are to be added."""
        for target in resolve(model, "all-linear") if self.add_biases else ():
            if model.get_submodule(target.path)._parameters.get("bias") is None:
                yield target.path, "bias", AddedBias(target.shape[0])

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Every name of a bias."""
        found = [name for name, _ in base_parameters(model) if name.rpartition(".")[2] == "bias"]
        if not found and not self.add_biases:
            raise all_faults("bitfit trains the biases of a model:", ["this one has none: --add-biases adds zero ones"])
        return found

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """The layers whose added bias is still zero."""
        return [key.split("#")[0] for key, tensor in tensors.items() if "#" in key and not tensor.any()]


class AddedBias(nn.Module):
    """``y + b`` for a layer that has no bias: b ``[out]`` in fp32, zero at the start."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(out_features))

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """``base(x) + b``: ``[..., in]`` to ``[..., out]``."""
        y = base(x)
        return (y + self.b).to(y.dtype)

    def silent(self) -> bool:
        """Whether it still changes nothing."""
        return not self.b.any()
