"""Counts and means with their 95 % intervals, and a table per answer where there are few."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorica.errors import LoricaError

Z = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of `n` trials (Wilson 1927); sound near 0 and 1, where the usual one is not."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = (centre - spread) / (1 + Z * Z / n), (centre + spread) / (1 + Z * Z / n)
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile interval of ``sum(values) / sum(weights)`` (weights 1: the mean) over redrawn rows."""
    return _middle(_redrawn(values, weights, seed, draws))


class Difference(NamedTuple):
    """One mean less another, measured on the same rows, and its 95 % interval."""

    mean: float
    low: float
    high: float


def paired(
    a: Sequence[float],
    b: Sequence[float],
    a_weights: Sequence[float] | None = None,
    b_weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = 1000,
) -> Difference:
    """How much larger the mean of `a` is than that of `b`, row i of both being the same row.

    The interval redraws rows for both at once, so what makes a row hard for both cancels. Weights as in `bootstrap`.
    """
    if len(a) != len(b):
        raise LoricaError(f"{len(a)} and {len(b)} values are not measured on the same rows")
    low, high = _middle(_redrawn(a, a_weights, seed, draws) - _redrawn(b, b_weights, seed, draws))
    return Difference(_mean(a, a_weights) - _mean(b, b_weights), low, high)


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """For each pair of texts whether they are the same, case included; runs of white space are one space, ends none."""
    return [_plain(said) == _plain(wanted) for said, wanted in zip(predictions, references, strict=True)]


class ClassRow(NamedTuple):
    """One answer as a class: shares of its predictions and of its references that are right, and its references."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def per_class(predictions: Sequence[str], references: Sequence[str], most: int = 50) -> list[ClassRow] | None:
    """A row for each distinct reference, most frequent first.

    None where the references are no classes: more than `most` of them, only one, or none that occurs twice.
    """
    wanted, said = [_plain(text) for text in references], [_plain(text) for text in predictions]
    support, predicted = Counter(wanted), Counter(said)
    if not 1 < len(support) <= most or len(support) == len(wanted):
        return None
    right = Counter(a for a, b in zip(said, wanted, strict=True) if a == b)
    return [
        ClassRow(
            label,
            right[label] / predicted[label] if predicted[label] else 0.0,
            right[label] / count,
            2 * right[label] / (predicted[label] + count),
            count,
        )
        for label, count in sorted(support.items(), key=lambda item: (-item[1], item[0]))
    ]


def _plain(text: str) -> str:
    return " ".join(text.split())


def _mean(values: Sequence[float], weights: Sequence[float] | None) -> float:
    return math.fsum(values) / (math.fsum(weights) if weights is not None else len(values))


def _redrawn(values: Sequence[float], weights: Sequence[float] | None, seed: int, draws: int) -> np.ndarray:
    """The mean over each of `draws` redrawings of the rows; the same rows for the same seed and number of rows."""
    if not len(values):
        raise LoricaError("there are no values to take the interval of")
    amounts = np.asarray(values, np.float64)
    counts = np.ones_like(amounts) if weights is None else np.asarray(weights, np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        rows = generator.integers(len(amounts), size=len(amounts))
        # Rows without weight may be all that is drawn from very few.
        means[draw] = amounts[rows].sum() / max(counts[rows].sum(), 1e-12)
    return means


def _middle(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
