"""Prefix-embedding and prefix-layer tuning (section 5.1): special tokens in the stream, with learned rows.

    prompt      ->  p_1 .. p_lp  prompt  i_1 .. i_li  completion

The special tokens have the ids from the vocabulary's size on, and no weight of the base knows them: a patch looks up
their rows where the embedding is asked for them (`Rows`), and `lorica.insertion` is where they come into prompts and
examples. They are never predicted, so logits do not grow.

    prefix-embedding   d (lp + li)      the embeddings of the special tokens are learned
    prefix-layer       L d (lp + li)    so are their activations: what every one of the L blocks reads at their places

In prefix-layer the activations after a block are replaced for every block but the last. What the last one makes of them
no block reads; and replaced, the last infix token, from which the first token of the completion is predicted, would
say the same for every prompt. With the embeddings these are L sets of rows, as section 5.1 counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorica import patch
from lorica.errors import LoricaError
from lorica.lowrank import LoRA
from lorica.methods.places import stacks
from lorica.targets import Target, input_embedding

Patched = Iterator[tuple[str, str, nn.Module]]


class Places:
    """Where the special tokens are in the pass that runs: `index`, of the shape of the ids, is their row, or -1.

    None between passes, and in one that is given embeddings instead of ids.
    """

    index: Tensor | None = None


class _Overwrite(torch.autograd.Function):
    """``hidden [..., d]`` with ``rows [n, d]`` at the special tokens' places."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, places: Places, ends: bool) -> Tensor:
        assert places.index is not None
        ctx.places, ctx.index, ctx.ends, ctx.n = places, places.index, ends, len(rows)
        index = places.index.to(hidden.device)
        return torch.where((index >= 0)[..., None], rows.to(hidden.dtype)[index.clamp_min(0)], hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        # A checkpointed block runs again after this, the last of its operations; it is to see the places of its own
        # pass, whatever ran since. The step of the embedding `ends` the backward pass.
        ctx.places.index = None if ctx.ends else ctx.index
        index = ctx.index.to(grad.device)
        kept = grad.masked_fill((index >= 0)[..., None], 0) if ctx.needs_input_grad[0] else None
        # A product instead of a scattered sum, whose order is not the same at every run on a GPU.
        hot = index.flatten() == torch.arange(ctx.n, device=grad.device)[:, None]
        return kept, hot.float() @ grad.flatten(0, -2).float(), None, None


class Rows(nn.Module):
    """The embeddings of the special tokens, ``rows [n, d]`` in fp32: a patch of the input embedding."""

    def __init__(self, rows: Tensor, places: Places) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.places = places

    def forward(self, layer: Any, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Ids ``[...]`` to ``[..., d]``; those from `layer.num_embeddings` on are the special tokens."""
        special = x >= layer.num_embeddings
        self.places.index = torch.where(special, x - layer.num_embeddings, -1)
        y = base(x.masked_fill(special, 0))
        return _Overwrite.apply(y, self.rows * getattr(layer, "embed_scale", 1.0), self.places, True)


class LayerRows(nn.Module):
    """The activations of the special tokens after a block, ``rows [n, d]`` in fp32: a patch of the block.

    `last`: no block after it is patched, so the places are done with.
    """

    def __init__(self, rows: Tensor, places: Places, last: bool) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.places, self.last = places, last

    def forward(self, layer: nn.Module, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the block returns, its hidden states ``[..., d]`` overwritten at the special tokens."""
        out = base(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        if self.places.index is None:
            return out
        if self.places.index.shape != hidden.shape[:-1]:
            raise LoricaError(
                f"prefix-layer: {type(layer).__name__} gives {tuple(hidden.shape)} for ids of"
                f" {tuple(self.places.index.shape)}, so it is not known which of these are special tokens"
            )
        hidden = _Overwrite.apply(hidden, self.rows, self.places, False)
        if self.last:
            self.places.index = None
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


@dataclass(frozen=True)
class PrefixEmbedding:
    """ "Prefix-embedding tuning", PreEmbed: the embeddings of the special tokens are learned.

    Attributes:
        prefix: special tokens before the prompt, l_p.
        infix: special tokens between prompt and completion, l_i.
    """

    prefix: int = 16
    infix: int = 8
    name: ClassVar[str] = "prefix-embedding"
    takes_targets: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "its special tokens come into the prompt and are no part of the weights"
    layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.inserts) < 0 or not sum(self.inserts):
            raise LoricaError(f"{self.name}: prefix is {self.prefix} and infix {self.infix}, where one must be above 0")

    @property
    def inserts(self) -> tuple[int, int]:
        """``(lp, li)``, for `lorica.insertion`."""
        return self.prefix, self.infix

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Patched:
        """The rows, which start as those of real tokens drawn from the whole vocabulary (Lester et al., 2021).

        Activations start as what the blocks make of these tokens alone (Li and Liang, 2021).
        """
        path, embedding = _embedding(model)
        ids = torch.randint(embedding.num_embeddings, (sum(self.inserts),))
        replaced = _blocks(model)[:-1] if self.layers else []
        first, *after = _outputs(model, [path, *replaced], ids)
        places = Places()
        yield path, "prefix", Rows(first / getattr(embedding, "embed_scale", 1.0), places)
        for block, rows in zip(replaced, after, strict=True):
            yield block, "prefix", LayerRows(rows, places, last=block == replaced[-1])

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Nothing of the base."""
        return []

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """None: rows act from the start."""
        return []


@dataclass(frozen=True)
class PrefixLayer(PrefixEmbedding):
    """ "Prefix-layer tuning", PreLayer: the activations of the special tokens are learned too."""

    prefix: int = 8
    infix: int = 8
    name: ClassVar[str] = "prefix-layer"
    layers: ClassVar[bool] = True


@dataclass(frozen=True)
class LoRAPrefixEmbedding(PrefixEmbedding):
    """ "LoRA+PE" (appendix E): both at once. `rank` to `init` are LoRA's."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: str = "alpha/r"
    init: str = "kaiming"
    prefix: int = 8
    infix: int = 4
    name: ClassVar[str] = "lora+prefix-embedding"
    takes_targets: ClassVar[bool] = True

    @property
    def lora(self) -> LoRA:
        """The other half."""
        return LoRA(r=self.rank, alpha=self.alpha, dropout=self.dropout, scaling=self.scaling, init=self.init)

    def saved(self) -> LoRAPrefixEmbedding:
        """See `LoRA.saved`."""
        lora = self.lora.saved()
        return dataclasses.replace(self, rank=lora.r, alpha=lora.alpha, init=lora.init)

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Patched:
        """The updates of the targets, then the rows: an update of the embedding is not to meet special tokens."""
        yield from self.lora.patches(model, targets)
        yield from super().patches(model, targets)

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """The targets whose update is still zero."""
        return self.lora.silent(targets, tensors)


@dataclass(frozen=True)
class LoRAPrefixLayer(LoRAPrefixEmbedding):
    """ "LoRA+PL" (appendix E): LoRA and prefix-layer tuning at once."""

    name: ClassVar[str] = "lora+prefix-layer"
    layers: ClassVar[bool] = True


def _embedding(model: Any) -> tuple[str, nn.Embedding]:
    """The layer that looks ids up, and its path."""
    layer = input_embedding(model)
    if not isinstance(layer, nn.Embedding) or getattr(model.config, "is_encoder_decoder", False):
        raise LoricaError(
            f"{type(model).__name__} takes no prefix: that is for a decoder or an encoder which looks its ids up in one"
            " table"
        )
    return next(path for path, module in model.named_modules() if module is layer), layer


def _blocks(model: Any) -> list[str]:
    """The paths of the transformer blocks, in order."""
    stack = stacks(model)[-1]
    if len(stack) != (count := model.config.get_text_config().num_hidden_layers):
        raise LoricaError(
            f"{type(model).__name__} runs {count} blocks and holds {len(stack)}, so it shares their weights: their"
            " activations cannot be learned one by one, but prefix-embedding works"
        )
    return stack


@torch.no_grad()
def _outputs(model: nn.Module, paths: Sequence[str], ids: Tensor) -> list[Tensor]:
    """What the base's modules at `paths` say to a text of ``ids [n]``: ``[n, d]`` each, in fp32."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[path] = (out[0] if isinstance(out, tuple) else out)[0].float().clone()

        return hook

    modes = {module: module.training for module in model.modules()}
    with contextlib.ExitStack() as undo:
        if patch.adapters(model):
            undo.enter_context(patch.disabled(model))
        for path in paths:
            undo.callback(model.get_submodule(path).register_forward_hook(keep(path)).remove)
        model.eval()(input_ids=ids[None].to(next(model.parameters()).device))
    for module, mode in modes.items():
        module.training = mode
    return [found[path] for path in paths]
