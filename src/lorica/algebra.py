"""Adapter algebra: sums and multiples of adapters, their truncation, TIES and DARE, and how alike they are.

Where adapters have other ranks, scales or targets, what one has no target for it contributes nothing to. Slices of a
fused layer stay slices unless another adapter has the whole layer. All of it is computed in the core (see `core`).

What is trained beside the updates combines too in sums and multiples (see `beside`); TIES and DARE refuse it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorica import beside, core
from lorica.core import Factors
from lorica.errors import LoricaError, all_faults
from lorica.formats import Contents
from lorica.formats.updates import by_path, method_of, name
from lorica.lowrank import LoRA
from lorica.targets import Target

if TYPE_CHECKING:
    from lorica.adapter import Adapter

MADE_OF = "made_of"  # the key of meta that says which adapters went in: {"expression": ..., "adapters": {name: sha256}}
_KEPT = ("base_model", "base_fingerprint", "task_type", "quantize", "chat_template", "stop_tokens")
_FIRST = ("base_model", "task_type")  # of several, the first's


class _Site(NamedTuple):
    """A matrix, and the update of it by each adapter."""

    target: Target
    terms: list[Factors | None]

    @property
    def there(self) -> list[Factors]:
        return [term for term in self.terms if term is not None]


def combined(parts: Sequence[tuple[float, Adapter]]) -> Contents:
    """The sum of weighted adapters; of each update the rank is the sum of theirs (see `core.stacked`)."""
    if faults := [f"{weight}" for weight, _ in parts if not math.isfinite(weight)]:
        raise all_faults("an adapter can be multiplied by a finite number, not by:", faults)
    weights = [weight for weight, _ in parts]
    groups = []
    for sites in _sites([adapter for _, adapter in parts]):
        scaled = [[_times(w, term) for w, term in zip(weights, site.terms, strict=True) if term] for site in sites]
        scale = max(abs(term.scale) for terms in scaled for term in terms)
        groups.append([(site.target, core.stacked(terms, scale)) for site, terms in zip(sites, scaled, strict=True)])
    return _assembled(parts, groups, _sum([(weight, _text(adapter)) for weight, adapter in parts]))


def truncated(adapter: Adapter, r: int | None = None, energy: float | None = None) -> Contents:
    """The best approximation of every update at a smaller rank.

    Args:
        r: the rank of each; of a convolution in g groups the next multiple of g below, at least g.
        energy: the share of the squared norm to keep, of every matrix by itself, at the smallest rank that does; of
            experts, of a convolution's groups and of the slices of a layer the rank is one. With r too, r is the most.
    """
    asked = [f"{key}={value:.12g}" for key, value in (("r", r), ("energy", energy)) if value is not None]
    if not asked or (r is not None and (r < 1 or r != int(r))) or (energy is not None and not 0 < energy <= 1):
        said = " and ".join(asked) or "none of them"
        raise LoricaError(f"truncate takes a rank r from 1 up, or an energy above 0 and up to 1; it got {said}")
    groups = []
    for sites in _sites([adapter]):
        spectra = [core.spectrum(term) for site in sites for term in site.there]
        limits = [] if r is None else [max(1, int(r) // _groups(sites[0].target))]
        limits += [] if energy is None else [max(spectrum.rank_for(energy) for spectrum in spectra)]
        groups.append([(site.target, each.cut(min(limits))) for site, each in zip(sites, spectra, strict=True)])
    return _assembled([(1.0, adapter)], groups, f"truncate({_text(adapter)}, {', '.join(asked)})")


def ties(adapters: Sequence[Adapter], density: float) -> Contents:
    """TIES (see `core.ties`) of every update, at the rank that the sum would have."""
    _require_thinnable("ties", adapters, density)
    groups = [[(site.target, core.ties(site.there, density).cut()) for site in sites] for sites in _sites(adapters)]
    text = ", ".join(map(_text, adapters))
    return _assembled([(1.0, each) for each in adapters], groups, f"ties({text}, density={density:.12g})")


def dare(adapters: Sequence[Adapter], density: float, seed: int = 0) -> Contents:
    """The sum of the adapters after DARE (see `core.dare`) has dropped and rescaled elements of each."""
    _require_thinnable("dare", adapters, density)

    def thinned(place: int, target: Target, term: Factors) -> Factors:
        drawn = hashlib.sha256(f"{seed} {place} {target}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(drawn) >> 1)
        return core.dare(term, density, generator).cut()

    groups = [
        [
            (target, core.stacked([thinned(i, target, term) for i, term in enumerate(terms) if term]))
            for target, terms in sites
        ]
        for sites in _sites(adapters)
    ]
    text = ", ".join(map(_text, adapters))
    return _assembled([(1.0, each) for each in adapters], groups, f"dare({text}, density={density:.12g}, seed={seed})")


def inner(a: Adapter, b: Adapter) -> float:
    """``<dW_a, dW_b>`` over all matrices; what is trained beside the updates does not count."""
    pairs = [site.terms for sites in _sites([a, b], whole=False) for site in sites]
    return sum(core.inner(one, other) for one, other in pairs if one and other)


def _sites(adapters: Sequence[Adapter], whole: bool = True) -> list[list[_Site]]:
    """Every matrix that some adapter changes; those that have their rank and scale in common (slices) together.

    Raises with every reason for which the adapters do not go together; with `whole`, of what is beside the updates too.
    """
    faults = list(_beyond(adapters))
    faults += beside.clashes(adapters) if whole and not faults else ()
    grouped = [by_path(adapter.targets) for adapter in adapters]
    met = {
        path: _joint([target for each in grouped for target in each.get(path, [])], faults)
        for path in dict.fromkeys(path for each in grouped for path in each)
    }
    if faults:
        raise all_faults("these adapters cannot be combined:", dict.fromkeys(faults))
    found: dict[str, list[_Site]] = {}
    for path, targets in met.items():
        for target in targets:
            terms = [_term(each, target, own.get(path, [])) for each, own in zip(adapters, grouped, strict=True)]
            found.setdefault(target.key, []).append(_Site(target, terms))
    return list(found.values())


def _joint(targets: list[Target], faults: list[str]) -> list[Target]:
    """The matrices in which the targets of one layer meet: its slices where all are such, else all of it."""
    rows = {target.part: target.rows for target in targets}
    if any(rows.values()) and any(not target.rows or target.rows != rows[target.part] for target in targets):
        targets = [dataclasses.replace(target, part=None, rows=None) for target in targets]
    met: dict[str | None, Target] = {}
    for target in targets:
        first = met.setdefault(target.part, target)
        if (first.shape, first.sizes) != (target.shape, target.sizes):
            sides = [f"{list(each.shape)}{f' x {list(each.sizes)}' if each.sizes else ''}" for each in (first, target)]
            faults.append(f"{target} is {sides[0]} in one and {sides[1]} in another: they have not the same base")
        if first.storage == "linear":  # what a file says of a layer that it knows no better
            met[target.part] = dataclasses.replace(first, storage=target.storage)
    return list(met.values())


def _term(adapter: Adapter, target: Target, own: Iterable[Target]) -> Factors | None:
    """An adapter's update of a matrix, from its targets in that layer."""
    terms = []
    for each in own:
        if target.part in (None, each.part):
            A, B = (adapter.tensors[f"{name(each)}.{factor}"] for factor in "AB")
            term = Factors(A, B, adapter.method.scale_of(each.key))
            terms.append(term.placed(each.rows, each.shape[0]) if each.rows and not target.rows else term)
    return core.stacked(terms) if terms else None


def _times(weight: float, term: Factors) -> Factors:
    return Factors(term.A, term.B, weight * term.scale)


def _assembled(
    parts: Sequence[tuple[float, Adapter]], groups: Iterable[Sequence[tuple[Target, Factors]]], text: str
) -> Contents:
    """The adapter of these updates, and of what the parts hold beside theirs."""
    targets: list[Target] = []
    tensors: dict[str, Tensor] = {}
    layers: dict[str, tuple[int, float]] = {}
    for group in groups:
        r = max(factors.rank for _, factors in group)
        for target, factors in group:
            targets.append(target)
            wide = factors.padded(r)
            tensors |= {f"{name(target)}.A": wide.A, f"{name(target)}.B": wide.B}
            layers[target.key] = (r * _groups(target), factors.scale)
    adapters = [adapter for _, adapter in parts]
    methods = [adapter.method for adapter in adapters]
    ids = tuple(sorted({row for method in methods for row in method.token_rows}))
    values, shares = beside.combined(parts, ids)
    method = dataclasses.replace(
        method_of(layers),
        bias=next((kind for kind in ("all", "lora_only") if any(kind == method.bias for method in methods)), "none"),
        modules_to_save=tuple(dict.fromkeys(each for method in methods for each in method.modules_to_save)),
        token_rows=ids,
        tied=any(method.tied for method in methods),
    )
    return Contents(method, tuple(targets), tensors | values, _meta(adapters, text), shares)


def _beyond(adapters: Sequence[Adapter]) -> Iterator[str]:
    """What an adapter holds of which this algebra knows no sum."""
    for adapter in adapters:
        if type(adapter.method) is not LoRA:
            kind = type(adapter.method).__name__
            yield f"{_text(adapter)} is {kind}, which is no sum of a base and low-rank updates"
            continue
        if adapter.method.dora:
            yield f"{_text(adapter)} is DoRA, whose magnitudes make it no sum of low-rank updates: merge it instead"
            continue
        known = {f"{name(target)}.{factor}" for target in adapter.targets for factor in "AB"}
        if more := [
            key for key in adapter.tensors if "#" in key and key not in known and not key.endswith(beside.ROWS)
        ]:
            yield f"{_text(adapter)} holds {len(more)} tensors that are no pair of matrices A and B: {more[0]} ..."


def _require_thinnable(what: str, adapters: Sequence[Adapter], density: float) -> None:
    if not adapters:
        raise LoricaError(f"{what} takes one adapter or more")
    if not 0 < density <= 1:
        raise LoricaError(
            f"{what} takes a density above 0 and up to 1, the share of elements to keep; it got {density}"
        )
    if more := sorted({key for adapter in adapters for key in beside.kept(adapter)}):
        raise LoricaError(
            f"{what} acts on low-rank updates, and {len(more)} parameters are trained beside them ({more[0]} ...):"
            " add such adapters, or train them without"
        )


def _groups(target: Target) -> int:
    """How many of the matrices of a target share its rank."""
    return target.sizes[0] if target.storage == "conv" else 1


def _meta(adapters: Sequence[Adapter], text: str) -> dict[str, str]:
    """What the parts agree on, and what the whole is made of."""
    said = {key: dict.fromkeys(value for adapter in adapters if (value := adapter.meta.get(key))) for key in _KEPT}
    meta = {key: next(iter(values)) for key, values in said.items() if len(values) == 1 or (values and key in _FIRST)}
    prints, named = said["base_fingerprint"], said["base_model"]
    if len(prints) > 1 or (not prints and len(named) > 1):
        warnings.warn(
            "these adapters were trained on different weights, and an update fits those that it was trained on"
            f" ({', '.join(named) or 'their bases are unnamed'}): measure what comes of it",
            stacklevel=4,
        )
    if lost := [key for key in ("chat_template", "stop_tokens") if len(said[key]) > 1]:
        warnings.warn(f"these adapters differ in {' and '.join(lost)}: the result has none", stacklevel=4)
    short = sorted({each for adapter in adapters for each in _target_modules(adapter)})
    made: dict[str, str] = {}
    for adapter in adapters:
        made |= json.loads(adapter.meta.get(MADE_OF, "{}")).get("adapters") or {_text(adapter): adapter.sha256}
    return meta | {"target_modules": json.dumps(short), MADE_OF: json.dumps({"expression": text, "adapters": made})}


def _target_modules(adapter: Adapter) -> list[str]:
    named = json.loads(adapter.meta.get("target_modules", "[]"))
    return named or [target.path for target in adapter.targets if target.storage != "experts"]


def _text(adapter: Adapter) -> str:
    """An adapter in an expression: what it is made of, or the head of its sha256."""
    made = json.loads(adapter.meta.get(MADE_OF, "{}"))
    return made.get("expression") or adapter.sha256[:12]


def _sum(parts: Iterable[tuple[float, str]]) -> str:
    text = ""
    for weight, each in parts:
        several = " + " in each or " - " in each or each.startswith("-")
        factor = "" if abs(weight) == 1 else f"{abs(weight):.12g}*"
        text += f" {'-' if weight < 0 else '+'} {factor}{f'({each})' if several and weight != 1 else each}"
    return text.removeprefix(" + ").replace(" - ", "-", text.startswith(" - "))
