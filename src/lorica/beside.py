"""What an adapter trains beside its low-rank updates (biases, whole modules, token rows), combined without the base.

It is kept as values ``v`` and combines as differences to the base's: ``base + sum of w (v - base)``. Where the weights
add up to 1 the base falls out. Where they do not, what is left is kept as a share of it, so that what is meant is
``value + share * base``; `Adapter.apply` adds it, and so does `settled`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorica.errors import all_faults

if TYPE_CHECKING:
    from lorica.adapter import Adapter

ROWS = "#tokens.rows"  # how the name of trained token rows ends


def kept(adapter: Adapter) -> dict[str, Tensor]:
    """Everything that is no factor of an update, by name."""
    return {key: tensor for key, tensor in adapter.tensors.items() if "#" not in key or key.endswith(ROWS)}


def combined(parts: Sequence[tuple[float, Adapter]], ids: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values of a sum and the shares of the base that belong to them, where there are any.

    Args:
        ids: the token rows of the sum, sorted; those of the parts are among them.
    """
    values: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for _, adapter in parts for key in kept(adapter)):
        value, share = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for weight, adapter in parts:
            if key not in adapter.tensors:
                continue
            if not _trained(adapter, key):
                value, share = adapter.tensors[key].double(), torch.zeros(())
                break
            # The difference to the base is ``own + owed base``.
            own, owed = adapter.tensors[key].double(), adapter.shares.get(key, torch.zeros(())).double() - 1
            if key.endswith(ROWS):
                place = torch.searchsorted(torch.tensor(ids), torch.tensor(_ids(adapter)))
                own, owed = _spread(own, place, len(ids)), _spread(owed.expand(len(place), 1), place, len(ids))
            value, share = value + weight * own, share + weight * owed
        values[key] = value.float()
        share = torch.where(share.abs() < 1e-9, 0.0, share)
        if share.any():
            shares[key] = share.float()
    return values, shares


def settled(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors with the shares of the base added. `base`: the base's parameters by name."""
    tensors, faults = dict(adapter.tensors), []
    for key, share in adapter.shares.items():
        value = base.get(key.replace(ROWS, ".weight"), torch.empty(0)).detach()
        if key.endswith(ROWS) and max(_ids(adapter)) < len(value):
            value = value[_ids(adapter)]
        if value.shape != tensors[key].shape:
            faults.append(f"{key} is {list(tensors[key].shape)}, the model has {list(value.shape)} there")
            continue
        tensors[key] = tensors[key] + share * value.to("cpu", torch.float32)
    if faults:
        raise all_faults("this model is not the base of the adapters:", faults)
    return tensors


def clashes(adapters: Sequence[Adapter]) -> Iterator[str]:
    """Why what the adapters hold beside their updates does not go together."""
    targets = [(target, adapter.method) for adapter in adapters for target in adapter.targets]
    patched = {target.path for target, _ in targets}
    prints = {each for adapter in adapters if (each := adapter.meta.get("base_fingerprint"))}
    for key in dict.fromkeys(key for adapter in adapters for key in kept(adapter)):
        holders = [adapter for adapter in adapters if key in adapter.tensors]
        found = [adapter.tensors[key] for adapter in holders]
        if len({each.shape[1:] if key.endswith(ROWS) else each.shape for each in found}) > 1:
            shapes = " and ".join(str(list(each.shape)) for each in found)
            yield f"{key} is {shapes}: they have not the same base"
        elif not all(_trained(adapter, key) for adapter in holders):
            if any(not torch.equal(each, found[0]) for each in found):
                yield f"{key} is the base's in one and another in another: they have not the same base"
        elif "#" not in key and not key.endswith(".bias") and key.rpartition(".")[0] in patched:
            yield f"{key} is trained whole in one (modules_to_save), and its layer has an update in another"
        elif len(prints) > 1:
            yield f"{key} is trained whole, but on different weights (base_fingerprint): it is no one base's difference"
    if any(method.tied for _, method in targets):
        if any(target.storage == "embedding" and not method.tied for target, method in targets):
            yield "the update of the embedding reaches the output head in one (tied=True) and not in another"
    if {adapter.method.bias for adapter in adapters} == {"none", "lora_only"}:
        with_biases = {target.path for target, method in targets if method.bias != "none"}
        if more := sorted(patched - with_biases):
            yield f"one trains the biases of its targets (bias='lora_only'); another has {more[0]} without one"


def _trained(adapter: Adapter, key: str) -> bool:
    """Whether a value is the adapter's own, and not a copy of the base's, which PEFT adds beside an embedding."""
    method = adapter.method
    if key.endswith(ROWS) or (key.endswith(".bias") and method.bias != "none"):
        return True
    return any(f".{module}." in f".{key}" for module in method.modules_to_save)


def _ids(adapter: Adapter) -> list[int]:
    return sorted(set(adapter.method.token_rows))


def _spread(rows: Tensor, place: Tensor, count: int) -> Tensor:
    """Rows at their places among `count`, the others zero."""
    return rows.new_zeros(count, rows.shape[1]).index_copy(0, place, rows)
