"""What each method declares of itself is what it does: its start, merging, packs, rows of a mixed batch.

Whether members share a pass: tests/train/test_train_methods.py.
"""

from __future__ import annotations

import pytest
import torch

import laws
import lorica
from lorica import Adapter, TrainSettings
from lorica.data import Example, collate
from lorica.errors import LoricaError
from lorica.insertion import asked, edited
from lorica.methods import METHODS
from lorica.passes import Passes
from lorica.serve.rows import Layers
from lorica.train.recipe import method_of
from tiny import llama, logits, stir

GIVEN = {"bitfit": {"add_biases": True}}
PROMPT = [5, 6, 7, 8]
EXAMPLES = [
    Example([5, 6, 7, 8, 9], [False, False, False, True, True]),
    Example([11, 12, 13, 14, 15, 16, 17, 18], [False] * 6 + [True] * 2),
]


def put(name, stirred=True):
    model = llama()
    lorica.inject(model, method_of(TrainSettings(method=name, **GIVEN.get(name, {}))))
    if stirred:
        stir(model, size=0.05)
    return model


def said(model, ids=PROMPT):
    with torch.no_grad():
        return model(input_ids=torch.tensor(asked(model, [ids]))).logits[0, -1]


def refusal(attempt):
    """In what words something is refused; nothing if it is done."""
    try:
        attempt()
    except LoricaError as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_base_if_it_says_so(name):
    assert torch.equal(said(put(name, stirred=False)), said(llama())) == METHODS[name].neutral


@pytest.mark.parametrize("name", METHODS)
def test_it_can_be_merged_if_it_says_so(name):
    method = method_of(TrainSettings(method=name))
    model = llama(bias=True)
    lorica.inject(model, method)
    stir(model, size=0.05)
    before = logits(model)
    refused = refusal(lambda: lorica.merge(model))
    assert refused.startswith(f"{name} cannot be merged, since" if METHODS[name].unmergeable else "")
    assert bool(refused) == bool(METHODS[name].unmergeable)
    assert laws.close(logits(model), before)


@pytest.mark.parametrize("name", METHODS)
def test_a_pack_gives_what_each_example_alone_gives_if_it_says_so(name):
    model = put(name)
    read = [piece for pieces in edited(model, EXAMPLES) for piece in pieces]

    passes = Passes(model, read, 0)
    together = None
    with torch.no_grad():
        if passes.way in ("packed", "rows"):
            with passes(model, read, weights=[1.0] * len(read)) as (loss, _):
                together = float(loss)
        alone = sum(float(model(**collate([row], 0)).loss) * row.labels for row in read)
    assert (together == pytest.approx(alone, rel=1e-5)) == METHODS[name].packs


@pytest.mark.parametrize("name", METHODS)
def test_its_rows_mix_with_those_of_others_if_it_says_so(name):
    adapter, layers = Adapter.of(put(name)), Layers(llama())
    if not METHODS[name].mixes:
        assert refusal(lambda: layers.rows(adapter)).startswith(f"an adapter of {name} cannot be served beside others")
        return
    other = put(name)
    stir(other, seed=3, size=0.05)
    parts = [(layers.rows(Adapter.of(other)), 4), (None, 4), (layers.rows(adapter), 4)]
    wanted = [said(other), said(llama()), said(put(name))]
    plan = layers.plan(parts)
    ids = torch.tensor([PROMPT] * 3)
    with layers.attached(), torch.no_grad():
        layers.work = plan.work
        found = layers.model(input_ids=ids).logits[:, -1]
    for row, place in enumerate(plan.order):
        assert laws.close(found[row], wanted[place])
