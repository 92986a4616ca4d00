"""Accuracy, F1, Matthews, Pearson and Spearman with their intervals; what a verdict says of its rows."""

from __future__ import annotations

import builtins
import random

import pytest
import torch

from lorica.data import LabelledExample
from lorica.evaluate import Verdicts, against
from lorica.evaluate.agreement import agreement, intervals, missing


def test_two_classes_have_the_f1_of_the_second_and_matthews():
    # By hand: 3 true positives, 1 false, 2 missed, 4 true negatives.
    wanted, said = [1] * 5 + [0] * 5, [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    found = agreement(2, wanted, said)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)


def test_more_classes_have_the_mean_of_their_f1():
    found = agreement(3, [0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2])
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 0.8) / 3)


def test_numbers_have_two_correlations():
    found = agreement(1, [1, 2, 3, 4], [1, 4, 9, 16])
    assert found["spearman"] == pytest.approx(1)
    assert 0.9 < found["pearson"] < 1


@pytest.mark.parametrize("labels", [1, 2])
def test_intervals_hold_the_value_and_narrow_with_the_rows(labels):
    def drawn(n):
        generator = random.Random(n)
        wanted = [generator.randrange(2) for _ in range(n)]
        return wanted, [x if generator.random() < 0.8 else 1 - x for x in wanted]

    widths = []
    for n in (50, 800):
        wanted, said = drawn(n)
        value, bounds = agreement(labels, wanted, said), intervals(labels, wanted, said, draws=200)
        assert all(low <= value[name] <= high for name, (low, high) in bounds.items())
        widths.append([high - low for low, high in bounds.values()])
    assert all(wide > 2 * narrow for wide, narrow in zip(*widths, strict=True))


def test_the_same_answers_differ_by_nothing_and_better_ones_by_something():
    wanted = [i % 2 for i in range(200)]
    worse = [x if i % 4 else 1 - x for i, x in enumerate(wanted)]
    assert intervals(2, wanted, worse, worse, draws=50)["accuracy"] == (0, 0)
    low, high = intervals(2, wanted, wanted, worse, draws=200)["accuracy"]
    assert 0.15 < low < 0.25 < high < 0.35


def test_without_scipy_only_spearman_is_left_out_and_asked_for(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert set(agreement(2, [0, 1], [0, 0])) == {"accuracy", "f1", "matthews"}
    assert set(agreement(1, [0, 1, 2], [0, 2, 1])) == {"pearson"}
    assert 'pip install "lorica[metrics]"' in missing(1)
    assert missing(2) == ""


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_the_measures_of_labels_are_scikit_learns(labels):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = random.Random(labels)
    for skew in (0.0, 0.5, 0.9, 1.0):
        wanted = [0 if generator.random() < skew else generator.randrange(labels) for _ in range(60)]
        said = [x if generator.random() < 0.5 else generator.randrange(labels) for x in wanted]
        for answers in (said, wanted, [0] * 60):
            found = agreement(labels, wanted, answers)
            average = "binary" if labels == 2 else "macro"
            assert found["accuracy"] == pytest.approx(metrics.accuracy_score(wanted, answers))
            assert found["f1"] == pytest.approx(metrics.f1_score(wanted, answers, average=average, zero_division=0))
            assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(wanted, answers))


def verdicts(outputs, targets, labels, name=""):
    examples = [LabelledExample([1, 2], target, [], f"row:{i}") for i, target in enumerate(targets)]
    return Verdicts.of(examples, torch.tensor(outputs), labels, name)


def test_a_verdict_gives_label_probabilities_and_loss():
    found = verdicts([[0.0, 2.0], [1.0, 1.0]], [1.0, 0.0], ("no", "yes"))
    assert found.answers == ["yes", "no"] and found.references == ["yes", "no"]
    share = 1 / (1 + 2.718281828**-2)
    shares = {"no": pytest.approx(1 - share, abs=1e-6), "yes": pytest.approx(share, abs=1e-6)}
    assert found.told(0) == {"label": "yes", "probabilities": shares}
    assert found.losses == pytest.approx([0.126928, 0.693147], abs=1e-6)
    summary = found.summary()
    assert summary["accuracy"] == 1.0 and summary["rows"] == 2
    assert summary["loss_low"] <= summary["loss"] <= summary["loss_high"]


def test_a_number_has_its_squared_error():
    found = verdicts([[1.0], [3.0]], [2.0, 3.0], ("score",))
    assert found.losses == [1.0, 0.0]
    assert found.told(1) == {"score": 3.0}
    assert found.classes() is None


def test_two_are_compared_on_the_same_rows():
    right, wrong = [[0.0, 1.0]] * 30, [[0.0, 1.0]] * 20 + [[1.0, 0.0]] * 10
    a, b = (verdicts(said, [1.0] * 15 + [1.0] * 15, ("no", "yes"), name) for said, name in ((right, "a"), (wrong, "b")))
    found = against(a, b)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_low"] > 0
    assert found["loss"] < 0
