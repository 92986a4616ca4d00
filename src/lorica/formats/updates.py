"""Low-rank updates without a layout: what every format holds in the end, and how two files are compared.

An `Update` is ``scale B A`` of one whole layer. Parts of a fused projection are joined into one update of the summed
rank with a block-diagonal B, since most formats know no slices. Where a format cannot carry the scale, it is folded
into B; where it wants one rank, the others are padded by zeros. Neither changes ``scale B A`` but for rounding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.errors import LoricaError, all_faults
from lorica.formats import Contents
from lorica.lowrank import LoRA
from lorica.patterns import ends, exactly, require_few
from lorica.targets import Target
from lorica.weights import PACKED

# Last names of embeddings: files of other programs do not say which layers take ids.
_EMBEDDINGS = {
    "embed_in", "embed_positions", "embed_tokens", "embedding", "position_embeddings", "shared", "tok_embeddings",
    "token_type_embeddings", "word_embeddings", "wpe", "wte",
}  # fmt: skip
STORED = ("linear", "conv1d", "embedding", *PACKED)  # storages whose update is one pair of matrices
_ROWS = 4096  # of a matrix that are compared at once, so that a large one needs little memory


@dataclass(frozen=True)
class Update:
    """``scale B A`` at one layer: ``A [r, in]`` and ``B [out, r]`` in fp32."""

    A: Tensor
    B: Tensor
    scale: float
    storage: str = "linear"

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    def folded(self) -> Update:
        """The same update at scale 1, rounded once."""
        return dataclasses.replace(self, B=(self.B.double() * self.scale).float(), scale=1.0)

    def padded(self, r: int) -> Update:
        """The same update at rank r, by zeros."""
        more = r - self.rank
        pad = torch.nn.functional.pad
        return dataclasses.replace(self, A=pad(self.A, (0, 0, 0, more)), B=pad(self.B, (0, more)))


@dataclass(frozen=True)
class Difference:
    """How far an update, or a tensor beside them, is from what it was.

    Attributes:
        largest: absolute difference of an element; 0 where the file holds it to the bit.
        size: the largest absolute element.
        mass: the largest element of ``|scale| |B| |A|``, to which a relative rounding of the factors is relative.
    """

    largest: float
    size: float
    mass: float


def updates(contents: Contents, into: str) -> dict[str, Update]:
    """Every update by the path of its layer.

    Args:
        into: the format, as the error calls it.

    Raises:
        LoricaError: the adapter has what the format has no place for; every such thing is named.
    """
    found, rest = joined(contents)
    against = refusals(contents, rest)
    if not found and not against:
        against = ["no low-rank update at all"]
    if against:
        out = "merge it instead (lorica merge X -o DIR), or train it without"
        raise all_faults(f"{into} has no place for what this adapter holds:", [*against, out])
    return found


def refusals(contents: Contents, rest: Mapping[str, Tensor], plain: bool = False) -> list[str]:
    """What beside the factors `rest` of an adapter is, in words; with `plain`, whole parameters are no matter."""
    method = contents.method
    if type(method) is not LoRA:
        return [f"its method is {type(method).__name__}, which is more than a low-rank update"]
    against = []
    rows = sorted(key for key in rest if "#tokens" in key)
    sizes = [key for key in rest if method.dora and key.endswith("#lora.m")]
    other = sorted(key for key in rest if "#" in key and key not in rows and key not in sizes)
    biases = sorted(key for key in rest if key.endswith(".bias") and "#" not in key)
    whole = sorted(key for key in rest if "#" not in key and key not in biases)
    if convolutions := [target.path for target in contents.targets if target.storage == "conv"]:
        against.append(f"{len(convolutions)} convolutions: {convolutions[0]} ...")
    if method.dora:
        against.append("DoRA's magnitudes, which no low-rank update says: merge it (lorica merge X -o DIR)")
    if rows:
        against.append(f"single token rows of {', '.join(key.split('#')[0] for key in rows)} (token_rows)")
    if other:
        against.append(f"{len(other)} tensors that are no pair of matrices A and B: {other[0]} ...")
    if biases and not plain:
        against.append(f"{len(biases)} biases: {biases[0]} ...")
    if whole and not plain:
        against.append(f"{len(whole)} parameters trained whole: {whole[0]} ... (modules_to_save)")
    if method.tied:
        against.append("one update for both sides of a tied matrix (tied=True)")
    return against


def joined(contents: Contents) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """The updates by layer, and the tensors that belong to none: what is beside them, or is no pair of matrices."""
    rest = dict(contents.tensors)
    found: dict[str, Update] = {}
    for path, parts in by_path(contents.targets).items():
        factors = [rest.get(f"{name(target)}.{factor}") for target in parts for factor in "AB"]
        if any(factor is None or factor.ndim != 2 for factor in factors):
            continue
        pairs = [(rest.pop(f"{name(target)}.A"), rest.pop(f"{name(target)}.B")) for target in parts]
        A = torch.cat([a for a, _ in pairs])
        B = pairs[0][1]
        if parts[0].rows:
            B = A.new_zeros(parts[0].shape[0], len(A))
            column = 0
            for target, (_, b) in zip(parts, pairs, strict=True):
                assert target.rows is not None
                B[slice(*target.rows), column : column + b.shape[1]] = b
                column += b.shape[1]
        found[path] = Update(A, B, contents.method.scale_of(path), parts[0].storage)
    return found, rest


def contents_of(found: Mapping[str, Update], meta: Mapping[str, str], dropout: float = 0.0) -> Contents:
    """An adapter of whole layers from its updates."""
    method = method_of({path: (update.rank, update.scale) for path, update in found.items()}, dropout)
    targets = tuple(
        Target(path, update.storage, (update.B.shape[0], update.A.shape[1])) for path, update in found.items()
    )
    tensors = {
        f"{path}#lora.{factor}": getattr(update, factor).contiguous()
        for path, update in found.items()
        for factor in "AB"
    }
    return Contents(method, targets, tensors, dict(meta))


def method_of(layers: Mapping[str, tuple[int, float]], dropout: float = 0.0) -> LoRA:
    """The settings under which each layer, given by path, has its ``(rank, scale)``."""
    if not layers:
        raise LoricaError("there is no low-rank update in it")
    wanted = {path: (r, alpha_for(scale, r)) for path, (r, scale) in layers.items()}
    r, alpha = Counter(wanted.values()).most_common(1)[0][0]
    ranks = {only(path, wanted): each for path, (each, _) in wanted.items() if each != r}
    alphas = {only(path, wanted): each for path, (_, each) in wanted.items() if each != alpha}
    require_few(len(ranks) + len(alphas), len(wanted), "its ranks and scales")
    return LoRA(r=r, alpha=alpha, dropout=dropout, ranks=ranks, alphas=alphas)


def alpha_for(scale: float, r: int) -> float:
    """The alpha of which ``alpha / r`` is `scale`, to the bit where there is one."""
    near = scale * r
    around = (near, float(round(near)), math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in around if alpha / r == scale), near)


def one_alpha(found: Iterable[Update]) -> float | None:
    """The alpha that gives every update its scale as ``alpha / rank`` to the bit; None if there is no such one."""
    each = list(found)
    alpha = alpha_for(each[0].scale, each[0].rank)
    return alpha if all(alpha / update.rank == update.scale for update in each) else None


def one_rank(found: Mapping[str, Update]) -> tuple[dict[str, Update], list[str]]:
    """The same updates at one rank and one scale ``alpha / r``, and what was done to get there."""
    found, notes = dict(found), []
    scales, ranks = {update.scale for update in found.values()}, {update.rank for update in found.values()}
    r = max(ranks)
    if len(scales) > 1 or alpha_for(next(iter(scales)), r) / r not in scales:
        found = {path: update.folded() for path, update in found.items()}
        notes.append(f"folded the scales into B: {', '.join(f'{scale:g}' for scale in sorted(scales))}")
    if len(ranks) > 1:
        found = {path: update.padded(r) for path, update in found.items()}
        notes.append(f"padded ranks {', '.join(map(str, sorted(ranks)))} to {r} by zeros")
    return found, notes


def differences(before: Contents, after: Contents) -> dict[str, Difference]:
    """Of every ``scale B A``, and of every tensor beside them, by name. What is missing from one side is zero there."""
    (was, rest), (now, beside) = joined(before), joined(after)
    found = {path: _difference(was.get(path), now.get(path)) for path in dict.fromkeys([*was, *now])}
    for key in dict.fromkeys([*rest, *beside]):
        a, b = (each.get(key, torch.zeros(1)).double() for each in (rest, beside))
        size = a.abs().max().item()
        found[key] = Difference((a - b).abs().max().item(), size, size)
    return found


def by_path(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """The parts of each layer, in the order of their rows."""
    grouped: dict[str, list[Target]] = {}
    for target in targets:
        grouped.setdefault(target.path, []).append(target)
    return {path: sorted(parts, key=lambda target: target.rows or (0, 0)) for path, parts in grouped.items()}


def name(target: Target) -> str:
    """Under which an adapter keeps a target's factors, without the last letter."""
    return f"{target.path}#{target.part or 'lora'}"


def storage_by_name(path: str) -> str:
    """What a layer most likely is, where only its path is known; putting it on a model settles it."""
    return "embedding" if path.rpartition(".")[2] in _EMBEDDINGS else "linear"


def only(path: str, paths: Iterable[str]) -> str:
    """A pattern that fits this path and no other of them: patterns are regexes, and match from any dot on."""
    plain, escaped = exactly(path), re.escape(path)
    others = [other for other in paths if other != path]
    tried = (plain, f"^{plain}", escaped, f"^{escaped}")
    return next(pattern for pattern in tried if not any(ends(pattern, other) for other in others))


def in_any_order(patterns: Mapping[str, Any], keys: Sequence[str], default: Any) -> dict[str, Any]:
    """Patterns that mean the same when sorted, as PEFT writes them again: where they do not, one for each target."""
    found, ordered = {}, dict(sorted(patterns.items()))
    for key in keys:
        found[key] = next((value for pattern, value in patterns.items() if ends(pattern, key)), default)
    if all(next((v for p, v in ordered.items() if ends(p, key)), default) == found[key] for key in keys):
        return ordered
    return {only(key, keys): value for key, value in found.items() if value != default}


def _difference(was: Update | None, now: Update | None) -> Difference:
    a, b = _trimmed(was), _trimmed(now)
    one = a or b
    if one is None:
        return Difference(0.0, 0.0, 0.0)
    largest = size = mass = 0.0
    for start in range(0, one.B.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        whole = _rows(a, rows) if a else torch.zeros(1, dtype=torch.float64)
        other = _rows(b, rows) if b else torch.zeros(1, dtype=torch.float64)
        largest = max(largest, _largest(whole - other))
        size = max(size, _largest(whole))
        mass = max(mass, _largest(_rows(_absolute(one), rows)))
    return Difference(largest, size, mass)


def _largest(values: Tensor) -> float:
    return math.inf if values.isnan().any() else values.abs().max().item()


def _rows(update: Update, rows: slice) -> Tensor:
    # In fp64 the products are exact, so that a scale of 2^n gives the same whether folded or not.
    return update.scale * (update.B[rows].double() @ update.A.double())


def _absolute(update: Update) -> Update:
    return Update(update.A.abs(), update.B.abs(), abs(update.scale))


def _trimmed(update: Update | None) -> Update | None:
    """Without the ranks that add nothing, so that padding does not change the order of a sum."""
    if update is None:
        return None
    acts = update.A.any(1) & update.B.any(0)
    return dataclasses.replace(update, A=update.A[acts], B=update.B[:, acts]) if acts.any() else None
