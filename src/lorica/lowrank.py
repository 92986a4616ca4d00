"""LowRank: ``y + (alpha / r) B A x``, the paper's equation 3, with its initialisers and scale rules.

    W  [out, in]   frozen
    A  [r, in]     random at the start
    B  [out, r]    zero at the start, so that step zero is the base model (section 4.1)

`LoRA` is the recipe: which rank and alpha each target gets, and what is trained beside the factors. The paper trains
nothing else; biases, whole modules and single token rows are what its users came to need.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorica import dora, spectral, weights
from lorica.doors import is_count
from lorica.errors import all_faults
from lorica.geometry import SCALINGS, Start
from lorica.kernels import experts
from lorica.patterns import check, ends
from lorica.rows import TiedTokenRows, TokenRows, ascending
from lorica.targets import CHILD, Ends, Target, by_pattern, names

INITS: dict[str, Callable[[Tensor], Tensor]] = {
    # The distribution of nn.Linear's own weights, as loralib draws A.
    "kaiming": lambda A: nn.init.kaiming_uniform_(A, a=math.sqrt(5)),
    # "a random Gaussian initialization for A" (section 4.1); its width is not given there, 1/r is PEFT's.
    "gaussian": lambda A: nn.init.normal_(A, std=1 / A.shape[0]),
}
# Both factors go elsewhere once they are drawn: to what quantizing took away, or to singular vectors.
STARTS = ("loftq", *spectral.SPECTRAL)
BIASES = ("none", "all", "lora_only")


class LowRank(nn.Module):
    """The patch of one matrix, or of a slice of its output rows.

    Args:
        target: the matrix; `target.rows` limits the update to some output rows of a fused projection.
        r: rank, at least 1.
        scale: what multiplies ``B A``; `LoRA.scale` gives it from alpha.
        dropout: probability of dropping an element of the input of A (section 4 of the released code's layers).
        init: a key of `INITS`, or one of `STARTS`, which draw A as `kaiming` does.

    The factors are fp32 whatever the base is kept in; the input is cast to them and the sum back to the base's dtype.
    """

    def __init__(self, target: Target, r: int, scale: float, dropout: float = 0.0, init: str = "kaiming") -> None:
        super().__init__()
        of_A, of_B = weights.factor_shapes(target, r)
        if target.rows:
            of_B = (target.rows[1] - target.rows[0], r)
        self.rows, self.scale, self.out_features = target.rows, scale, target.shape[0]
        self.part = target.part
        self.A = nn.Parameter(torch.empty(of_A, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(of_B, dtype=torch.float32))
        self.register_parameter("m", None)
        for held in ("A0", "B0"):
            self.register_buffer(held, None, persistent=False)
        self.dropout = nn.Dropout(dropout) if dropout and target.storage != "embedding" else nn.Identity()
        if target.storage == "embedding":
            # Only columns of A whose ids occur get a gradient, so A is the factor that starts at zero, as in loralib.
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            for A in self.A.data if self.A.ndim > 2 else [self.A]:
                INITS.get(init, INITS["kaiming"])(A)
            nn.init.zeros_(self.B)

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update; a start that is held against it takes further ranks (see `lorica.spectral`)."""
        if (start := self.start) is None:
            return self.A, self.B
        return torch.cat((self.A, start.A), -2), torch.cat((self.B, start.B), -1)

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """``base(x) + scale B A x``: ``[..., in]`` (ids ``[...]`` for an embedding) to ``[..., out]``."""
        storage = weights.storage_of(layer)
        if storage.inside:
            assert self.part is not None
            own = experts.Update(*self.factors, self.scale)
            return experts.updated(layer, self.part, own, base, x, *args, **kwargs)
        y = base(x, *args, **kwargs)
        if storage.takes_ids:
            self._grow(storage.shape(layer)[1])
        # PEFT's order of operations, so that fp32 results agree with it to the bit.
        A, B = self.factors
        update = storage.up(layer, storage.down(layer, self.dropout(x), A), B)
        if self.m is not None:
            return dora.output(layer, y, update, self.gain(layer, exact=True), self.scale).to(y.dtype)
        update = update * self.scale
        if self.rows:
            start, stop = self.rows
            return torch.slice_scatter(y, (y[..., start:stop] + update).to(y.dtype), -1, start, stop)
        return (y + update).to(y.dtype)

    def delta(self) -> Tensor:
        """``scale B A`` as a full ``[out, in]`` matrix in fp32, zero outside the slice; a stack of them for a stack."""
        A, B = (factor.detach().float() for factor in self.factors)
        delta = self.scale * (B @ A)
        if self.rows:
            start, stop = self.rows
            delta = torch.nn.functional.pad(delta, (0, 0, start, self.out_features - stop))
        return delta

    def fold(self, layer: nn.Module, W: Tensor) -> Tensor:
        """``W + scale B A`` for ``W [out, in]`` in fp32 (section 4.1, no additional inference latency)."""
        self._grow(W.shape[-1])
        delta = self.delta().to(W.device)
        if self.m is None:
            return W + delta
        g = dora.gain(self.m.detach().to(W.device), dora.norms(W, self.A.detach(), self.B.detach(), self.scale))
        return g[:, None] * (W + delta)

    def weigh(self, layer: nn.Module) -> None:
        """Give every output a magnitude, which is trained beside its direction (DoRA)."""
        self.norms = dora.Norms()
        self.m = nn.Parameter(self.norms(layer, self.A, self.B, self.scale, exact=True))

    def gain(self, layer: nn.Module, exact: bool = False) -> Tensor:
        """What DoRA multiplies the outputs of a layer with, bias aside: ``m / ||W + scale B A||  [out]`` in fp32.

        Args:
            exact: in PEFT's order of operations, which forms ``W + scale B A``; else within 1e-5 and without.
        """
        assert self.m is not None, "a patch without magnitudes"
        return dora.gain(self.m, self.norms(layer, self.A, self.B, self.scale, exact))

    def make_up_for(self, lost: Tensor) -> None:
        """Start at the best approximation of what the layer's matrix lost, ``W - Q [out, in]`` (`loftq`)."""
        lost = lost[slice(*self.rows)] if self.rows else lost
        if lost.any():
            A, B = spectral.best_factors(lost / self.scale, self.r)
            self.A.data[: len(A)], self.B.data[:, : len(A)] = A.to(self.A), B.to(self.B)

    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Start at these factors and hold them against the update, so that the layer starts as the base's."""
        self.A.data.copy_(A)
        self.B.data.copy_(B)
        self.A0, self.B0 = self.A.detach().clone(), -self.B.detach()

    @property
    def start(self) -> Start | None:
        """What is held against the update: A and minus B as they started."""
        return None if self.A0 is None or self.B0 is None else Start(self.A0, self.B0, self.scale)

    def silent(self) -> bool:
        """Whether the patch still changes nothing: one of its factors is all zero, or both are where they started."""
        if (start := self.start) is not None:
            return torch.equal(self.A, start.A) and torch.equal(self.B, -start.B)
        return not (self.A.any() and self.B.any())

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}" + (f", rows={self.rows}" if self.rows else "")

    def _grow(self, in_features: int) -> None:
        # An embedding may get more rows after the patch was made; a zero column of A leaves a new row as it is.
        if in_features > self.A.shape[-1]:
            more = (0, in_features - self.A.shape[-1])
            self.A.data = nn.functional.pad(self.A.data, more)
            self.A0 = None if self.A0 is None else nn.functional.pad(self.A0, more)


class TiedLowRank(nn.Module):
    """The other side of a tied embedding: the same update, transposed, on the output head. Owns no parameters."""

    def __init__(self, source: LowRank) -> None:
        super().__init__()
        self.source = (source,)  # in a tuple, so that the factors are registered once, at the embedding

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """``base(x) + scale x B A``: hidden ``[..., dim]`` to logits ``[..., vocab]``."""
        (patch,) = self.source
        A, B = patch.factors
        y = base(x)
        return (y + (x.to(B.dtype) @ B) @ A * patch.scale).to(y.dtype)

    def fold(self, layer: nn.Module, W: Tensor) -> Tensor:
        """``W + (scale B A)^T`` for ``W [vocab, dim]`` in fp32."""
        return W + self.source[0].delta().T.to(W.device)

    def silent(self) -> bool:
        """Whether the shared update still changes nothing."""
        return self.source[0].silent()


@dataclass(frozen=True)
class LoRA:
    """LoRA's settings.

    Attributes:
        r: rank of the update; of each expert's, where experts are adapted, whatever their number.
        alpha: the scale is ``alpha / r``; a number, not tuned in the paper but set to the first r tried (section 4.1).
        dropout: on the input of A; refused where experts are adapted.
        scaling: ``alpha/r``, or ``alpha/sqrt(r)``, which keeps the update's size as r grows (rsLoRA, arXiv 2312.03732).
        init: how A starts, `kaiming` or `gaussian`, while B starts at zero; or `loftq`: both start at what quantizing
            the base took away (arXiv 2310.08659), the base as it is packed, for a model that `load` quantized; or
            `pissa`, `gradient`: both start at singular vectors (`lorica.spectral`), the latter when training begins.
        bias: train no biases, `all` of the model's, or those of the patched layers (`lora_only`).
        ranks, alphas: other values for some targets; a key is a regex that must match the end of `Target.key`
            from a dot on, as PEFT's rank_pattern, and the first that does counts.
        modules_to_save: names of modules trained whole, beside the factors.
        token_rows: ids whose embedding rows (and output rows) are trained, all others frozen.
        tied: let an update of a tied embedding reach the output head too; without it, only the input side changes.
        dora: train the size of each row of ``W + s B A`` by itself (DoRA, arXiv 2402.09353); see `lorica.dora`.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    scaling: str = "alpha/r"
    init: str = "kaiming"
    bias: str = "none"
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    token_rows: Sequence[int] = ()
    tied: bool = False
    dora: bool = False
    name: ClassVar[str] = "lora"
    takes_targets: ClassVar[bool] = True
    unmergeable: ClassVar[str] = ""

    def __post_init__(self) -> None:
        # Equal settings are to be equal values, however they were spelled.
        for name, plain in (("alpha", float), ("ranks", dict), ("modules_to_save", tuple), ("token_rows", ascending)):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "alphas", {key: float(alpha) for key, alpha in self.alphas.items()})
        ranks, alphas = [self.r, *self.ranks.values()], [self.alpha, *self.alphas.values()]
        faults = [
            f"{what} is {value!r}, which must be {need}"
            for what, value, good, need in (
                *(("rank", r, is_count(r, 1), "a whole number from 1 up") for r in ranks),
                *(("alpha", alpha, math.isfinite(alpha), "a finite number") for alpha in alphas),
                ("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1"),
                ("scaling", self.scaling, self.scaling in SCALINGS, f"one of {', '.join(SCALINGS)}"),
                ("init", self.init, self.init in [*INITS, *STARTS], f"one of {', '.join([*INITS, *STARTS])}"),
                ("bias", self.bias, self.bias in BIASES, f"one of {', '.join(BIASES)}"),
                ("dora", self.dora, not (self.dora and self.init in spectral.SPECTRAL), f"off with init={self.init!r}"),
            )
            if not good
        ]
        if faults:
            raise all_faults("these LoRA settings cannot be used:", faults)
        for pattern in [*self.ranks, *self.alphas]:
            check(pattern)

    def rank_of(self, path: str) -> int:
        """The rank at a layer."""
        return by_pattern(self.ranks, path, self.r)

    def alpha_of(self, path: str) -> float:
        """Alpha at a layer."""
        return by_pattern(self.alphas, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """What multiplies ``B A`` at a layer."""
        return SCALINGS[self.scaling](self.alpha_of(path), self.rank_of(path))

    @property
    def neutral(self) -> bool:
        """Whether the model is the base's to the bit before the first update."""
        return self.init in INITS

    def saved(self) -> LoRA:
        """The settings of the adapter as it is saved: where a start is held against it, it has twice the ranks."""
        if self.init not in spectral.SPECTRAL:
            return self
        more = 2.0 if self.scaling == "alpha/r" else math.sqrt(2)
        return dataclasses.replace(
            self,
            r=2 * self.r,
            alpha=more * self.alpha,
            ranks={key: 2 * r for key, r in self.ranks.items()},
            alphas={key: more * alpha for key, alpha in self.alphas.items()},
            init="kaiming",
        )

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Iterator[tuple[str, str, nn.Module]]:
        """Yield ``(path, part, patch)`` for every matrix; raises if a pattern or an option fits nothing."""
        for key in [*self.ranks, *self.alphas]:
            if not any(ends(key, target.key) for target in targets):
                raise all_faults(
                    f"the rank or alpha given for {key!r} fits none of the targets:",
                    [names(target.key for target in targets)],
                )
        reasons = [(target, self._unfit(target)) for target in targets]
        if faults := [f"{target}: {reason}" for target, reason in reasons if reason]:
            raise all_faults("these settings do not fit these targets:", faults)
        tie = Ends(model)
        if self.tied and not (tie.tied and tie.embedding in [target.path for target in targets]):
            raise all_faults("tied=True needs a tied embedding among the targets:", [tie.say()])
        if self.tied and self.dora:
            raise all_faults("tied=True and dora=True:", ["the two sides of a tied matrix have rows of other norms"])
        whole = self._unpacked(model, targets) if self.init == "loftq" else None
        for target in targets:
            patch = LowRank(target, self.rank_of(target.key), self.scale_of(target.key), self.dropout, self.init)
            if whole is not None and target.storage in weights.PACKED:
                patch.make_up_for(weights.lost(model, whole, target.path))
            if self.init == "pissa":
                patch.start_at(*spectral.principal(model.get_submodule(target.path), target, patch.r, patch.scale))
            elif self.init == "gradient":
                patch.start_at(patch.A.detach(), patch.B.detach())
            if self.dora:
                patch.weigh(model.get_submodule(target.path))
            yield target.path, target.part or "lora", patch
            if self.tied and target.path == tie.embedding:
                yield tie.head, "lora_tied", TiedLowRank(patch)
        if self.token_rows:
            yield from self._token_rows(model, tie)

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> list[str]:
        """Names of the model's own parameters that are trained, each once."""
        chosen: dict[str, None] = {}
        patched = {target.path for target in targets}
        for name, _ in model.named_parameters(remove_duplicate=False):
            path, _, last = name.rpartition(".")
            if last == "bias" and (self.bias == "all" or (self.bias == "lora_only" and path in patched)):
                chosen[name] = None
        if self.bias != "none" and not chosen:
            raise all_faults(f"bias={self.bias!r} selects nothing:", ["this model has none there; use bias='none'"])
        for wanted in self.modules_to_save:
            found = [
                name
                for name, _ in model.named_parameters(remove_duplicate=False)
                if f".{CHILD}." not in name and f".{wanted}." in f".{name}"
            ]
            if not found:
                owners = names(
                    path for path, module in model.named_modules() if path and list(module.parameters(False))
                )
                raise all_faults(f"modules_to_save: no module is called {wanted!r}:", [f"this model has: {owners}"])
            if clash := sorted(path for path in patched if any(name.startswith(f"{path}.") for name in found)):
                fixes = [f"add '!{path}' to the targets" for path in clash]
                raise all_faults(f"{wanted!r} is trained whole and is a target too:", fixes)
            chosen.update(dict.fromkeys(found))
        return list(chosen)

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """The targets whose update is still zero, because one of their factors is."""
        return [
            str(target)
            for target in targets
            if not all(tensors[f"{target.path}#{target.part or 'lora'}.{factor}"].any() for factor in "AB")
        ]

    def _unfit(self, target: Target) -> str | None:
        r = self.rank_of(target.key)
        reasons = [weights.unfit(target, r, self.dropout)]
        if self.dora:
            reasons.append(dora.unfit(target))
        if self.init in spectral.SPECTRAL:
            reasons.append(spectral.unfit(target, r))
            if not self.scale_of(target.key):
                reasons.append("the scale is 0, so that no start has a size")
        return next((reason for reason in reasons if reason), None)

    def _unpacked(self, model: nn.Module, targets: Sequence[Target]) -> nn.Module:
        """The model as it was before it was quantized; raises for one of which that cannot be had."""
        faults = [
            f"the scale is {self.scale_of(target.key):g} at {target.path}: nothing can be made up for"
            for target in targets
            if not self.scale_of(target.key)
        ]
        if not any(target.storage in weights.PACKED for target in targets):
            faults.append("none of the targets is quantized: lorica.load(..., quantize='nf4')")
        whole = None if faults else weights.unpacked(model)
        if whole is None and not faults:
            faults.append("the weights as they were are not known: quantize with lorica.load(..., quantize='nf4')")
        if faults:
            raise all_faults("init='loftq' starts from what quantizing took away:", faults)
        assert whole is not None
        return whole

    def _token_rows(self, model: nn.Module, tie: Ends) -> Iterator[tuple[str, str, nn.Module]]:
        if not tie.embedding:
            raise all_faults("token_rows needs a model with an input embedding:", [f"{type(model).__name__} has none"])
        source = self._rows_of(model.get_submodule(tie.embedding))
        yield tie.embedding, "tokens", source
        if tie.tied:
            yield tie.head, "tokens_tied", TiedTokenRows(source)
        elif tie.head:
            # Without its output row a new token could be read but never written.
            yield tie.head, "tokens", self._rows_of(model.get_submodule(tie.head))

    def _rows_of(self, layer: nn.Module) -> TokenRows:
        with weights.at_hand(layer):
            return TokenRows(layer, self.token_rows)
