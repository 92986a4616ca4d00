"""A model for the length of a measurement: one that predicts the next token, and in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorica.errors import LoricaError
from lorica.kernels.precision import widened


def require(model: Any) -> None:
    """LoricaError where a model does not continue text, as encoders and encoder-decoders do not."""
    causal = model.can_generate() and not model.config.is_encoder_decoder
    if not causal:
        raise LoricaError(
            f"{type(model).__name__} does not continue text, which this needs; use a decoder, such as smollm2-135m, or"
            " train it to tell labels apart (--task classify) or to predict a score (--task regress)"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode for the length of a block, then each module's own mode again; yields the model's device."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    some = next(model.parameters())
    try:
        with widened(some):
            yield some.device
    finally:
        for module, mode in modes.items():
            module.training = mode
