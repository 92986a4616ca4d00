"""Fold an adapter into the weights and put the kept weights back: the paper's "no additional inference latency"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica import weights
from lorica.errors import LoricaError, all_faults
from lorica.kernels.folding import Sums
from lorica.lowrank import LowRank
from lorica.state import (
    State,
    activate,
    change,
    displace,
    forget,
    known,
    live,
    module_at,
    place,
    remove,
    require,
    restore_base,
    set_active,
)
from lorica.targets import input_embedding


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: merged layers, those whose own parameters were trained among them.
        kept_bytes: memory that keeping the replaced weights costs, the price of an exact `unmerge`.
        untied_bytes: size that the model gained because one side of a tied matrix changed.
        unpacked: layers that were packed (nf4, int8) and are ordinary ones now, in the number format of the rest.
        max_logit_diff: largest absolute difference of the outputs before and after on the probe; None if not checked.
        same_top: share of positions whose largest output stayed the same.
    """

    layers: int
    kept_bytes: int
    untied_bytes: int = 0
    unpacked: int = 0
    max_logit_diff: float | None = None
    same_top: float | None = None


def merge(
    model: nn.Module, name: str | None = None, *, keep: bool = True, check: bool | dict[str, Tensor] = True
) -> MergeReport:
    """Fold an adapter (default: the active one) into the weights: ``W + (alpha / r) B A`` in fp32, rounded once.

    Args:
        keep: hold on to the replaced weights, so that `unmerge` gives them back to the bit. Without it the adapter is
            dissolved: the model is a plain one afterwards and remembers nothing.
        check: compare outputs before and after on a few random sequences, or on the model inputs given here.
    """
    state = require(model)
    if state.merged:
        raise LoricaError(f"adapter {state.merged!r} is merged already; unmerge it, or select another")
    name = known(state, name or state.active)
    if not keep and len(state.adapters) > 1:
        raise LoricaError("merge(keep=False) changes the base for good; eject the other adapters first")
    _refuse_unmergeable(model, state, name)
    if state.active != name:
        activate(model, state, name)
    probe = check if isinstance(check, dict) else _probe(model) if check else None
    before = _outputs(model, probe)
    placed = list(live(model))
    size = _bytes(placed)
    unpacked, grown = _fold(model, state, name, keep, placed, {})
    placed = list(live(model))
    now = {id(parameter) for _, parameter in placed}
    kept = {id(old): (model.get_submodule(key.rpartition(".")[0]), old) for key, old in state.base.items()}
    kept_bytes = sum(weights.nbytes(*each) for key, each in kept.items() if keep and key not in now)
    untied = _bytes(placed) - size - grown
    set_active(model, state, None)
    state.merged = name
    difference, same_top = _compare(before, _outputs(model, probe))
    own = state.adapters[name]
    layers = len({path for path, _ in own.patches} | {key.rpartition(".")[0] for key in own.selected})
    if not keep:
        remove(model, state, name)
        forget(model, state)
    return MergeReport(layers, kept_bytes, untied, len(unpacked), difference, same_top)


def unmerge(model: nn.Module) -> None:
    """Put the weights that `merge` replaced back, to the bit, and let the adapter act as a patch again."""
    state = require(model)
    if state.merged is None:
        raise LoricaError("no adapter is merged into this model")
    name, state.merged = state.merged, None
    restore_base(model, state)
    activate(model, state, name)


def remerge(model: nn.Module, state: State, name: str) -> None:
    """Merge another adapter in the place of the one that is merged, and into its memory.

    New memory for every weight would take longer than the sums.
    """
    assert state.merged is not None
    _refuse_unmergeable(model, state, name)
    placed = dict(live(model))
    spare = _spare(placed, state)
    for parameter in state.adapters[state.merged].tensors().values():
        parameter.requires_grad_(False)
    placed |= state.base
    state.merged = None
    restore_base(model, state)
    try:
        displace(model, state, name)
        _fold(model, state, name, True, list((placed | state.adapters[name].selected).items()), spare)
    except BaseException:
        activate(model, state, name)
        raise
    state.merged = name


def _spare(placed: dict[str, nn.Parameter], state: State) -> dict[str, Tensor]:
    """The merged weights by name; none whose memory somebody else uses too."""
    there = {key: parameter.detach() for key, parameter in placed.items()}
    users = Counter(tensor.data_ptr() for tensor in [*there.values(), *state.base.values()])
    for each in state.adapters.values():
        users.update(parameter.data_ptr() for parameter in each.selected.values())
    return {key: there[key] for key in state.base if users[there[key].data_ptr()] == 1}


def _refuse_unmergeable(model: nn.Module, state: State, name: str) -> None:
    method = state.adapters[name].method
    if method.unmergeable:
        raise LoricaError(f"{method.name} cannot be merged, since {method.unmergeable}; the adapter works unmerged")
    layers = {path: module_at(model, path) for path, _ in state.adapters[name].patches}
    reasons = {path: weights.unmergeable(layer) for path, layer in layers.items()}
    if faults := [f"{path}: {reason}" for path, reason in reasons.items() if reason]:
        raise all_faults("these layers cannot be merged (the adapter works unmerged):", faults)
    if away := {path for path, layer in layers.items() if weights.offloaded(layer)}:
        raise LoricaError(
            f"{len(away)} of the patched layers are offloaded ({min(away)}, ...), where a merged weight cannot be put:"
            " save the adapter, load the model on one device (device='cpu' will do), apply and merge it there"
        )


def _bytes(parameters: Iterable[tuple[str, Tensor]]) -> int:
    return sum(parameter.nbytes for parameter in {id(parameter): parameter for _, parameter in parameters}.values())


def _fold(
    model: nn.Module,
    state: State,
    name: str,
    keep: bool,
    placed: list[tuple[str, nn.Parameter]],
    spare: dict[str, Tensor],
) -> tuple[list[str], int]:
    """Put merged weights in the places of the base's, `placed`. A packed model becomes an ordinary one, all of it.

    Args:
        spare: tensors that may become the merged weights of these names.

    Returns the layers that were packed, and the bytes that they have gained.
    """
    owners: dict[int, list[str]] = {}
    for key, parameter in placed:
        owners.setdefault(id(parameter), []).append(key)
    layers: dict[str, tuple[nn.Module, weights.Storage]] = {}
    by_matrix: dict[tuple[str, str], list[Any]] = {}
    for (path, part), patch in state.adapters[name].patches.items():
        layer = module_at(model, path)
        layers[path] = layer, weights.storage_of(layer)
        by_matrix.setdefault((path, layers[path][1].parameter(part)), []).append(patch)
    may_be = dict.fromkeys(key.rpartition(".")[0] for key, each in placed if weights.format_of(each) in weights.PACKED)
    packed = [path for path in may_be if (kind := weights.storage(module_at(model, path))) and kind.packed]
    layers |= {path: (layer := module_at(model, path), weights.storage_of(layer)) for path in packed}
    folded: dict[str, nn.Parameter] = {}
    grown, sums = 0, Sums()
    for path, own in dict.fromkeys([*by_matrix, *((path, "weight") for path in packed)]):
        layer, storage = layers[path]
        key, old = f"{path}.{own}", layer._parameters[own]
        assert old is not None
        new = _summed(sums, storage, old, by_matrix.get((path, own), []), spare.get(key))
        if new is None:
            W = storage.read(layer, own)
            for patch in by_matrix.get((path, own), ()):
                W = patch.fold(layer, W)
            new = storage.as_stored(layer, W, _dtype(model) if storage.packed else None, own)
        folded[key] = nn.Parameter(new, requires_grad=False)
        if keep:
            state.base[key] = old
        layer._parameters[own] = folded[key]
        if storage.packed:
            _unpack(state, layer, keep)
            grown += new.nbytes - old.nbytes
    if packed:
        _forget_quantizer(model, state)
    for tied in (keys for keys in owners.values() if len(keys) > 1 and any(key in folded for key in keys)):
        if all(key in folded and torch.equal(folded[key], folded[tied[0]]) for key in tied):
            place(model, dict.fromkeys(tied, folded[tied[0]]))
        else:
            _untie(model, state, tied)
    return packed, grown


def _summed(
    sums: Sums, storage: weights.Storage, weight: nn.Parameter, patches: list[Any], spare: Tensor | None
) -> Tensor | None:
    """The merged weight, in `spare` if that fits; None where it takes more than one sum of two matrices."""
    W = weight.detach()
    if storage.name != "linear" or type(W) is not Tensor or [type(patch) for patch in patches] != [LowRank]:
        return None
    patch: LowRank = patches[0]
    if patch.m is not None or patch.rows:
        return None
    A, B = (factor.detach() for factor in patch.factors)
    wanted = (W.shape, W.dtype, W.device, True)
    if spare is None or (spare.shape, spare.dtype, spare.device, spare.is_contiguous()) != wanted:
        spare = torch.empty_like(W, memory_format=torch.contiguous_format)
    return sums.into(spare, W, A, B, patch.scale)


def _dtype(model: nn.Module) -> torch.dtype:
    """The number format that a model computes in: of the first of its parameters that is not packed."""
    found = (parameter.dtype for _, parameter in live(model) if parameter.is_floating_point())
    return next(found, torch.bfloat16)


def _unpack(state: State, layer: nn.Module, keep: bool) -> None:
    """Make a packed layer one whose weight is 16-bit; `place` gives it the weight."""
    for key, value in weights.plain(layer).items():
        change(state, layer, key, value)
    for leftover in () if keep else weights.PACKING:
        vars(layer).pop(leftover, None)


def _forget_quantizer(model: nn.Module, state: State) -> None:
    """Let transformers treat the model as one that was never quantized, and save it so."""
    config = getattr(model, "config", None)
    for owner, key in (
        (config, "quantization_config"),
        *((model, key) for key in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")),
    ):
        if hasattr(owner, key):
            change(state, owner, key)


def _untie(model: nn.Module, state: State, tied: list[str]) -> None:
    if (config := getattr(model, "config", None)) is not None and hasattr(config, "tie_word_embeddings"):
        change(state, config, "tie_word_embeddings", False)
    if (keys := getattr(model, "all_tied_weights_keys", None)) is not None:
        change(state, model, "all_tied_weights_keys", {k: v for k, v in keys.items() if k not in tied})


def _probe(model: nn.Module) -> dict[str, Tensor] | None:
    embedding = input_embedding(model)
    if not isinstance(embedding, nn.Embedding) or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, (10, 16), generator=generator).to(embedding.weight.device)
    both = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids, "decoder_input_ids": ids} if both else {"input_ids": ids}


def _outputs(model: nn.Module, probe: dict[str, Tensor] | None) -> Tensor | None:
    if probe is None:
        return None
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        outputs = model.eval()(**probe)
    for module, mode in modes.items():
        module.training = mode
    return next(value for value in outputs.values() if isinstance(value, Tensor)).float()


def _compare(before: Tensor | None, after: Tensor | None) -> tuple[float | None, float | None]:
    if before is None or after is None:
        return None, None
    same_top = (before.argmax(-1) == after.argmax(-1)).float().mean()
    return (before - after).abs().max().item(), same_top.item()
