"""What a classifier or a regressor made of labelled rows: losses, answers, probabilities, measures with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.data.sequences import LabelledExample
from lorica.evaluate.agreement import agreement, intervals
from lorica.evaluate.judging import row_losses
from lorica.evaluate.metrics import ClassRow, bootstrap, per_class


@dataclass(frozen=True)
class Verdicts:
    """The outputs ``[rows, labels]`` for some examples, beside what is right.

    `labels` are the names, one alone for a number.
    """

    name: str
    labels: tuple[str, ...]
    outputs: Tensor
    targets: Tensor
    asked: list[str]
    notes: list[str]

    @classmethod
    def of(
        cls,
        examples: Sequence[LabelledExample],
        outputs: Tensor,
        labels: Sequence[str],
        name: str = "",
        notes: Sequence[str] = (),
    ) -> Verdicts:
        """Beside the examples' targets."""
        targets = torch.tensor([example.target for example in examples], dtype=torch.float64)
        asked = [example.where or str(place) for place, example in enumerate(examples, 1)]
        return cls(name, tuple(labels), outputs, targets, asked, list(notes))

    @property
    def kind(self) -> str:
        """`classify` or `regress`."""
        return "regress" if len(self.labels) == 1 else "classify"

    @property
    def losses(self) -> list[float]:
        """Each row's loss."""
        return row_losses(self.outputs.double(), self.targets).tolist()

    @property
    def loss(self) -> float:
        """Their mean."""
        return math.fsum(self.losses) / len(self.targets)

    @property
    def said(self) -> list[float]:
        """Places of the likeliest labels, or the numbers."""
        return (self.outputs.argmax(-1) if self.kind == "classify" else self.outputs[:, 0]).tolist()

    @property
    def answers(self) -> list[str]:
        """What was said, in words."""
        return [self._word(value) for value in self.said]

    @property
    def references(self) -> list[str]:
        """What is right, in words."""
        return [self._word(value) for value in self.targets.tolist()]

    @property
    def measures(self) -> tuple[str, ...]:
        """What is measured beside the loss."""
        return tuple(self.measured())

    def measured(self) -> dict[str, float]:
        """See `agreement`."""
        return agreement(len(self.labels), self.targets.tolist(), self.said)

    def summary(self) -> dict[str, Any]:
        """Loss and measures with their 95 % intervals, as plain values."""
        low, high = bootstrap(self.losses)
        found: dict[str, Any] = {"name": self.name, "loss": self.loss, "loss_low": low, "loss_high": high}
        bounds = intervals(len(self.labels), self.targets.tolist(), self.said)
        found |= {key: value for name, value in self.measured().items() for key, value in _named(name, value, bounds)}
        return found | {"rows": len(self.targets)}

    def compared(self, other: Verdicts) -> dict[str, float]:
        """How much larger each measure is than another's on the same rows, with paired intervals."""
        mine, its = self.measured(), other.measured()
        bounds = intervals(len(self.labels), self.targets.tolist(), self.said, other.said)
        return {key: value for name in mine for key, value in _named(name, mine[name] - its[name], bounds)}

    @property
    def nats(self) -> dict[str, tuple[float, int]]:
        """Each row's loss, by its place."""
        return {str(place): (loss, 1) for place, loss in enumerate(self.losses)}

    def classes(self) -> list[ClassRow] | None:
        """Precision, recall and F1 of each label; None for numbers."""
        return per_class(self.answers, self.references) if self.kind == "classify" else None

    def told(self, place: int) -> dict[str, Any]:
        """What was said of one row: `{"label": ..., "probabilities": {...}}`, or `{"score": ...}`."""
        return told(self.outputs[place], self.labels)

    def _word(self, value: float) -> str:
        return self.labels[int(value)] if self.kind == "classify" else f"{value:.4g}"


def told(outputs: Tensor, labels: Sequence[str]) -> dict[str, Any]:
    """One row's outputs ``[labels]`` as its label with all probabilities, or as its score."""
    if len(labels) == 1:
        return {"score": round(outputs.item(), 6)}
    shares: Mapping[str, float] = dict(zip(labels, (round(p, 6) for p in outputs.softmax(-1).tolist()), strict=True))
    return {"label": labels[int(outputs.argmax())], "probabilities": shares}


def _named(name: str, value: float, bounds: Mapping[str, tuple[float, float]]) -> list[tuple[str, float]]:
    return [(name, value), (f"{name}_low", bounds[name][0]), (f"{name}_high", bounds[name][1])]
