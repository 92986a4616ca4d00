"""What a patched model knows of its adapters, and the two ways in which one acts: patches and displaced parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError, nearest
from lorica.targets import CHILD, Target, own_forward


class _ABSENT:
    """Stands for an attribute that is not there; a class, since a copy of it is still itself."""


@dataclass
class Installed:
    """One adapter that lives on a model."""

    method: Any
    targets: list[Target]
    patches: dict[tuple[str, str], nn.Module]
    selected: dict[str, nn.Parameter]

    def tensors(self) -> dict[str, nn.Parameter]:
        """Every tensor of the adapter by its canonical name (see `patch.trainable`)."""
        patched = {
            f"{path}#{part}.{key}": parameter
            for (path, part), patch in self.patches.items()
            for key, parameter in patch.named_parameters()
        }
        first: dict[int, str] = {}  # names of one tied parameter share a copy, which counts once
        for key, parameter in self.selected.items():
            first.setdefault(id(parameter), key)
        return patched | {key: self.selected[key] for key in first.values()}

    def values(self) -> dict[str, Tensor]:
        """What is saved: `tensors`, with the start that a patch holds against itself joined to its factors."""
        found: dict[str, Tensor] = dict(self.tensors())
        for name, patch in self._starting():
            found[f"{name}.A"], found[f"{name}.B"] = patch.factors
        return {key: tensor.detach() for key, tensor in found.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set `tensors` to what `values` was; a held start stays."""
        for key, parameter in self.tensors().items():
            parameter.copy_(values[key][tuple(slice(size) for size in parameter.shape)])

    def held(self) -> dict[str, Tensor]:
        """The starts that patches hold against themselves, by name."""
        return {f"{name}.{key}": getattr(patch, key) for name, patch in self._starting() for key in ("A0", "B0")}

    def _starting(self) -> Iterator[tuple[str, Any]]:
        for (path, part), patch in self.patches.items():
            if getattr(patch, "start", None) is not None:
                yield f"{path}#{part}", patch


@dataclass
class State:
    """What a patched model knows of its adapters; kept on the model as `_lorica`."""

    adapters: dict[str, Installed] = field(default_factory=dict)
    active: str | None = None
    merged: str | None = None
    base: dict[str, nn.Parameter] = field(default_factory=dict)  # the displaced parameters of the base, by name
    trained: dict[str, bool] = field(default_factory=dict)  # requires_grad before the first adapter came
    settings: list[tuple[Any, str, Any]] = field(default_factory=list)  # (owner, attribute, value) that a merge changed


class Patches(nn.ModuleDict):
    """The patches of one layer: adapter name -> part -> patch. `active` names the one that acts, None for the base."""

    active: str | None = None

    def parts_of(self, name: str) -> nn.ModuleDict:
        """An adapter's patches of this layer, made empty where there are none."""
        if name not in self:
            self[name] = nn.ModuleDict()
        return self[name]  # type: ignore[return-value]

    def parts(self) -> Iterator[nn.Module]:
        """The active adapter's patches of this layer, in order."""
        if self.active is not None and self.active in self:
            yield from self.parts_of(self.active).values()


class _Patched:
    """What the run-time subclass adds to a layer's class."""

    def forward(self, *args, **kwargs):
        call = super().forward  # type: ignore[misc]
        for patch in getattr(self, CHILD).parts():
            call = functools.partial(patch, self, call)
        return call(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The subclass cannot be found by its name, so a copy or a pickle is told how to make it again.
        return _blank, (plain_class(self),), self.__dict__


def state_of(model: nn.Module) -> State | None:
    """The record of a model's adapters, or None for a plain model."""
    return getattr(model, "_lorica", None)


def require(model: nn.Module) -> State:
    """The record of a model's adapters; raises if it has none."""
    state = state_of(model)
    if state is None:
        raise LoricaError("this model has no adapter; inject one, or load one with Adapter.load(...).apply(model)")
    return state


def known(state: State, name: str | None) -> str:
    """`name` if it is one of the model's adapters; raises with the ones there are."""
    if name is None:
        raise LoricaError(f"no adapter is active; name one of: {', '.join(state.adapters)}")
    if name not in state.adapters:
        there = ", ".join(state.adapters)
        raise LoricaError(f"no adapter is called {name!r}{nearest(name, state.adapters)}; there are: {there}")
    return name


@functools.cache
def _patched_class(plain: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Patched, plain), names)


def plain_class(layer: Any) -> type[nn.Module]:
    """The class of a patched layer before it was patched."""
    return type(layer).__mro__[2]


def _blank(plain: type[nn.Module]) -> nn.Module:
    patched = _patched_class(plain)  # type: ignore[arg-type]
    return patched.__new__(patched)


def patches_of(layer: nn.Module) -> Patches:
    """A layer's patches; a plain layer becomes a patched one first, with none."""
    if not isinstance(layer, _Patched):
        _become(layer, _patched_class(type(layer)))  # type: ignore[arg-type]
        layer.add_module(CHILD, Patches())
    return getattr(layer, CHILD)


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change a layer's class.

    accelerate's hooks stand before the forward on the instance and keep the one they lead to as `_old_forward`; taken
    off, they leave it as `forward`. Either is led to the new class's.
    """
    for name in ("forward", "_old_forward"):
        if own_forward(layer, name):
            setattr(layer, name, MethodType(kind.forward, layer))
    layer.__class__ = kind


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's own parameters by name, whatever is injected, selected or merged at the moment; tied ones repeat."""
    state = state_of(model)
    for name, parameter in live(model):
        yield name, state.base.get(name, parameter) if state else parameter


def live(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters in the base's places at the moment, displaced or not; tied ones repeat."""
    return _live(model, "")


def _live(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is not None and name != CHILD:  # patches are most of a patched model's modules
            yield from _live(child, f"{prefix}{name}.")


def module_at(model: nn.Module, path: str) -> nn.Module:
    """``model.get_submodule(path)`` in a tenth of its time: a task switch looks up every layer."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def place(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Put parameter objects at their names."""
    for name, parameter in parameters.items():
        path, _, last = name.rpartition(".")
        module_at(model, path)._parameters[last] = parameter


def set_active(model: nn.Module, state: State, name: str | None) -> None:
    """Let the patches of one adapter act, or none."""
    state.active = name
    for path in {path for each in state.adapters.values() for path, _ in each.patches}:
        patches_of(module_at(model, path)).active = name


def restore_base(model: nn.Module, state: State) -> None:
    """Put every displaced parameter of the base back, and the settings that went with it."""
    place(model, state.base)
    state.base = {}
    for owner, key, value in reversed(state.settings):
        _set(owner, key, value)
    state.settings = []


def change(state: State, owner: Any, key: str, value: Any = _ABSENT) -> None:
    """Set an attribute, a layer's `__class__` too, or take it away, until the base is restored."""
    state.settings.append((owner, key, _get(owner, key)))
    _set(owner, key, value)


@contextlib.contextmanager
def base_in_place(model: nn.Module, state: State) -> Iterator[None]:
    """The base's own parameters and settings in their places for the length of a block."""
    ours = {name: model.get_parameter(name) for name in state.base}
    settings = [(owner, key, _get(owner, key)) for owner, key, _ in state.settings]
    place(model, state.base)
    for owner, key, value in state.settings:
        _set(owner, key, value)
    try:
        yield
    finally:
        place(model, ours)
        for owner, key, value in settings:
            _set(owner, key, value)


def _get(owner: Any, key: str) -> Any:
    if key == "__class__":
        return plain_class(owner) if isinstance(owner, _Patched) else type(owner)
    return getattr(owner, key, _ABSENT)


def _set(owner: Any, key: str, value: Any) -> None:
    if key == "__class__":
        _become(owner, _patched_class(value) if isinstance(owner, _Patched) else value)
    elif value is _ABSENT:
        delattr(owner, key)
    else:
        setattr(owner, key, value)


def activate(model: nn.Module, state: State, name: str | None) -> None:
    """Make one adapter, or none, the one that acts and is trained; unmerged."""
    restore_base(model, state)
    set_active(model, state, name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if name is not None:
        displace(model, state, name)


def displace(model: nn.Module, state: State, name: str) -> None:
    """Put what an adapter trains whole in the base's places, and let its tensors be trained."""
    for key, parameter in state.adapters[name].selected.items():
        state.base[key] = model.get_parameter(key)
        parameter.data = parameter.data.to(state.base[key].device)
        place(model, {key: parameter})
    for parameter in state.adapters[name].tensors().values():
        parameter.requires_grad_(True)


def remove(model: nn.Module, state: State, name: str) -> None:
    """Take an inactive adapter's patches off; layers without any left get their class back."""
    for path in {path for path, _ in state.adapters.pop(name).patches}:
        layer = model.get_submodule(path)
        patches = patches_of(layer)
        del patches[name]
        if not len(patches):
            delattr(layer, CHILD)
            _become(layer, plain_class(layer))
    hide_from_save_pretrained(model)


def forget(model: nn.Module, state: State) -> None:
    """Make a model without adapters a plain one."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.trained.get(name, True))
    del model._lorica


def hide_from_save_pretrained(model: nn.Module) -> None:
    """Keep the patches out of the folders that transformers writes."""
    # transformers writes the whole state dict; a folder with patch tensors in it would not load as the model it is.
    if hasattr(model, "_keys_to_ignore_on_save"):
        others = {key for key in model._keys_to_ignore_on_save or () if f".{CHILD}." not in f".{key}"}  # type: ignore[union-attr]
        ours = {key for key, _ in model.named_parameters(remove_duplicate=False) if f".{CHILD}." in f".{key}"}
        model._keys_to_ignore_on_save = others | ours  # type: ignore[assignment]
