"""Adapters of a base whose vocabulary was resized: PEFT saves the whole tables of its embedding and head beside theirs.

Such a table is the base's but for its last rows, which no checkpoint has. On a model that was resized alike it is put
in the place of the model's while the adapter is active; any other table that is not the base's is of another base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lorica.targets import Ends


def tables(model: nn.Module, tensors: Mapping[str, Tensor], patched: Iterable[str]) -> tuple[list[str], list[str]]:
    """The parameters that an adapter's tables replace, and what is wrong with them.

    Args:
        tensors: the adapter's, by name.
        patched: paths of the layers that it has an update of, whose own weight stays the base's.
    """
    ends, chosen, faults = Ends(model), [], []
    places, patched = [path for path in (ends.embedding, ends.head) if path], set(patched)
    if ends.tied and patched & set(places):
        return [], []
    for path in places:
        table = tensors.get(f"{path}.weight", tensors.get(f"{ends.embedding}.weight") if ends.tied else None)
        own = model.get_submodule(path)._parameters.get("weight")
        if table is None or own is None or path in patched or table.shape[1:] != own.shape[1:]:
            continue
        if len(table) != len(own):
            faults.append(
                f"shape    {path}.weight: its vocabulary was resized to {len(table):,} tokens, and this model has"
                f" {len(own):,}: model.resize_token_embeddings({len(table):,}) first"
            )
        elif _grown(own, table):
            chosen.append(f"{path}.weight")
    return chosen, faults


def _grown(own: Tensor, table: Tensor) -> bool:
    """Whether a table differs from the model's own, and only in its second half."""
    same = (own.detach().to("cpu", torch.float32) == table).all(-1)
    return not same.all() and bool(same[: len(same) // 2].all())
