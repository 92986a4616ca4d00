"""Fold an adapter into the weights and put the kept weights back: the paper's "no additional inference latency"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica import weights
from lorica.errors import LoricaError
from lorica.state import State, activate, forget, known, live, place, remove, require, restore_base, set_active


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        layers: merged layers.
        kept_bytes: memory that keeping the replaced weights costs, the price of an exact `unmerge`.
        untied_bytes: size that the model gained because one side of a tied matrix changed.
        max_logit_diff: largest absolute difference of the outputs before and after on the probe; None if not checked.
        same_top: share of positions whose largest output stayed the same.
    """

    layers: int
    kept_bytes: int
    untied_bytes: int = 0
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
    if state.active != name:
        activate(model, state, name)
    probe = check if isinstance(check, dict) else _probe(model) if check else None
    before = _outputs(model, probe)
    size = _bytes(parameter for _, parameter in live(model))
    layers = _fold(model, state, name, keep)
    now = {id(parameter): parameter for _, parameter in live(model)}
    kept = _bytes(parameter for parameter in state.base.values() if id(parameter) not in now) if keep else 0
    set_active(model, state, None)
    state.merged = name
    difference, same_top = _compare(before, _outputs(model, probe))
    if not keep:
        remove(model, state, name)
        forget(model, state)
    return MergeReport(layers, kept, _bytes(now.values()) - size, difference, same_top)


def unmerge(model: nn.Module) -> None:
    """Put the weights that `merge` replaced back, to the bit, and let the adapter act as a patch again."""
    state = require(model)
    if state.merged is None:
        raise LoricaError("no adapter is merged into this model")
    name, state.merged = state.merged, None
    restore_base(model, state)
    activate(model, state, name)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in {id(parameter): parameter for parameter in parameters}.values())


def _fold(model: nn.Module, state: State, name: str, keep: bool) -> int:
    owners: dict[int, list[str]] = {}
    for key, parameter in live(model):
        owners.setdefault(id(parameter), []).append(key)
    by_layer: dict[str, list[Any]] = {}
    for (path, _), patch in state.adapters[name].patches.items():
        by_layer.setdefault(path, []).append(patch)
    folded: dict[str, nn.Parameter] = {}
    for path, patches in by_layer.items():
        layer = model.get_submodule(path)
        storage = weights.storage(layer)
        assert storage is not None
        W = storage.read(layer)
        for patch in patches:
            W = patch.fold(layer, W)
        key, old = f"{path}.weight", layer.weight
        folded[key] = nn.Parameter(storage.as_stored(layer, W), requires_grad=False)
        if keep:
            state.base[key] = old  # type: ignore[assignment]
        place(model, {key: folded[key]})
    for tied in (keys for keys in owners.values() if len(keys) > 1 and any(key in folded for key in keys)):
        if all(key in folded and torch.equal(folded[key], folded[tied[0]]) for key in tied):
            place(model, dict.fromkeys(tied, folded[tied[0]]))
        else:
            _untie(model, state, tied)
    return len(by_layer)


def _untie(model: nn.Module, state: State, tied: list[str]) -> None:
    changes: list[tuple[Any, str, Any]] = []
    if (config := getattr(model, "config", None)) is not None and hasattr(config, "tie_word_embeddings"):
        changes.append((config, "tie_word_embeddings", False))
    if (keys := getattr(model, "all_tied_weights_keys", None)) is not None:
        changes.append((model, "all_tied_weights_keys", {k: v for k, v in keys.items() if k not in tied}))
    for owner, key, value in changes:
        state.config.append((owner, key, getattr(owner, key)))
        setattr(owner, key, value)


def _probe(model: nn.Module) -> dict[str, Tensor] | None:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
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
