"""What a model with a head for sequence classification says of rows: its outputs, and each row's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.data.sequences import LabelledExample, collate_labelled
from lorica.errors import LoricaError
from lorica.evaluate.causal import evaluating
from lorica.evaluate.loss import in_batches
from lorica.insertion import edited


def row_losses(outputs: Tensor, targets: Tensor, smooth: float = 0.0) -> Tensor:
    """Each row's loss ``[rows]`` from outputs ``[rows, labels]`` and targets ``[rows]``.

    Cross-entropy in nats, with label smoothing; the squared error where there is one output.
    """
    if outputs.shape[-1] == 1:
        return (outputs.float().squeeze(-1) - targets.float()).square()
    return F.cross_entropy(outputs.float(), targets.long(), reduction="none", label_smoothing=smooth)


def outputs_of(model: Any, examples: Sequence[LabelledExample], pad_id: int, inner: Any = None) -> Tensor:
    """The outputs ``[rows, labels]`` of one padded pass; `inner` is the model inside a wrapped one."""
    device = (inner or model).get_input_embeddings().weight.device
    batch = collate_labelled(examples, pad_id)
    takes = inspect.signature((inner or model).forward).parameters
    return model(**{key: value.to(device) for key, value in batch.items() if key in takes}).logits


@torch.no_grad()
def judge(
    model: nn.Module,
    examples: Sequence[LabelledExample],
    *,
    batch_tokens: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The outputs ``[rows, labels]`` for all examples in their order, fp32 on the CPU.

    Each is read as the active adapter is to read it (`lorica.insertion`).

    Args:
        batch_tokens: tokens of a forward pass, padding included.
        progress: called with rows done and rows in all.
    """
    if not examples:
        raise LoricaError("there are no rows to judge")
    examples = [read for (read,) in edited(model, examples)]
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    done = 0
    with evaluating(model):
        for places in in_batches([len(example.ids) for example in examples], batch_tokens):
            pad = model.config.get_text_config().pad_token_id  # type: ignore[union-attr, operator]
            said = outputs_of(model, [examples[i] for i in places], pad or 0).float().cpu()
            for place, row in zip(places, said, strict=True):
                found[place] = row
            done += len(places)
            if progress:
                progress(done, len(examples))
    return torch.stack(found)
