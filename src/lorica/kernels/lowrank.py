"""The fused low-rank linear: ``y_k = x W_k^T + b_k + s (x A^T) B^T`` for all projections k that read the same x.

One engine for one adapter, for many trained at once, and for many served in one batch: an update names the rows of x
(tokens) and the columns of y it acts on. Against a plain module per projection:

- x is kept once per group, and beside it only the products ``x A^T [tokens, r]``;
- the A of all updates that read the same tokens are one matrix product, forward and backward;
- updates are added in place with the scale folded in: nothing of the size of y or x is made but y and dx;
- dropout draws its mask again instead of keeping it;
- DoRA's gain, ``y = q (x W^T + s x A^T B^T) + b`` with q per output, is one scaling in place, for which the base's part
  of y is kept.

Gradients, with g = s dy B:  dA = g^T x,  dB = s dy^T (x A^T),  dx = dy W + g A   (equation 3, differentiated). With a
gain, dy is q dy in all of these, and  dq = sum over tokens of dy (y - b) / q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.kernels import gpu
from lorica.kernels.documents import current
from lorica.kernels.elementwise import Activation
from lorica.kernels.precision import computes_in


@dataclass(frozen=True)
class Matrix:
    """A frozen dense projection: `weight` ``[out, in]``, or ``[in, out]`` where `transposed`; `bias` ``[out]``."""

    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``: ``[tokens, in]`` to ``[tokens, out]``."""
        weight, bias = self.weight.to(x.dtype), self.bias
        return F.linear(x, weight.T if self.transposed else weight, None if bias is None else bias.to(x.dtype))

    def backward(self, dy: Tensor, dx: Tensor | None) -> Tensor:
        """``dy W``, added to dx in place where there is one."""
        W = self.weight.to(dy.dtype)
        W = W.T if self.transposed else W
        return torch.mm(dy, W) if dx is None else dx.addmm_(dy, W)


@dataclass(frozen=True)
class Update:
    """One ``s B A``: at which matrix of the group, on which tokens and which columns of the output.

    With `gained`, a gain per output multiplies the matrix's whole product on these tokens, bias aside.
    """

    matrix: int
    scale: float
    tokens: tuple[int, int]
    columns: tuple[int, int] | None = None
    dropout: float = 0.0
    salt: int = 0
    gained: bool = False


@dataclass(frozen=True)
class Group:
    """Projections of one input and their updates; those on the same tokens are neighbours.

    Factors are ``[A, B, A, B, ..., q, ...]``: a pair per update, then the gains ``[out]`` of those that have one.
    """

    matrices: tuple[Matrix, ...]
    updates: tuple[Update, ...]

    @property
    def gains(self) -> dict[int, int]:
        """The place among the factors of each gain, by update."""
        gained = [i for i, update in enumerate(self.updates) if update.gained]
        return {i: 2 * len(self.updates) + k for k, i in enumerate(gained)}

    @property
    def factors(self) -> int:
        """How many factors there are."""
        return 2 * len(self.updates) + len(self.gains)

    def narrowed(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
        """The factors in the format of the products, made once for both passes; gains ask for all digits of theirs."""
        return factors if self.gains else [factor.to(dtype) for factor in factors]

    def forward(self, x: Tensor, factors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``x [tokens, in]`` to the outputs, and what `backward` needs: per update ``x A^T``, per gain the base's y."""
        ys = [matrix.forward(x) for matrix in self.matrices]
        downs: list[Tensor] = []
        bases: list[Tensor] = []
        gains = self.gains
        for (start, stop), places in self._runs():
            downs += self._down(x[start:stop], places, factors)
            for i in places:
                out, B = self._part(ys, i), factors[2 * i + 1]
                if i in gains:
                    q, bias = factors[gains[i]], self.matrices[self.updates[i].matrix].bias
                    bases.append(out.clone())
                    out.mul_(q)
                    if bias is not None:
                        out.add_(bias * (1 - q))  # where q is 1, nothing
                    B = q[:, None] * B
                out.addmm_(downs[i], B.to(x.dtype).T, alpha=self.updates[i].scale)
        return ys, downs + bases

    def backward(
        self, dys: Sequence[Tensor], x: Tensor, kept: Sequence[Tensor], factors: Sequence[Tensor], wants_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of x (None unless wanted) and of the factors."""
        downs, bases = kept[: len(self.updates)], kept[len(self.updates) :]
        grads: list[Tensor | None] = [None] * len(factors)
        dys = self._gained(dys, downs, bases, factors, grads)
        dx: Tensor | None = None
        if wants_x:
            for matrix, dy in zip(self.matrices, dys, strict=True):
                dx = matrix.backward(dy, dx)
        for (start, stop), places in self._runs():
            ranks = [factors[2 * i].shape[0] for i in places]
            g = x.new_empty(stop - start, sum(ranks))
            for i, column in zip(places, g.split(ranks, 1), strict=True):
                dy, scale = self._part(dys, i), self.updates[i].scale
                column.addmm_(dy, factors[2 * i + 1].to(x.dtype), beta=0, alpha=scale)
                # Tall matrices multiply several times faster with the long one on the right.
                dB = torch.addmm(dy.new_empty(()), downs[i].T, dy, beta=0, alpha=scale).T
                grads[2 * i + 1] = dB.to(factors[2 * i + 1].dtype)
            self._up(x[start:stop], g, ranks, places, factors, grads, None if dx is None else dx[start:stop])
        return dx, grads

    def _gained(
        self,
        dys: Sequence[Tensor],
        downs: Sequence[Tensor],
        bases: Sequence[Tensor],
        factors: Sequence[Tensor],
        grads: list[Tensor | None],
    ) -> Sequence[Tensor]:
        """The gradients of the gains; and of the outputs, as they are before them."""
        gains = self.gains
        if not gains:
            return dys
        found = list(dys)
        for k in {self.updates[i].matrix for i in gains}:
            found[k] = dys[k].clone()
        for (i, place), base in zip(gains.items(), bases, strict=True):
            update, q, B = self.updates[i], factors[place], factors[2 * i + 1]
            dy, bias = self._part(dys, i), self.matrices[update.matrix].bias
            dq = (dy * base).sum(0, dtype=q.dtype)
            if bias is not None:
                dq -= bias * dy.sum(0, dtype=q.dtype)
            grads[place] = dq.add_((torch.mm(downs[i].T, dy).T.to(q.dtype) * B).sum(1), alpha=update.scale)
            self._part(found, i).mul_(q)
        return found

    def _runs(self) -> list[tuple[tuple[int, int], list[int]]]:
        """Updates of the same tokens together: those tokens, and the updates' places."""
        places = range(len(self.updates))
        return [(tokens, list(run)) for tokens, run in groupby(places, lambda i: self.updates[i].tokens)]

    def _part(self, ys: Sequence[Tensor], i: int) -> Tensor:
        """What update i is added to."""
        update = self.updates[i]
        rows = ys[update.matrix][update.tokens[0] : update.tokens[1]]
        return rows[:, update.columns[0] : update.columns[1]] if update.columns else rows

    def _down(self, x: Tensor, places: Sequence[int], factors: Sequence[Tensor]) -> list[Tensor]:
        if any(self.updates[i].dropout for i in places):
            return [self._dropped(x, i) @ factors[2 * i].to(x.dtype).T for i in places]
        A = _stacked(places, factors, x.dtype)
        return list((x @ A.T).split([factors[2 * i].shape[0] for i in places], 1))

    def _up(
        self,
        x: Tensor,
        g: Tensor,
        ranks: Sequence[int],
        places: Sequence[int],
        factors: Sequence[Tensor],
        grads: list[Tensor | None],
        dx: Tensor | None,
    ) -> None:
        """The gradients of A, and what the updates send back to x, added to dx."""
        if any(self.updates[i].dropout for i in places):
            for i, column in zip(places, g.split(ranks, 1), strict=True):
                grads[2 * i] = torch.mm(column.T, self._dropped(x, i)).to(factors[2 * i].dtype)
                if dx is not None:
                    dx += self._dropped(column @ factors[2 * i].to(x.dtype), i)
            return
        for i, dA in zip(places, torch.mm(g.T, x).split(list(ranks)), strict=True):
            grads[2 * i] = dA.to(factors[2 * i].dtype)
        if dx is not None:
            dx.addmm_(g, _stacked(places, factors, x.dtype))

    def _dropped(self, x: Tensor, i: int) -> Tensor:
        update = self.updates[i]
        if not update.dropout:
            return x
        here = current()
        assert here is not None and here.keys, "dropout is keyed by document"
        return x * here.kept(x.shape[1], update.dropout, update.salt, *update.tokens, x)


def _stacked(places: Sequence[int], factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of some updates on top of each other: ``[sum of ranks, in]``."""
    each = [factors[2 * i] for i in places]
    return (each[0] if len(each) == 1 else torch.cat(each)).to(dtype)


class SameInput(torch.autograd.Function):
    """A group as one step of autograd: ``x [..., in]`` to one ``[..., out]`` per matrix."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group, *given: Tensor):
        flat = x.reshape(-1, x.shape[-1])
        factors = group.narrowed(given, computes_in(x))
        ys, downs = group.forward(flat.to(computes_in(x)), factors)
        ctx.group, ctx.kinds, ctx.shape = group, [each.dtype for each in given], x.shape
        ctx.save_for_backward(flat if given else flat[:0], *factors, *downs)  # only updates ask for it again
        return tuple(y.to(x.dtype).view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, *rest = ctx.saved_tensors
        factors, downs = rest[: len(ctx.kinds)], rest[len(ctx.kinds) :]
        wide = x.to(computes_in(x))
        flat = [dy.reshape(-1, dy.shape[-1]).to(wide.dtype) for dy in dys]
        dx, grads = ctx.group.backward(flat, wide, downs, factors, ctx.needs_input_grad[0])
        return None if dx is None else dx.to(x.dtype).view(ctx.shape), None, *_in(ctx.kinds, grads)


class GatedMLP(torch.autograd.Function):
    """``down(act(gate x) * up x)``: keeps x and the two products, not the activation nor the product of both."""

    @staticmethod
    def forward(ctx, x: Tensor, wide: Group, narrow: Group, act: Activation, *given: Tensor) -> Tensor:
        flat, dtype = x.reshape(-1, x.shape[-1]), computes_in(x)
        split = wide.factors
        factors = [*wide.narrowed(given[:split], dtype), *narrow.narrowed(given[split:], dtype)]
        (gate, up), first = wide.forward(flat.to(dtype), factors[:split])
        hidden = gpu.gated(gate, up, act.name) if gpu.ready(gate) else act.forward(gate).mul_(up)
        (y,), second = narrow.forward(hidden, factors[split:])
        ctx.parts, ctx.shape, ctx.first = (wide, narrow, act), x.shape, len(first)
        ctx.kinds = [each.dtype for each in given]
        ctx.save_for_backward(flat, gate.to(x.dtype), up.to(x.dtype), *factors, *first, *second)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor):
        wide, narrow, act = ctx.parts
        x, gate, up, *rest = ctx.saved_tensors
        dtype = computes_in(x)
        gate, up = gate.to(dtype), up.to(dtype)
        factors, downs = rest[: len(ctx.kinds)], rest[len(ctx.kinds) :]
        first, second = downs[: ctx.first], downs[ctx.first :]
        split = wide.factors
        flat = dy.reshape(-1, dy.shape[-1]).to(dtype)
        # Only the updates' own gradients ask for the product again.
        if gpu.ready(gate):
            hidden = gpu.gated(gate, up, act.name) if narrow.updates else gate
        else:
            s = act.forward(gate)
            hidden = s * up if narrow.updates else s
        dh, narrow_grads = narrow.backward([flat], hidden, second, factors[split:], True)
        assert dh is not None
        if gpu.ready(gate):
            dgate, dup = gpu.gated_backward(dh, gate, up, act.name)
        else:
            dup = s.mul_(dh)
            dgate = act.backward(dh.mul_(up), gate)
        dx, wide_grads = wide.backward([dgate, dup], x.to(dtype), first, factors[:split], ctx.needs_input_grad[0])
        grads = _in(ctx.kinds, [*wide_grads, *narrow_grads])
        return None if dx is None else dx.to(x.dtype).view(ctx.shape), None, None, None, *grads


def _in(kinds: Sequence[torch.dtype], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the formats of what they are of."""
    return [None if grad is None else grad.to(kind) for kind, grad in zip(kinds, grads, strict=True)]
