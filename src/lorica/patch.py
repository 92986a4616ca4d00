"""Put patches on a model and take them off: inject, eject, merge, unmerge, select, disabled, trainable, count.

A patched layer stays itself. It gets a run-time subclass of its own class, with the same name, whose forward calls

    patch(layer, base_forward, *args)

and its patches become its child `lorica`. Nothing else moves: parameter names, tying, `save_pretrained`,
`resize_token_embeddings` and direct reads of `.weight` see the model they know.

What cannot be a patch is a displacement: another `Parameter` put in the place of the base's, which is kept aside.
Trained biases and whole modules are displaced while their adapter is active, merged weights while it is merged, and
undoing either puts the kept object back, so nothing is ever computed back to where it was (law 2).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from lorica import weights
from lorica.errors import LoricaError, all_faults
from lorica.merging import MergeReport, merge, remerge, unmerge
from lorica.state import (
    Installed,
    State,
    activate,
    base_in_place,
    base_parameters,
    forget,
    hide_from_save_pretrained,
    known,
    patches_of,
    remove,
    require,
    set_active,
    state_of,
)
from lorica.targets import FRESH, Target, resolve

__all__ = [
    "Count",
    "MergeReport",
    "Method",
    "active",
    "adapters",
    "base_parameters",
    "count",
    "disabled",
    "eject",
    "fingerprint",
    "inject",
    "installed",
    "merge",
    "packing",
    "select",
    "trainable",
    "unmerge",
]


class Method(Protocol):
    """A recipe: what it puts beside the layers, and which of the model's own parameters it trains.

    Its settings are a frozen dataclass; `lorica.methods` lists the recipes that there are.
    """

    name: ClassVar[str]
    takes_targets: ClassVar[bool]  # whether it touches what targets name, or finds its places itself

    @property
    def unmergeable(self) -> str:
        """Why it cannot be folded into the weights; empty where it can."""

    def patches(self, model: nn.Module, targets: Sequence[Target]) -> Iterable[tuple[str, str, nn.Module]]:
        """``(path, part, patch)``: several parts at one layer act one after the other."""

    def selects(self, model: nn.Module, targets: Sequence[Target]) -> Iterable[str]:
        """Names of parameters."""

    def silent(self, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[str]:
        """The places where an adapter of this method, with these tensors, still changes nothing."""


@dataclass(frozen=True)
class Count:
    """Parameters: `trainable` of the active adapter, `total` of the base with tied ones counted once."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """``trainable / total``."""
        return self.trainable / self.total


def inject(
    model: nn.Module,
    method: Method,
    targets: str | Sequence[str | Target] = "all-linear",
    name: str = "default",
    also: Iterable[str] = (),
) -> list[str]:
    """Put a method's patches on a model under an adapter name, make it the active one and freeze all else.

    `also` names parameters that are trained whole beside what the method selects, such as a new head's.

    Returns the targets patched, in the model's order, or the layers that a method patches by itself. Raises with every
    target that does not fit; the model is then untouched. The model's train or eval mode stays.
    """
    state = state_of(model) or State()
    if name in state.adapters:
        raise LoricaError(f"this model already has an adapter {name!r}; eject it first, or give another name")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise LoricaError(f"an adapter cannot be called {name!r}: use letters, digits, _ and -, and no method's name")
    if state.merged:
        raise LoricaError(f"adapter {state.merged!r} is merged; unmerge it before another is injected")
    weights.keep_packing(model)
    if not method.takes_targets and targets not in ("all-linear", []):
        raise LoricaError(f"{method.name} finds its places itself and takes no targets, but {targets!r} is given")
    chosen = resolve(model, targets) if method.takes_targets else []
    made = list(method.patches(model, chosen))
    selected = _copies(model, dict.fromkeys([*method.selects(model, chosen), *also]))
    if not made and not selected:
        raise LoricaError(f"{method.name} selects nothing on this model, so there would be nothing to train")
    if not state.adapters:
        state.trained = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        model._lorica = state  # type: ignore[assignment]
    patches: dict[tuple[str, str], nn.Module] = {}
    for path, part, patch in made:
        layer = model.get_submodule(path)
        patches[path, part] = patch.to(weights.device(layer)).train(layer.training)
        patches_of(layer).parts_of(name)[part] = patch
    state.adapters[name] = Installed(method, chosen, patches, selected)
    hide_from_save_pretrained(model)
    select(model, name)
    return [str(target) for target in chosen] or list(dict.fromkeys(path for path, _ in patches))


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take an adapter (default: all of them) off; without any, the model is the base again, to the bit."""
    state = require(model)
    for each in [known(state, name)] if name else list(state.adapters):
        if each in (state.active, state.merged):
            select(model, None)
        remove(model, state, each)
    if not state.adapters:
        forget(model, state)


def select(model: nn.Module, name: str | None) -> None:
    """Make an adapter the active one, or none.

    On a merged model the new one is merged in the old one's place, and into its memory: clone weights that you keep.
    """
    state = require(model)
    if name is not None:
        known(state, name)
    if state.merged is not None and name is not None:
        remerge(model, state, name)
    else:
        state.merged = None
        activate(model, state, name)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model for the length of a block, merged or not."""
    state = require(model)
    name = state.active
    with base_in_place(model, state):
        set_active(model, state, None)
        try:
            yield
        finally:
            set_active(model, state, name)


def adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that live on a model."""
    state = state_of(model)
    return list(state.adapters) if state else []


def active(model: nn.Module) -> str | None:
    """The active adapter's name, merged or not; None for the base."""
    state = state_of(model)
    return (state.merged or state.active) if state else None


def trainable(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """An adapter's own tensors by canonical name, in a stable order.

    A patch's is ``<layer path>#<part>.<tensor>`` (``model.layers.0.self_attn.q_proj#lora.A``), a selected parameter's
    its name in the model.
    """
    return installed(model, name).tensors()


def count(model: nn.Module, name: str | None = None) -> Count:
    """How many parameters an adapter trains, and how many the base has."""
    return Count(
        sum(parameter.numel() for parameter in trainable(model, name).values()),
        sum(
            math.prod(weights.shape_of(parameter))
            for parameter in {id(p): p for _, p in base_parameters(model)}.values()
        ),
    )


def installed(model: nn.Module, name: str | None = None) -> Installed:
    """The record of an adapter: its method, targets, patches and selected parameters."""
    state = require(model)
    return state.adapters[known(state, name or state.merged or state.active)]


def fingerprint(model: nn.Module) -> str:
    """`weights.fingerprint` of the base under whatever is on it, a new head aside: that is part of no checkpoint."""
    fresh = getattr(model, FRESH, ())
    return weights.fingerprint(
        (name, model.get_submodule(name.rpartition(".")[0]), parameter)
        for name, parameter in base_parameters(model)
        if name not in fresh
    )


def packing(model: nn.Module) -> str:
    """How the base's linear layers are packed, merged or not: `nf4`, `fp4` or `int8`; empty for an ordinary model."""
    formats = (weights.format_of(parameter) for _, parameter in base_parameters(model))
    return next((found for found in formats if found in weights.PACKED), "")


def _copies(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """A trainable copy for each name; names that are one tied parameter share theirs."""
    base, names = dict(base_parameters(model)), list(names)
    away = {name for name in names if weights.offloaded(model.get_submodule(name.rpartition(".")[0]))}
    faults = [
        f"{name} is {'offloaded' if name in away else 'packed as ' + weights.format_of(base[name])}"
        for name in names
        if name in away or not base[name].is_floating_point()
    ]
    if faults:
        raise all_faults("these parameters cannot be trained whole, only the layers patched:", faults)
    copies = {id(base[name]): nn.Parameter(base[name].detach().clone()) for name in names}
    return {name: copies[id(base[name])] for name in names}
