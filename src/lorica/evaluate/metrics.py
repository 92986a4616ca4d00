"""Counts and means with their 95 % intervals, and a table per answer where there are few."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

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
    weights = weights if weights is not None else [1.0] * len(values)
    generator, rows = random.Random(seed), range(len(values))
    means = []
    for _ in range(draws):
        drawn = generator.choices(rows, k=len(rows))
        means.append(sum(values[i] for i in drawn) / max(sum(weights[i] for i in drawn), 1e-12))
    means.sort()
    return means[int(0.025 * draws)], means[min(int(0.975 * draws), draws - 1)]


def exact(prediction: str, reference: str) -> bool:
    """Whether two texts are the same, runs of white space aside."""
    return prediction.split() == reference.split()


class ClassRow(NamedTuple):
    """One answer as a class: shares of its predictions and of its references that are right, and its references."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


def per_class(predictions: Sequence[str], references: Sequence[str], most: int = 50) -> list[ClassRow] | None:
    """A row for each distinct reference, most frequent first; None if there are more than `most`, or only one."""
    wanted = [" ".join(text.split()) for text in references]
    said = [" ".join(text.split()) for text in predictions]
    labels = sorted(set(wanted), key=lambda label: (-wanted.count(label), label))
    if not 1 < len(labels) <= most:
        return None
    rows = []
    for label in labels:
        right = sum(a == b == label for a, b in zip(said, wanted, strict=True))
        predicted, support = said.count(label), wanted.count(label)
        precision, recall = right / predicted if predicted else 0.0, right / support
        f1 = 2 * right / (predicted + support)
        rows.append(ClassRow(label, precision, recall, f1, support))
    return rows
