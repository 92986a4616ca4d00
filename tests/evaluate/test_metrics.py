"""Intervals and counts, against numbers from elsewhere."""

from __future__ import annotations

import random

import pytest

from lorica import LoricaError, evaluate


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for counts, interval in published.items():
        assert evaluate.wilson(*counts) == pytest.approx(interval, abs=5e-5)
    assert evaluate.wilson(20, 20)[1] == 1.0
    assert evaluate.wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean():
    draw = random.Random(0)
    values = [draw.gauss(3.0, 2.0) for _ in range(400)]
    low, high = evaluate.bootstrap(values)
    mean = sum(values) / 400
    assert (low, high) == (pytest.approx(mean - 0.196, abs=0.03), pytest.approx(mean + 0.196, abs=0.03))
    assert evaluate.bootstrap(values) == (low, high)
    assert evaluate.bootstrap(values, seed=1) != (low, high)


def test_the_bootstrap_of_a_weighted_mean_weighs():
    values, weights = [10.0, 1.0] * 200, [10.0, 1.0] * 200
    assert evaluate.bootstrap(values, weights) == (pytest.approx(1.0), pytest.approx(1.0))
    with pytest.raises(LoricaError, match="no values"):
        evaluate.bootstrap([])


def test_a_paired_difference_is_surer_than_two_intervals():
    draw = random.Random(0)
    hard = [draw.gauss(3.0, 2.0) for _ in range(200)]
    better = [value - 0.1 - draw.gauss(0, 0.05) for value in hard]
    found = evaluate.paired(better, hard)
    assert found.mean == pytest.approx(-0.1, abs=0.02)
    assert found.low < found.mean < found.high < 0
    assert evaluate.bootstrap(better)[1] > evaluate.bootstrap(hard)[0]
    with pytest.raises(LoricaError, match="200 and 199 values"):
        evaluate.paired(better, hard[1:])


def test_exact_match_overlooks_white_space_and_nothing_else():
    said = ["a  b\n", "A b", "ab", ""]
    assert evaluate.exact_match(said, ["a b", "a b", "a b", " "]) == [True, False, False, True]


def test_classes_have_the_usual_precision_recall_and_f1():
    wanted = ["spam", "spam", "spam", "ham ", "ham", "eggs"]
    said = ["spam", "spam", "ham", "ham", "other", "spam"]
    assert evaluate.per_class(said, wanted) == [
        ("spam", pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 3),
        ("ham", 0.5, 0.5, 0.5, 2),
        ("eggs", 0.0, 0.0, 0.0, 1),
    ]


@pytest.mark.parametrize(
    "wanted",
    [["a"] * 4, ["a", "b", "c"], [str(i % 51) for i in range(102)]],
    ids=["one answer", "no answer twice", "51 answers"],
)
def test_answers_that_are_no_classes_have_no_table(wanted):
    assert evaluate.per_class(wanted, wanted) is None


def test_fifty_answers_have_a_table():
    wanted = [str(i % 50) for i in range(100)]
    assert len(evaluate.per_class(wanted, wanted)) == 50
