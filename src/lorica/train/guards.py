"""Law 7: nothing fails in silence. Each guard is an error at the door, or a warning with the count."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from lorica.adapter import Adapter
from lorica.data import Example
from lorica.errors import LoricaError, all_faults
from lorica.train.examples import labels_in

# B is zero at the start, so A's gradient is too in the first update; two more leave room for a batch that misses it.
FIRST_STEPS = 3
NAMED = 20
# What only some tokens reach may have no gradient for long.
_VISITED = re.compile(r"(^|\.)experts?(\.|$)|#tokens\.")


class NotFinite(LoricaError):
    """A loss or gradient that is no number, found before the update of `step`."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: {what}, so the weights were left as after step {step - 1}; "
            "try a lower lr, more warmup, or fp32 or bf16 in place of fp16"
        )
        self.step = step


def finite(step: int, loss: float, norm: float) -> None:
    """Raise `NotFinite` unless both are numbers."""
    if not math.isfinite(loss):
        raise NotFinite(step, f"the loss is {loss}")
    if not math.isfinite(norm):
        raise NotFinite(step, f"the gradient's norm is {norm} (loss {loss:.4g})")


def labelled(examples: Sequence[Example], what: str) -> None:
    """Raise if there are examples with nothing to predict: their mean loss would be 0 / 0."""
    faults = [example.where or f"example {i + 1}" for i, example in enumerate(examples) if not labels_in([example])]
    if faults:
        raise all_faults(
            f"{len(faults):,} of {len(examples):,} {what} examples have no token to predict (all labels are masked):",
            _shortened(faults),
        )


def something(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if there is nothing to train."""
    if not any(parameter.numel() for parameter in parameters.values()):
        raise LoricaError("the active adapter has no parameter to train; check the method and its targets")


class Gradients:
    """Watches that each trained tensor gets a gradient in the first updates."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = dict.fromkeys(name for name in parameters if not _VISITED.search(name))
        self.zero = dict(self.missing)
        self.seen = 0

    def check(self, last: bool) -> None:
        """Look at the gradients of one update; raise, or warn, after the third or the `last`."""
        if self.seen >= FIRST_STEPS:
            return
        self.seen += 1
        for name in list(self.zero):
            gradient = self.parameters[name].grad
            if gradient is not None:
                self.missing.pop(name, None)
                if gradient.any():
                    del self.zero[name]
        if self.missing and (last or self.seen == FIRST_STEPS):
            raise all_faults(
                f"{len(self.missing):,} of {len(self.parameters):,} trained tensors got no gradient in the first"
                f" {self.seen} updates, so they would never change (reentrant checkpointing does this, and so does a"
                " layer that is not used):",
                _shortened(list(self.missing)),
            )
        if self.zero and self.seen == FIRST_STEPS:
            warnings.warn(
                f"{len(self.zero):,} of {len(self.parameters):,} trained tensors had a gradient of zero in the first"
                f" {self.seen} updates: {next(iter(self.zero))} ...",
                stacklevel=2,
            )


def changed(adapter: Adapter, step: int) -> None:
    """Raise if the whole adapter still changes nothing after `step` updates; `Adapter.save` warns of a part."""
    silent = adapter.silent()
    if adapter.targets and len(silent) == len(adapter.targets) and not _selected(adapter):
        raise all_faults(
            f"after {step} updates all {len(silent):,} patches still change nothing (a factor of each is all zero):",
            [*_shortened(silent), "is the learning rate 0, or the gradient?"],
        )


def _selected(adapter: Adapter) -> bool:
    return any("#" not in key for key in adapter.tensors)


def _shortened(faults: Sequence[str]) -> list[str]:
    more = [f"and {len(faults) - NAMED:,} more"] if len(faults) > NAMED else []
    return [*faults[:NAMED], *more]
