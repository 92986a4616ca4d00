"""The head only where something is predicted: logits of the positions whose next token is a label, and no others.

The head of a small model costs as much as a third of its blocks, and completions are a quarter of the tokens.
transformers' causal models take `logits_to_keep`, an index of positions, and their loss takes labels that are already
shifted; together they give the loss of the full logits from a part of them, inside the model's own forward.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

IGNORED = -100


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward computes logits at chosen positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def positions(labels: Tensor) -> Tensor:
    """Positions, over all rows, whose next token is a label: ``labels [rows, length]`` to ``[n]``; never empty."""
    found = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def narrowed(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The model inputs of a batch (`labels [rows, length]` among them) with the head at labelled positions only."""
    labels = batch["labels"]
    kept = positions(labels)
    return {**batch, "logits_to_keep": kept, "shift_labels": labels[:, kept + 1].contiguous()}
