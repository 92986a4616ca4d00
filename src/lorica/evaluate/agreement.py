"""How well what was said agrees with what is right: GLUE's measures, with intervals.

    several labels   accuracy   f1 (of two: of the second; of more: the mean over the labels)   matthews
    a number         pearson    spearman

Those of labels follow from the counts of who was taken for whom, so that all redrawings of an interval are one product.
An interval redraws rows, the same ones for all who are compared.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

INSTALL = 'pip install "lorica[metrics]"'
MEASURES = {"classify": ("accuracy", "f1", "matthews"), "regress": ("pearson", "spearman")}
DRAWS = 1000

Values = np.ndarray


def agreement(labels: int, wanted: Sequence[float], said: Sequence[float]) -> dict[str, float]:
    """Every measure of answers, given as places among so many labels; or of numbers, where `labels` is 1."""
    columns = _columns(wanted, said)
    if labels == 1:
        return _of_numbers(columns[:, 0], columns[:, 1])
    rows = np.ones((1, len(columns)))
    return {name: float(values[0]) for name, values in _of_counts(_counted(columns, 1, rows, labels)).items()}


def intervals(
    labels: int, wanted: Sequence[float], *said: Sequence[float], draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The 95 % percentile interval of every measure; with a second `said`, of the first's less the second's."""
    columns, generator = _columns(wanted, *said), np.random.default_rng(seed)
    found: list[dict[str, Values]] = []
    if labels == 1:
        rows = [columns[generator.integers(len(columns), size=len(columns))] for _ in range(draws)]
        for place in range(1, columns.shape[1]):
            each = [_of_numbers(drawn[:, 0], drawn[:, place]) for drawn in rows]
            found.append({name: np.array([one[name] for one in each]) for name in each[0]})
    else:
        # Each distinct row once: there are few, whatever the number of rows.
        cells, counts = np.unique(columns, axis=0, return_counts=True)
        weights = generator.multinomial(len(columns), counts / len(columns), size=draws)
        found = [_of_counts(_counted(cells, place, weights, labels)) for place in range(1, columns.shape[1])]
    values = {name: found[0][name] - (found[1][name] if len(found) > 1 else 0.0) for name in found[0]}
    bounds = {name: np.nanquantile(each, [0.025, 0.975]) for name, each in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def missing(labels: int) -> str:
    """What to install for all measures; empty if they can be had."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        return f"Spearman needs: {INSTALL}" if labels == 1 else ""
    return ""


def _columns(*values: Sequence[float]) -> Values:
    return np.stack([np.asarray(each, np.float64) for each in values], 1)


def _counted(rows: Values, place: int, weights: Values, labels: int) -> Values:
    """``[draws, labels, labels]``: how often the first index was right where the second was said in column `place`."""
    pairs = (rows[:, 0] * labels + rows[:, place]).astype(int)
    return (weights @ np.eye(labels * labels)[pairs]).reshape(-1, labels, labels)


def _of_counts(counts: Values) -> dict[str, Values]:
    """Each measure ``[draws]`` of counts ``[draws, labels, labels]``; 0 where it is undefined, as in scikit-learn."""
    right, wanted, said = counts.diagonal(axis1=1, axis2=2), counts.sum(2), counts.sum(1)
    rows = counts.sum((1, 2))
    f1 = 2 * right / np.maximum(wanted + said, 1)
    there = np.maximum((wanted + said > 0).sum(1), 1)
    # Matthews for any number of labels (Gorodkin 2004): the correlation of the two assignments.
    spread = (rows**2 - (wanted**2).sum(1)) * (rows**2 - (said**2).sum(1))
    matthews = (right.sum(1) * rows - (wanted * said).sum(1)) / np.sqrt(np.maximum(spread, 1))
    return {
        "accuracy": right.sum(1) / rows,
        "f1": f1[:, 1] if counts.shape[1] == 2 else f1.sum(1) / there,
        "matthews": np.where(spread > 0, matthews, 0.0),
    }


def _of_numbers(wanted: Values, said: Values) -> dict[str, float]:
    """Correlations of numbers, and of their ranks where scipy is there; not a number where one side is constant."""
    with _quiet():
        found = {"pearson": float(np.corrcoef(wanted, said)[0, 1])}
        if not missing(1):
            from scipy import stats

            found["spearman"] = float(np.corrcoef(stats.rankdata(wanted), stats.rankdata(said))[0, 1])
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of what is undefined on some drawing, such as a correlation with a constant."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore")
        yield
