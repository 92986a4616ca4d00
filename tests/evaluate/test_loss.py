"""The loss of a set of rows: against a plain loop, and what it must not depend on."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F

from lorica import LoricaError, evaluate
from lorica.data import Example
from tiny import bert


def examples(count: int = 17, seed: int = 0) -> list[Example]:
    """Rows of unlike lengths with answers of unlike lengths."""
    draw = random.Random(seed)
    rows = []
    for place in range(count):
        length = draw.randint(3, 40)
        start = draw.randint(1, length - 1)
        ids = [draw.randrange(3, 250) for _ in range(length)]
        rows.append(Example(ids, [i >= start for i in range(length)], f"rows:{place}"))
    return rows


def by_hand(model, rows):
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0].double()
        nats = F.cross_entropy(logits[:-1], torch.tensor(row.ids[1:]), reduction="none")
        learnt = torch.tensor(row.loss[1:])
        total, tokens = total + nats[learnt].sum().item(), tokens + int(learnt.sum())
    return total / tokens, tokens


@pytest.mark.parametrize("which", ["model", "gpt2"])
def test_every_labelled_token_counts_once(which, request):
    model, rows = request.getfixturevalue(which), examples()
    expected, tokens = by_hand(model, rows)
    found = evaluate.loss(model, rows)
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert (found.tokens, found.rows) == (tokens, len(rows))
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_neither_order_nor_batching_changes_the_loss(model):
    rows = examples()
    expected = evaluate.loss(model, rows, batch_tokens=10_000)
    shuffled = random.Random(1).sample(rows, len(rows))
    for batch_tokens in (1, 100, 1000):
        found = evaluate.loss(model, shuffled, batch_tokens=batch_tokens)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.tokens == expected.tokens


def test_each_row_keeps_its_own_sum_at_its_own_place(model):
    rows = examples()
    for row, (nats, tokens) in zip(rows, evaluate.loss(model, rows).per_row, strict=True):
        expected, count = by_hand(model, [row])
        assert (nats / tokens, tokens) == (pytest.approx(expected, rel=1e-6), count)


def test_a_row_without_labels_counts_as_no_tokens(model):
    rows = examples(3)
    silent = Example([5, 6, 7], [False] * 3, "silent")
    assert evaluate.loss(model, rows).loss == pytest.approx(evaluate.loss(model, [*rows, silent]).loss, rel=1e-6)
    with pytest.raises(LoricaError, match="no token of these rows is labelled"):
        evaluate.loss(model, [silent])
    with pytest.raises(LoricaError, match="no rows"):
        evaluate.loss(model, [])


def test_no_batch_is_larger_than_its_budget(model, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: seen.append(inputs["input_ids"].numel()) or forward(**inputs)
    )
    evaluate.loss(model, examples(), batch_tokens=80)
    assert max(seen) <= 80
    assert len(seen) < 17


def test_each_module_keeps_its_mode_also_after_a_fault(model):
    model.train()
    model.lm_head.eval()
    evaluate.loss(model, examples(2))
    assert model.training and not model.lm_head.training

    def stop(done, total):
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.loss(model, examples(2), progress=stop)
    assert model.training and not model.lm_head.training


def test_an_encoder_is_refused_with_its_name(tok):
    for use in (lambda: evaluate.loss(bert(), examples(1)), lambda: evaluate.generate(bert(), tok, [[1]])):
        with pytest.raises(LoricaError, match="BertForMaskedLM does not continue text"):
            use()
