"""LowRank: ``y + (alpha / r) B A x``, the paper's equation 3, with its initialisers and scale rules.

    W  [out, in]   frozen
    A  [r, in]     random at the start
    B  [out, r]    zero at the start, so that step zero is the base model (section 4.1)

`LoRA` is the recipe: which rank and alpha each target gets, and what is trained beside the factors. The paper trains
nothing else; biases, whole modules and single token rows are what its users came to need.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorica import dora, weights
from lorica.errors import all_faults
from lorica.geometry import SCALINGS
from lorica.kernels import experts
from lorica.rows import TiedTokenRows, TokenRows
from lorica.targets import CHILD, Target, input_embedding, names

INITS: dict[str, Callable[[Tensor], Tensor]] = {
    # The distribution of nn.Linear's own weights, as loralib draws A.
    "kaiming": lambda A: nn.init.kaiming_uniform_(A, a=math.sqrt(5)),
    # "a random Gaussian initialization for A" (section 4.1); its width is not given there, 1/r is PEFT's.
    "gaussian": lambda A: nn.init.normal_(A, std=1 / A.shape[0]),
    # Where the base is not quantized, so that nothing was taken away; elsewhere `LowRank.make_up_for` follows.
    "loftq": lambda A: nn.init.kaiming_uniform_(A, a=math.sqrt(5)),
}
BIASES = ("none", "all", "lora_only")


class LowRank(nn.Module):
    """The patch of one matrix, or of a slice of its output rows.

    Args:
        target: the matrix; `target.rows` limits the update to some output rows of a fused projection.
        r: rank, at least 1.
        scale: what multiplies ``B A``; `LoRA.scale` gives it from alpha.
        dropout: probability of dropping an element of the input of A (section 4 of the released code's layers).
        init: a key of `INITS`.

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
        self.dropout = nn.Dropout(dropout) if dropout and target.storage != "embedding" else nn.Identity()
        if target.storage == "embedding":
            # Only columns of A whose ids occur get a gradient, so A is the factor that starts at zero, as in loralib.
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            for A in self.A.data if self.A.ndim > 2 else [self.A]:
                INITS[init](A)
            nn.init.zeros_(self.B)

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """``base(x) + scale B A x``: ``[..., in]`` (ids ``[...]`` for an embedding) to ``[..., out]``."""
        storage = _storage(layer)
        if storage.inside:
            assert self.part is not None
            own = experts.Update(self.A, self.B, self.scale)
            return experts.updated(layer, self.part, own, base, x, *args, **kwargs)
        y = base(x, *args, **kwargs)
        if storage.takes_ids:
            self._grow(storage.shape(layer)[1])
        # PEFT's order of operations, so that fp32 results agree with it to the bit.
        update = storage.up(layer, storage.down(layer, self.dropout(x), self.A), self.B)
        if self.m is not None:
            return dora.output(layer, y, update, self.gain(layer, exact=True), self.scale).to(y.dtype)
        update = update * self.scale
        if self.rows:
            start, stop = self.rows
            return torch.slice_scatter(y, (y[..., start:stop] + update).to(y.dtype), -1, start, stop)
        return (y + update).to(y.dtype)

    def delta(self) -> Tensor:
        """``scale B A`` as a full ``[out, in]`` matrix in fp32, zero outside the slice; a stack of them for a stack."""
        delta = self.scale * (self.B.detach().float() @ self.A.detach().float())
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
            A, B = best_factors(lost / self.scale, self.r)
            self.A.data[: len(A)], self.B.data[:, : len(A)] = A.to(self.A), B.to(self.B)

    def silent(self) -> bool:
        """Whether the patch still changes nothing: one of its factors is all zero."""
        return not (self.A.any() and self.B.any())

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}" + (f", rows={self.rows}" if self.rows else "")

    def _grow(self, in_features: int) -> None:
        # An embedding may get more rows after the patch was made; a zero column of A leaves a new row as it is.
        if in_features > self.A.shape[-1]:
            self.A.data = nn.functional.pad(self.A.data, (0, in_features - self.A.shape[-1]))


def best_factors(D: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``A [r, in]`` and ``B [out, r]`` in fp32 of which ``B A`` is the best approximation of ``D [out, in]``.

    As the singular value decomposition gives it (Eckart, Young), each rank's size shared between the factors; but from
    the eigenvectors of the smaller Gram matrix, at a third of the cost. r is at most the smaller side of D.
    """
    D = D.float()
    if D.shape[0] < D.shape[1]:
        B, A = best_factors(D.T, r)
        return A.T, B.T
    V = torch.linalg.eigh(D.T @ D).eigenvectors[:, -r:].flip(-1)
    U = D @ V
    root = U.norm(dim=0).clamp_min(torch.finfo(U.dtype).tiny).sqrt()
    return (V * root).T, U / root


class TiedLowRank(nn.Module):
    """The other side of a tied embedding: the same update, transposed, on the output head. Owns no parameters."""

    def __init__(self, source: LowRank) -> None:
        super().__init__()
        self.source = (source,)  # in a tuple, so that the factors are registered once, at the embedding

    def forward(self, layer: nn.Module, base: Callable[..., Tensor], x: Tensor) -> Tensor:
        """``base(x) + scale x B A``: hidden ``[..., dim]`` to logits ``[..., vocab]``."""
        (patch,) = self.source
        y = base(x)
        return (y + (x.to(patch.B.dtype) @ patch.B) @ patch.A * patch.scale).to(y.dtype)

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
            the base took away (arXiv 2310.08659), the base as it is packed, for a model that `load` quantized.
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
        for name, plain in (("alpha", float), ("ranks", dict), ("modules_to_save", tuple), ("token_rows", _sorted)):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "alphas", {key: float(alpha) for key, alpha in self.alphas.items()})
        ranks, alphas = [self.r, *self.ranks.values()], [self.alpha, *self.alphas.values()]
        faults = [
            f"{what} is {value!r}, which must be {need}"
            for what, value, good, need in (
                *(("rank", r, isinstance(r, int) and r > 0, "a whole number from 1 up") for r in ranks),
                *(("alpha", alpha, math.isfinite(alpha), "a finite number") for alpha in alphas),
                ("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1"),
                ("scaling", self.scaling, self.scaling in SCALINGS, f"one of {', '.join(SCALINGS)}"),
                ("init", self.init, self.init in INITS, f"one of {', '.join(INITS)}"),
                ("bias", self.bias, self.bias in BIASES, f"one of {', '.join(BIASES)}"),
            )
            if not good
        ]
        if faults:
            raise all_faults("these LoRA settings cannot be used:", faults)

    def rank_of(self, path: str) -> int:
        """The rank at a layer."""
        return _by_pattern(self.ranks, path, self.r)

    def alpha_of(self, path: str) -> float:
        """Alpha at a layer."""
        return _by_pattern(self.alphas, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """What multiplies ``B A`` at a layer."""
        return SCALINGS[self.scaling](self.alpha_of(path), self.rank_of(path))

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Iterator[tuple[str, str, nn.Module]]:
        """Yield ``(path, part, patch)`` for every matrix; raises if a pattern or an option fits nothing."""
        for key in [*self.ranks, *self.alphas]:
            if not any(fits(key, target.key) for target in targets):
                raise all_faults(
                    f"the rank or alpha given for {key!r} fits none of the targets:",
                    [names(target.key for target in targets)],
                )
        reasons = [(target, self._unfit(target)) for target in targets]
        if faults := [f"{target}: {reason}" for target, reason in reasons if reason]:
            raise all_faults("these settings do not fit these targets:", faults)
        tie = _Ends(model)
        if self.tied and not (tie.tied and tie.embedding in [target.path for target in targets]):
            raise all_faults("tied=True needs a tied embedding among the targets:", [tie.say()])
        if self.tied and self.dora:
            raise all_faults("tied=True and dora=True:", ["the two sides of a tied matrix have rows of other norms"])
        whole = self._unpacked(model, targets) if self.init == "loftq" else None
        for target in targets:
            patch = LowRank(target, self.rank_of(target.key), self.scale_of(target.key), self.dropout, self.init)
            if whole is not None and target.storage in weights.PACKED:
                patch.make_up_for(weights.lost(model, whole, target.path))
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
        return weights.unfit(target, self.rank_of(target.key), self.dropout) or (
            dora.unfit(target) if self.dora else None
        )

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

    def _token_rows(self, model: nn.Module, tie: _Ends) -> Iterator[tuple[str, str, nn.Module]]:
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


class _Ends:
    """The paths of a model's input embedding and output head, empty where it has none, and whether they are tied."""

    def __init__(self, model: nn.Module) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        embedding: Any = input_embedding(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self.embedding = paths.get(id(embedding), "")
        self.head = paths.get(id(head), "")
        self.tied = embedding is not None and head is not None and embedding.weight is head.weight
        if head is not None and weights.offloaded(head):  # each of the tied has a placeholder of its own
            self.tied = f"{self.head}.weight" in (getattr(model, "all_tied_weights_keys", None) or ())

    def say(self) -> str:
        return f"{self.embedding} and {self.head} are tied" if self.tied else "this model ties nothing"


def _sorted(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(ids)))


def _storage(layer: nn.Module) -> weights.Storage:
    storage = weights.storage(layer)
    assert storage is not None, type(layer)
    return storage


def fits(key: str, path: str) -> bool:
    """Whether a pattern of ranks or alphas is for a target, as PEFT has it."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _by_pattern(patterns: Mapping, path: str, default):
    return next((value for key, value in patterns.items() if fits(key, path)), default)
