"""Low-rank updates of expert matrices: ``y = x W_e^T + s (x A_e^T) B_e^T`` for the tokens x that are sent to expert e.

A mixture keeps all its experts in one module, which multiplies twice with something between, so an update cannot be
added to what the module returns. transformers lets an implementation be registered for such modules; this is one. It
sorts the tokens by expert, multiplies each expert's rows with that expert's matrices and factors only, and so never
makes a ``W_e + s B_e A_e``, which would take the memory of all experts again.

The base's products are those of the implementation the model was set to, on the CPU to the bit: `eager` multiplies each
expert's rows by themselves, ordered by the place of the expert among a token's, and adds up a token's experts one after
the other; all others have the rows of all experts in one tensor, and add at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from lorica.errors import LoricaError
from lorica.kernels.documents import current

NAME = "lorica"


class Update(NamedTuple):
    """``s B_e A_e`` of one matrix of all experts: ``A [E, r, in]``, ``B [E, out, r]``."""

    A: Tensor
    B: Tensor
    scale: float


class _Asking:
    """Stands before the config of an experts module for one call: asks for this implementation, with these updates."""

    def __init__(self, config: Any, updates: dict[str, Update]) -> None:
        self.config, self.updates = config, updates
        self._experts_implementation = NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def updated(layer: Any, part: str, update: Update, base: Callable[..., Tensor], *args, **kwargs) -> Tensor:
    """Call the forward of an experts module with one of its matrices updated; calls for other parts may be inside."""
    config = layer.config
    if isinstance(config, _Asking):
        config.updates[part] = update
        return base(*args, **kwargs)
    layer.config = _Asking(config, {part: update})
    try:
        return base(*args, **kwargs)
    finally:
        layer.config = config


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What an experts module returns ``[tokens, dim]``.

    Args:
        self: the module, with what `weights.refusal` asks of it.
        hidden_states: ``[tokens, dim]``.
        top_k_index: ``[tokens, k]`` experts of each token; one from E up stands for none.
        top_k_weights: ``[tokens, k]``.
    """
    here = current()
    if here and here.owners:
        raise LoricaError("experts cannot be patched by several adapters in one batch: run them one after the other")
    updates: dict[str, Update] = getattr(self.config, "updates", {})
    eager = getattr(self.config, "config", self.config)._experts_implementation in (None, "eager")
    tokens, k = top_k_index.shape
    # the rows of one expert stand in transformers' own order, since the last bits of a row may depend on its place
    chosen, order = torch.sort((top_k_index.T if eager else top_k_index).reshape(-1), stable=eager)
    counts = _counts(chosen, self.num_experts)
    chosen, order = chosen[: sum(counts)], order[: sum(counts)]
    token = order % tokens if eager else order // k

    def product(part: str, x: Tensor) -> Tensor:
        W = getattr(self, part)
        y = grouped(x, W.mT if self.is_transposed else W, counts, apart=eager)
        if self.has_bias:
            y = y + getattr(self, f"{part}_bias")[chosen]
        if part not in updates:
            return y
        A, B, scale = updates[part]
        return (y + grouped(grouped(x.to(A.dtype), A, counts), B, counts) * scale).to(y.dtype)

    h = product("gate_up_proj" if self.has_gate else "up_proj", hidden_states[token])
    y = product("down_proj", self._apply_gate(h) if self.has_gate else self.act_fn(h))
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    y = y * (top_k_weights.T if eager else top_k_weights).reshape(-1)[order].unsqueeze(-1)
    if eager:
        return torch.zeros_like(hidden_states).index_add(0, token, y.to(hidden_states.dtype))
    each = y.new_zeros(top_k_index.numel(), y.shape[-1]).index_copy(0, order, y)
    return each.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


ExpertsInterface.register(NAME, experts_forward)


def grouped(x: Tensor, W: Tensor, counts: Sequence[int], apart: bool = False) -> Tensor:
    """``x W_e^T`` of each run of rows: ``x [rows, in]``, sorted by expert, and ``W [E, out, in]`` to ``[rows, out]``.

    Args:
        counts: ``[E]`` rows of each expert; their sum is the number of rows.
        apart: multiply each run in memory of its own, since the last bits of a product may depend on where it lies.
    """
    x = x.to(W.dtype)
    if x.is_cuda and x.dtype == torch.bfloat16 and W.shape[1] % 8 == W.shape[2] % 8 == 0:  # torch's kernel, from 2.10
        offsets = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x, W.mT, offs=offsets)
    return _Grouped.apply(x, W, tuple(counts), apart)


class _Grouped(torch.autograd.Function):
    """One product per expert that has rows, forward and backward; autograd alone would make a gradient of the size of
    the whole stack for each of them."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, counts: tuple[int, ...], apart: bool) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.counts = counts
        y = x.new_empty(len(x), W.shape[1])
        for e, rows in _runs(counts):
            if apart:
                y[rows] = x[rows].clone() @ W[e].T
            else:
                torch.mm(x[rows], W[e].T, out=y[rows])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, W = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        for e, rows in _runs(ctx.counts):
            if dx is not None:
                torch.mm(dy[rows], W[e], out=dx[rows])
            if dW is not None:
                dW[e] = torch.mm(dy[rows].T, x[rows])
        return dx, dW, None, None


def _runs(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def _counts(chosen: Tensor, experts: int) -> list[int]:
    """How many rows each expert has, given the sorted experts of all."""
    if chosen.is_meta:  # a plan: nobody knows where tokens would go, so all experts get their share
        share, rest = divmod(len(chosen), experts)
        return [share + (e < rest) for e in range(experts)]
    return torch.bincount(chosen, minlength=experts)[:experts].tolist()
