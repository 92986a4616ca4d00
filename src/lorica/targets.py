"""Which layers a method touches: presets, names, globs, regexes, layer ranges, exclusions, slices of fused layers.

A specification is a list of items, or one string with commas between them. An item is

    all-linear                 a preset (`PRESETS`)
    q_proj, mlp.down_proj      a name: the layer's path, or the end of it
    model.layers.*.q_proj      a glob over the whole path
    re:.*\\.(q|v)_proj          a regex over the whole path
    q_proj@8-15                only in blocks 8 to 15 (also @8, @8-)
    c_attn[q,v]                only these rows of a fused layer
    experts.down_proj          one of the matrices of a mixture's experts, for all of them
    !lm_head                   leave out what the rest of the item matches

Every item must match something: a target that matches nothing would train nothing, in silence.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from lorica import weights
from lorica.errors import all_faults
from lorica.patterns import ends, fits

PRESETS: dict[str, str] = {
    "all-linear": "every linear layer but the output head (the default); experts kept in one stack are not among them",
    "attention": "every linear layer inside attention",
    "mlp": "every linear layer of the blocks outside attention",
    "qv": "the query and value projections, or those rows of a fused one",
    "experts": "every expert of a mixture, where transformers keeps them in one stack (rank r each)",
    "conv": "every convolution",
    "paper": "the same as qv: what the paper adapts in its main experiments (section 4.2)",
}
CHILD = "lorica"  # the name under which a patched layer holds its patches
FRESH = "_lorica_fresh"  # on a model, the names of its parameters that no checkpoint holds: a new task head

_QUERY_VALUE = {
    "q": {"q_proj", "query", "q_lin", "query_proj", "wq", "q"},
    "v": {"v_proj", "value", "v_lin", "value_proj", "wv", "v"},
}
_HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs", "classification_head", "cls"}
_INTERLEAVED = {"query_key_value"}
_STORED = ("experts", "conv")  # presets that are all layers of one storage


@dataclass(frozen=True)
class Target:
    """One matrix to patch: a layer, or a slice of the output rows of a fused one, or one matrix of all experts.

    `shape` is ``(out, in)`` of the whole layer; `rows` is ``(start, stop)`` of the slice; `part` names the slice, or
    the experts' matrix. `sizes` is what else there is to say of a storage (`weights.Storage.facts`): ``(groups, k...)``
    of a convolution, ``(E,)`` of experts.
    """

    path: str
    storage: str
    shape: tuple[int, int]
    part: str | None = None
    rows: tuple[int, int] | None = None
    sizes: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """What patterns for ranks match: the layer's path, or that of the experts' parameter."""
        return f"{self.path}.{self.part}" if self.part and not self.rows else self.path

    def __str__(self) -> str:
        return f"{self.path}[{self.part}]" if self.rows else self.key


@dataclass(frozen=True)
class _Item:
    text: str
    name: str
    exclude: bool
    parts: tuple[str, ...]
    layers: tuple[int, int | None] | None


def resolve(model: nn.Module, spec: str | Sequence[str | Target]) -> list[Target]:
    """The targets of `model` that `spec` names, in the model's order. Raises one error with every item that fails."""
    items = [_parse(text) for text in split_spec(spec)] if not _resolved(spec) else []
    if not items:
        return list(spec)  # type: ignore[arg-type]
    layers = candidates(model)
    faults: list[str] = []
    if all(item.exclude for item in items):
        faults.append("only exclusions are given; name what to keep, for example all-linear")
    excluded: set[tuple[str, str | None]] = set()
    chosen: dict[tuple[str, str | None], Target] = {}
    for item in sorted(items, key=lambda item: not item.exclude):
        wanted = [(path, parts) for path, parts in _wanted(model, item, layers) if _in_range(path, item.layers)]
        if not wanted:
            faults.append(f"{item.text!r} matches no layer")
        elif item.exclude:
            excluded |= {(path, part) for path, parts in wanted for part in parts or (None,)}
        else:
            for target in _targets(model, item, wanted, layers, excluded, faults):
                chosen.setdefault((target.path, target.part), target)
    for path, part in list(chosen):
        if part is not None and (path, None) in chosen:
            del chosen[path, part]  # the whole layer was asked for too
    if faults:
        raise all_faults("these targets do not fit this model:", [*faults, f"it has: {names(layers)}"])
    if not chosen:
        raise all_faults("no target is left after the exclusions:", [f"this model has: {names(layers)}"])
    order = {path: place for place, path in enumerate(layers)}
    return sorted(chosen.values(), key=lambda target: (order[target.path], target.rows or _place(target.part)))


def split_spec(spec: str | Sequence[Any]) -> list[str]:
    """The items of a specification: commas separate, except inside the brackets of a slice."""
    texts = [spec] if isinstance(spec, str) else [str(item) for item in spec]
    return [item.strip() for text in texts for item in re.split(r",(?![^\[]*\])", text) if item.strip()]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can be patched, by path."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if path and f".{CHILD}." not in path and weights.storage(layer) is not None
    }


def names(layers: Iterable[str]) -> str:
    """The distinct last names of some paths with their counts, for messages: ``q_proj x30, v_proj x30``."""
    counts = Counter(path.rsplit(".", 1)[-1] for path in layers)
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counts.items()) or "no layer at all"


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that is for a target, else `default`."""
    return next((value for key, value in patterns.items() if ends(key, path)), default)


class Ends:
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


def slices(model: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    """The named row ranges of a fused projection ``{part: (start, stop)}``; empty for any other layer."""
    layer, config = model.get_submodule(path), getattr(model, "config", None)
    kind = weights.storage(layer)
    out = kind.shape(layer)[0] if kind and not kind.inside else 0
    name = path.rsplit(".", 1)[-1]
    if name == "gate_up_proj":
        return _ranges(gate=out // 2, up=out // 2)
    if name not in ("c_attn", "qkv_proj", "Wqkv"):
        return {}
    heads = getattr(config, "num_attention_heads", 0)
    kv_heads: int = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", 0) or heads
    if kv_heads == heads:
        return _ranges(q=out // 3, k=out // 3, v=out // 3) if out % 3 == 0 else {}
    head = out // (heads + 2 * kv_heads)
    return _ranges(q=heads * head, k=kv_heads * head, v=kv_heads * head) if out % (heads + 2 * kv_heads) == 0 else {}


def task_head(model: nn.Module) -> list[str]:
    """Paths of what is trained whole in a model for sequence classification, whatever the method.

    All that lies beside the body, as the paper's code has it, and what is new inside (a pooler that the checkpoint
    lacks); nothing of other models.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    body = getattr(model, "base_model_prefix", "")
    beside = [
        name for name, child in model.named_children() if name != body and next(child.parameters(), None) is not None
    ]
    inside = {key.rpartition(".")[0] for key in getattr(model, FRESH, ()) if key.split(".")[0] == body}
    return [*beside, *sorted(inside)]


def head_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters in `task_head`, as the model without adapters has them."""
    heads = tuple(f"{path}." for path in task_head(model))
    names = (name for name, _ in model.named_parameters() if f".{CHILD}." not in f".{name}")
    return [name for name in names if name.startswith(heads)] if heads else []


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that looks ids up; None for a model that reads no ids."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' vision models
        return None


def refusal(model: nn.Module, path: str) -> str | None:
    """Why a layer cannot be patched although it looks like one that can: its forward is never called."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight itself and never calls the layer; a patch would do nothing"
    if isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2"):
        return "nn.TransformerEncoderLayer skips this layer in its fast path; a patch would do nothing in eval mode"
    return weights.refusal(model.get_submodule(path)) or _hidden(model, path)


def _hidden(model: nn.Module, path: str) -> str | None:
    """Why what lies before a layer's forward would hide the patch, or take it away."""
    layer = model.get_submodule(path)
    before = vars(layer)
    inner = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"  # accelerate's hook leads to the former
    if "forward" in before and not own_forward(layer, inner):
        return "its forward was replaced on the instance (by a hook of another library), which would hide the patch"
    for above in ["", *itertools.accumulate(path.split(".")[:-1], "{}.{}".format)]:
        hook = getattr(model.get_submodule(above), "_hf_hook", None)
        if getattr(hook, "offload", False) and getattr(hook, "place_submodules", False):
            return f"accelerate offloads {above or 'the model'} as a whole, and would take the patch for a part of it"
    return None


def own_forward(layer: nn.Module, name: str = "forward") -> bool:
    """Whether what lies on the instance under `name` is only its class's own forward."""
    found = vars(layer).get(name)
    return isinstance(found, MethodType) and found.__self__ is layer and found.__func__ is type(layer).forward


def _resolved(spec: str | Sequence[Any]) -> bool:
    return not isinstance(spec, str) and bool(spec) and all(isinstance(item, Target) for item in spec)


def _parse(text: str) -> _Item:
    exclude = text.startswith("!")
    name = text.removeprefix("!")
    layers: tuple[int, int | None] | None = None
    parts: tuple[str, ...] = ()
    if not name.startswith("re:"):
        if match := re.fullmatch(r"(.+)@(\d+)(-(\d*))?", name):
            name, first = match[1], int(match[2])
            layers = (first, (int(match[4]) if match[4] else None) if match[3] else first)
        if match := re.fullmatch(r"(.+)\[([\w, ]+)\]", name):
            name, parts = match[1], tuple(part.strip() for part in match[2].split(","))
    return _Item(text, name, exclude, parts, layers)


def _wanted(model: nn.Module, item: _Item, layers: dict[str, nn.Module]) -> list[tuple[str, tuple[str, ...]]]:
    if item.name in PRESETS:
        return [(path, item.parts or parts) for path, parts in _preset(model, item.name, layers)]
    named = [(path, path, item.parts) for path in layers]
    for path, layer in layers.items():
        named += [(f"{path}.{part}", path, item.parts or (part,)) for part in _kind(layer).parts(layer)]
    if item.name.startswith("re:"):
        return [(path, parts) for name, path, parts in named if fits(item.name[3:], name)]
    if any(sign in item.name for sign in "*?"):
        return [(path, parts) for name, path, parts in named if fnmatch.fnmatchcase(name, item.name)]
    return [(path, parts) for name, path, parts in named if name == item.name or name.endswith(f".{item.name}")]


def _targets(
    model: nn.Module,
    item: _Item,
    wanted: list[tuple[str, tuple[str, ...]]],
    layers: dict[str, nn.Module],
    excluded: set[tuple[str, str | None]],
    faults: list[str],
) -> Iterator[Target]:
    for path, parts in wanted:
        if (path, None) in excluded:
            continue
        if reason := refusal(model, path):
            faults.append(f"{item.text!r} matches {path}: {reason}; add '!{path}' to leave it out")
            continue
        kind = _kind(layers[path])
        matrices = kind.parts(layers[path])
        if not matrices and not parts and not any(whole == path for whole, _ in excluded):
            yield Target(path, **kind.facts(layers[path]))
            continue
        ranges = dict.fromkeys(matrices) if matrices else slices(model, path)
        if unknown := [part for part in parts if part not in ranges]:
            had = f"it has: {', '.join(ranges)}" if ranges else "its rows are not known, or interleaved"
            faults.append(f"{item.text!r}: {path} has no slice {', '.join(unknown)}; {had}")
            continue
        for part in parts or ranges:
            if (path, part) not in excluded:
                yield Target(path, part=part, rows=ranges[part], **kind.facts(layers[path], part))


def _preset(model: nn.Module, name: str, layers: dict[str, nn.Module]) -> list[tuple[str, tuple[str, ...]]]:
    """What a preset names, as (path, parts); told apart by the words that model code uses for attention and blocks."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [
        path
        for path, layer in layers.items()
        if not (_kind(layer).takes_ids or _kind(layer).name in _STORED)
        and layer is not head
        and not _HEADS & set(path.split("."))
        and not any(f"{path}.".startswith(f"{whole}.") for whole in task_head(model))
    ]
    if name in _STORED:
        return [(path, ()) for path, layer in layers.items() if _kind(layer).name == name]
    if name == "all-linear":
        return [(path, ()) for path in linear]
    attention = [path for path in linear if re.search("attn|attention", path, re.IGNORECASE)]
    if name == "attention":
        return [(path, ()) for path in attention]
    if name == "mlp":
        inside = [path for path in linear if path not in set(attention) and _block(path) is not None]
        return [(path, ()) for path in inside if path.rsplit(".", 1)[-1] not in ("gate", "router")]
    single = [(path, ()) for path in attention if path.rsplit(".", 1)[-1] in _QUERY_VALUE["q"] | _QUERY_VALUE["v"]]
    fused = [path for path in attention if path.rsplit(".", 1)[-1] in _INTERLEAVED or slices(model, path)]
    return [*single, *((path, ("q", "v")) for path in fused)]


def _kind(layer: nn.Module) -> weights.Storage:
    kind = weights.storage(layer)
    assert kind is not None, type(layer)
    return kind


def _place(part: str | None) -> tuple[int, int]:
    """Where an experts' matrix stands among those of its layer."""
    return (weights.EXPERT_MATRICES.index(part), 0) if part in weights.EXPERT_MATRICES else (0, 0)


def _block(path: str) -> int | None:
    """The index of the block a path lies in: its first all-digit segment."""
    return next((int(segment) for segment in path.split(".") if segment.isdigit()), None)


def _in_range(path: str, layers: tuple[int, int | None] | None) -> bool:
    if layers is None:
        return True
    block = _block(path)
    return block is not None and layers[0] <= block and (layers[1] is None or block <= layers[1])


def _ranges(**sizes: int) -> dict[str, tuple[int, int]]:
    ranges, start = {}, 0
    for part, size in sizes.items():
        ranges[part] = (start, start + size)
        start += size
    return ranges
