"""Where a transformer's blocks, attention and MLP are: found by a pass of two tokens, not by the names of classes.

    blocks             the outermost lists of modules that hold attention; one for an encoder, one for a decoder
    attention outputs  the last linear layer that each attention of a block calls: what goes to the residual connection
    MLP output         the last one that the block calls outside attention; of a mixture, the module that adds its
                       experts up
    closing norm       the norm whose output is the block's own, where norms follow the residual connection (BERT)

Only attention is told by a word, "attn" or "attention", which the code of every model of transformers has in the name.
What cannot be found is refused with the reason.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorica import patch, weights
from lorica.errors import LoricaError, all_faults
from lorica.targets import CHILD, input_embedding, refusal

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


@dataclass
class Block:
    """Where things are in a block; `attention` and `mlp` are empty where it has none."""

    path: str
    attention: list[str] = field(default_factory=list)
    mlp: str = ""
    norm: str = ""


def stacks(model: nn.Module) -> list[list[str]]:
    """The paths of the blocks, first to last, of each stack; the decoder's is the last where there are two."""
    found: list[list[str]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for blocks in found for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside and any(_attends(block) for block in module):
            found.append([f"{path}.{place}" for place in range(len(module))])
    if not found:
        raise LoricaError(f"{type(model).__name__} has no blocks that are known: no list of modules with attention")
    return found


def last(blocks: Sequence[str], count: int) -> Sequence[str]:
    """The last `count` of some blocks."""
    if count > len(blocks):
        raise LoricaError(f"the last {count} blocks are asked for, but this model has {len(blocks)}")
    return blocks[len(blocks) - count :]


def inside(model: nn.Module, blocks: Sequence[str]) -> list[Block]:
    """What is where in each of some blocks, as a pass of two tokens shows."""
    watches = [_Watch(model, path) for path in blocks]
    try:
        _run(model)
    finally:
        for watch in watches:
            for hook in watch.hooks:
                hook.remove()
    if missed := [watch.path for watch in watches if watch.output is None]:
        raise all_faults("these blocks are not called by the model:", missed)
    return [watch.found(model) for watch in watches]


def usable(model: nn.Module, paths: Sequence[str]) -> Sequence[str]:
    """The paths, if a patch can be put on each."""
    if faults := [f"{path}: {reason}" for path in paths if (reason := refusal(model, path))]:
        raise all_faults("these layers cannot be patched:", faults)
    return paths


def width(model: nn.Module, path: str) -> int:
    """The size of the vectors that a layer gives; of a norm, those it takes; of any other module, the model's."""
    layer = model.get_submodule(path)
    kind, weight = weights.storage(layer), layer._parameters.get("weight")
    if kind is not None and not kind.inside:
        return kind.shape(layer)[0]
    if weight is not None:
        return len(weight)
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return getattr(config, "hidden_size", None) or config.d_model


class _Watch:
    """Notes what a block calls during a pass."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        self.called: list[str] = []
        self.norms: list[tuple[str, Tensor]] = []
        self.output: Tensor | None = None
        block = model.get_submodule(path)
        self.hooks = [block.register_forward_hook(lambda module, args, output: self._end(output))]
        for inner, module in block.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or f".{CHILD}." in f".{inner}.":
                continue
            if weight.ndim == 1:
                self.hooks.append(module.register_forward_hook(self._norm(inner)))
            elif (kind := weights.storage(module)) is not None and kind.name not in ("embedding", "conv"):
                self.hooks.append(module.register_forward_hook(self._linear(inner)))

    def found(self, model: nn.Module) -> Block:
        """The places of the block; the last call counts."""
        block = Block(self.path)
        attention: dict[str, str] = {}
        for inner in self.called:
            if owner := _owner(inner):
                attention[owner] = f"{self.path}.{inner}"
            else:
                block.mlp = f"{self.path}.{inner}"
        block.attention = list(attention.values())
        for inner, module in model.get_submodule(self.path).named_modules():
            kind = weights.storage(module)
            if (kind is not None and kind.inside) or inner.endswith("experts"):
                block.mlp = f"{self.path}.{inner.split('.')[0]}"
        block.norm = next((f"{self.path}.{inner}" for inner, output in self.norms if output is self.output), "")
        return block

    def _end(self, output: Any) -> None:
        self.output = output[0] if isinstance(output, tuple) else output

    def _norm(self, inner: str) -> Any:
        return lambda module, args, output: self.norms.append((inner, output))

    def _linear(self, inner: str) -> Any:
        return lambda module, args, output: self.called.append(inner)


def _owner(inner: str) -> str:
    """The attention that a layer of a block lies in, by path; empty outside attention."""
    names = inner.split(".")
    depth = next((place for place, name in enumerate(names) if _ATTENTION.search(name)), None)
    return "" if depth is None else ".".join(names[: depth + 1])


def _attends(block: nn.Module) -> bool:
    return any(_ATTENTION.search(path.rpartition(".")[2]) for path, _ in block.named_modules())


@torch.no_grad()
def _run(model: Any) -> None:
    """A pass of two tokens, which leaves the model's mode as it is."""
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding) or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise LoricaError(f"{type(model).__name__} reads no token ids, so it is not known what its blocks call")
    ids = torch.zeros(1, 2, dtype=torch.long, device=embedding.weight.device)
    both = getattr(model.config, "is_encoder_decoder", False)
    modes = {module: module.training for module in model.modules()}
    try:
        with patch.disabled(model) if patch.adapters(model) else contextlib.nullcontext():
            model.eval()(**({"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}))
    finally:
        for module, mode in modes.items():
            module.training = mode
