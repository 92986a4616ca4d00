"""`open_thing`: a model, an adapter or a run -> a model that is ready to be used, with the adapter on it."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorica import formats, patch, weights
from lorica.adapter import Adapter
from lorica.doors import place
from lorica.errors import LoricaError
from lorica.models.builtin import BUILTIN
from lorica.models.checkpoint import read_tokenizer
from lorica.models.ggufs import read_gguf_tokenizer
from lorica.models.heads import outputs_of
from lorica.models.loading import base_name, load, locate
from lorica.models.wheels import Progress
from lorica.targets import head_parameters

_ADAPTER = "adapter_config.json"


class Opened(NamedTuple):
    """A thing in use.

    Attributes:
        base: alias, hub id or absolute path of the base model.
        adapter: what is applied to it, unmerged, under the name `default`; None for a plain model.
    """

    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    base: str
    adapter: Adapter | None


@dataclass(frozen=True)
class Description:
    """What a model is, in numbers.

    Attributes:
        name: alias, hub id or absolute path; `title` is what to call it beside results.
        kind: class of the model.
        parameters: of the base; a tied matrix counts once.
        nbytes: memory of these.
        dtype: number format of most of these, or `nf4`, `fp4`, `int8`.
    """

    name: str
    title: str
    kind: str
    parameters: int
    nbytes: int
    dtype: str


def open_thing(
    thing: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str = "auto",
    adapter: str | Path | None = None,
    labels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Opened:
    """Load whatever `thing` is: anything that `load` takes, an adapter (folder or hub id), or a run folder.

    Args:
        thing: a run gives its `best` adapter, else its `last`; an adapter is put on the base model that it names.
        dtype, device, progress: as for `load`.
        quantize: as for `load`, or `auto`: what an adapter was trained on.
        adapter: an adapter or a run to put on `thing`, which is then the base model whatever the adapter names.
        labels: as for `load`. An adapter for sequence classification brings its own; given others, it keeps its updates
            and gets a new head, with a warning (the paper starts RTE from MNLI so).

    Raises:
        LoricaError: as `load`, or an adapter that does not fit or names no base that can be loaded.
    """
    base, folder = (None, adapter_folder(thing)) if str(thing) not in BUILTIN else (str(thing), None)
    if adapter is not None:
        if folder:
            raise LoricaError(f"{thing} is an adapter already: give its base model, or leave {adapter} away")
        base, folder = str(thing), adapter_folder(adapter)
        if folder is None:
            raise LoricaError(f"{adapter} is neither an adapter nor a run: no {_ADAPTER} in it")
    chosen = Adapter.load(folder) if folder else None
    if quantize == "auto":
        quantize = chosen.meta.get("quantize", "none") if chosen else "none"
    own = _labels(chosen) if chosen is not None else []
    # An adapter of a language model has no head at all.
    other_head = bool(chosen is not None and labels and set(labels) != set(own))
    labels = labels if other_head else own or labels
    how: dict[str, Any] = {
        "dtype": dtype, "device": device, "quantize": quantize, "labels": labels, "progress": progress
    }  # fmt: skip
    if chosen is None or folder is None:
        return Opened(*load(thing, **how), base_name(thing), None)
    model, tok = _base(chosen, folder, base, **how)
    _warn_if_other_base(chosen, model, folder)
    if other_head:
        if own:
            warnings.warn(f"{folder} tells {', '.join(own)} apart: its head is replaced by a new one", stacklevel=2)
        new = {name: model.get_parameter(name).detach().float().cpu() for name in head_parameters(model)}
        chosen = dataclasses.replace(chosen, tensors={**chosen.tensors, **new})
    chosen.apply(model)
    if template := chosen.meta.get("chat_template"):
        tok.chat_template = template  # what it was trained through
    return Opened(model, tok, model.config._name_or_path, chosen)


def load_tokenizer(thing: str | Path, *, progress: Progress | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer alone of whatever `open_thing` takes, with the chat template of an adapter's training."""
    template = None
    source = thing
    if str(thing) not in BUILTIN and (folder := adapter_folder(thing, weights=False)):
        adapter = Adapter.load(folder)
        source, template = _base_named(adapter, folder), adapter.meta.get("chat_template")
    path, name = locate(source, progress, weights=False), base_name(source)
    tok = (read_gguf_tokenizer if path.is_file() else read_tokenizer)(path, name)
    tok.name_or_path = name
    if template:
        tok.chat_template = template
    return tok


def describe(model: PreTrainedModel) -> Description:
    """Name, size and format of a model, whatever adapters are on it."""
    parameters = {id(parameter): (name, parameter) for name, parameter in patch.base_parameters(model)}.values()
    sizes: dict[str, int] = {}
    for name, parameter in parameters:
        layer = model.get_submodule(name.rpartition(".")[0])
        word = weights.format_of(parameter)
        sizes[word] = sizes.get(word, 0) + weights.nbytes(layer, parameter)
    name = model.config._name_or_path
    return Description(
        name=name,
        title=BUILTIN[name].title if name in BUILTIN else Path(name).name,
        kind=type(model).__name__,
        parameters=sum(math.prod(weights.shape_of(parameter)) for _, parameter in parameters),
        nbytes=sum(sizes.values()),
        dtype=max(sizes, key=sizes.__getitem__),
    )


def adapter_folder(thing: str | Path, weights: bool = True) -> Path | None:
    """The folder with the adapter that `thing` is or holds; None where it is something else."""
    path = place(thing)
    if path.is_file():
        return path if formats.recognise(path) else None
    folder = path if path.is_dir() else locate(thing, weights=weights)
    for choice in (folder, folder / "best", folder / "last"):
        if (choice / _ADAPTER).is_file():
            return choice
    if (file := formats.find(folder)) != folder:
        return file
    if (folder / "run.toml").is_file():
        raise LoricaError(f"the run {thing} has no adapter yet: neither best/ nor last/ is there")
    return None


def _base(
    adapter: Adapter, folder: Path, base: str | None, **how: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter goes on, loaded as `how` says."""
    named = base or _base_named(adapter, folder)
    try:
        return load(named, **how)
    except LoricaError as error:
        if base:
            raise
        raise LoricaError(f"the base model of the adapter {folder}: {error}") from error


def _labels(adapter: Adapter) -> list[str]:
    """The labels that an adapter for sequence classification tells apart; none for other tasks."""
    if adapter.meta.get("task_type") != "SEQ_CLS":
        return []
    if named := adapter.meta.get("labels"):
        return json.loads(named)
    return [f"LABEL_{place}" for place in range(outputs_of(dict(adapter.tensors)) or 2)]


def _base_named(adapter: Adapter, folder: Path) -> str:
    if named := adapter.meta.get("base_model"):
        return named
    raise LoricaError(f"the adapter {folder} names no base model: give the model, and this as its adapter")


def _warn_if_other_base(adapter: Adapter, model: PreTrainedModel, folder: Path) -> None:
    trained_on = adapter.meta.get("base_fingerprint")
    if trained_on and trained_on != patch.fingerprint(model):
        warnings.warn(
            f"the weights of {model.config._name_or_path} are not those that {folder} was trained on"
            f" ({adapter.meta.get('base_model') or 'unnamed'}): expect other answers",
            stacklevel=3,
        )
