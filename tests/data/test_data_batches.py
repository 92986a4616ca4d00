"""Laws of the hold-out, the sampler and the collation."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica import data
from lorica.data import Example, Record
from lorica.errors import LoricaError


def rows(contents: list[int]) -> list[Record]:
    return [Record("pair", prompt=str(content), completion="a", where=f"t:{i}") for i, content in enumerate(contents)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=2, max_size=400), st.integers(0, 5))
def test_a_split_is_a_partition_in_order_that_no_duplicate_straddles(contents, seed):
    whole = rows(contents)
    train, held = data.split(whole, seed=seed)
    assert sorted(row.where for row in train + held) == sorted(row.where for row in whole)
    assert train == [row for row in whole if row in train]
    assert not {row.key for row in train} & {row.key for row in held}
    assert train
    assert (train, held) == data.split(whole, seed=seed)


@pytest.mark.parametrize(("n", "wanted"), [(1, 0), (2, 1), (100, 10), (249, 25), (250, 50), (400, 50), (1000, 100)])
def test_a_tenth_is_held_out_and_at_least_50_of_250(n, wanted):
    assert len(data.split(rows(list(range(n))))[1]) == wanted


def test_another_seed_holds_out_other_rows_and_no_fraction_holds_out_none():
    whole = rows(list(range(100)))
    assert data.split(whole, seed=0)[1] != data.split(whole, seed=1)[1]
    assert data.split(whole, fraction=0) == (whole, [])
    with pytest.raises(LoricaError, match="fraction is 1"):
        data.split(whole, fraction=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 30))
def test_a_restored_sampler_continues_and_each_epoch_is_a_permutation(n, batch, seed, steps):
    sampler = data.Sampler(n, batch, seed)
    for _ in range(steps):
        next(sampler)
    saved = json.loads(json.dumps(sampler.state()))
    ahead = [next(sampler) for _ in range(20)]
    other = data.Sampler(n, batch, seed)
    other.restore(saved)
    assert [next(other) for _ in range(20)] == ahead
    fresh = data.Sampler(n, batch, seed)
    per_epoch = -(-n // batch)
    epochs = [[i for _ in range(per_epoch) for i in next(fresh)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_epochs_differ_and_seeds_differ():
    sampler = data.Sampler(50, 50, 0)
    first, second = next(sampler), next(sampler)
    assert first != second
    assert first != next(data.Sampler(50, 50, 1))


def test_a_sampler_refuses_the_position_of_another_order():
    state = data.Sampler(10, 2, 0).state()
    with pytest.raises(LoricaError, match="n 10, now 11; seed 0, now 3"):
        data.Sampler(11, 2, 3).restore(state)
    with pytest.raises(LoricaError, match="nothing to draw"):
        data.Sampler(0, 2)


EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12).map(
        lambda pairs: Example([i for i, _ in pairs], [loss for _, loss in pairs])
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(EXAMPLES, st.integers(0, 9))
def test_a_batch_gives_back_its_examples_whatever_the_pad_token(examples, pad):
    batch = data.collate(examples, pad)
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert all(tensor.shape == (len(examples), max(len(e.ids) for e in examples)) for tensor in batch.values())
    for ids, mask, labels, example in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels")), examples, strict=True
    ):
        length = len(example.ids)
        assert ids.tolist() == example.ids + [pad] * (len(ids) - length)
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        wanted = [i if loss else -100 for i, loss in zip(example.ids, example.loss, strict=True)]
        assert labels.tolist() == wanted + [-100] * (len(ids) - length)


def test_an_end_token_stays_labelled_where_pad_is_the_same_token(make_tok):
    tok = make_tok("chatml")
    assert tok.pad_token_id == tok.eos_token_id
    encoded = data.encode([Record("pair", prompt="hi", completion=c) for c in ("ho", "a longer one")], tok)
    labels = data.collate(encoded.examples, tok.pad_token_id)["labels"]
    assert (labels == tok.eos_token_id).sum(1).tolist() == [1, 1]
