"""The prefix methods in a training: step zero, law 4 and 6, lengths, files, and a real model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import lorica
from lorica import Adapter, LoricaError, TrainSettings, evaluate, patch
from lorica.data import Example, encode, prompt_ids
from lorica.insertion import insertion
from lorica.train import many
from lorica.train.examples import prepare
from lorica.train.folder import METRICS, read_log

METHODS = ["prefix-embedding", "prefix-layer", "lora+prefix-embedding", "lora+prefix-layer"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """A picture takes as long as all the rest of these runs."""
    monkeypatch.setattr("lorica.train.curve.draw", lambda runs, out: None)


@pytest.fixture
def short(brief):
    return dataclasses.replace(brief, rank=8, prefix=3, infix=2, lr=0.2, held_out=0.2, steps=12, eval_every=6)


class Stopped(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_saves_loads_and_resumes_to_the_bit(fresh, tok, rows, short, tmp_path, method):
    short = dataclasses.replace(short, method=method)
    model = fresh()
    run = lorica.train(model, tok, rows, short, out=tmp_path / "whole")
    events = read_log(tmp_path / "whole" / METRICS)
    losses = [event["loss"] for event in events if event["kind"] == "step"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])

    adapter = Adapter.load(tmp_path / "whole" / "best")
    assert adapter.sha256 == run.adapter.sha256
    assert adapter.method == patch.installed(model).method
    other = fresh()
    adapter.apply(other)
    prompts = [prompt_ids(row, tok)[0] for row in rows[:4]]
    assert evaluate.generate(other, tok, prompts, max_new=4) == evaluate.generate(model, tok, prompts, max_new=4)

    def report(event):
        if event["kind"] == "step" and event["step"] == 8:
            raise Stopped

    with pytest.raises(Stopped):
        lorica.train(fresh(), tok, rows, short, out=tmp_path / "cut", report=report)
    assert lorica.train(fresh(), tok, rows, resume=tmp_path / "cut").adapter.sha256 == run.adapter.sha256


def test_both_losses_of_step_zero_are_said_and_the_base_is_what_it_came_with(fresh, tok, rows, short, tmp_path):
    settings = dataclasses.replace(short, method="prefix-layer", steps=1)
    run = lorica.train(fresh(), tok, rows, settings, out=tmp_path / "run")
    held = prepare(rows, tok, settings).held
    base = evaluate.loss(fresh(), held).loss
    assert run.before == base
    events = read_log(tmp_path / "run" / METRICS)
    (note,) = [event["text"] for event in events if event["kind"] == "note"]
    zero = next(event["held_out"] for event in events if event["kind"] == "eval")
    assert zero != base
    assert note == f"prefix-layer does not start as the base: held out {base:.3f} without it, {zero:.3f} with it"


def test_the_update_does_not_depend_on_the_cut(fresh, tok, rows, short, tmp_path):
    settings = dataclasses.replace(short, method="lora+prefix-layer", steps=1, lr=1e-3, dropout=0.2)
    made = [
        lorica.train(fresh(), tok, rows, dataclasses.replace(settings, micro=micro), out=tmp_path / str(micro)).adapter
        for micro in (1, 3, 4)
    ]
    for other in made[1:]:
        for key, tensor in made[0].tensors.items():
            assert torch.allclose(other.tensors[key], tensor, rtol=1e-4, atol=1e-5), key


def test_the_largest_length_counts_special_tokens(fresh, tok, rows, short, tmp_path):
    settings = dataclasses.replace(short, method="prefix-embedding", max_len=10, steps=1)
    model = fresh()
    prepared = prepare(rows, tok, settings)
    assert max(len(example.ids) for example in prepared.train) == 5
    lorica.train(model, tok, rows, settings, out=tmp_path / "run")
    prepared.give(model)
    assert max(len(example.ids) for example in prepared.given) == 10
    assert len(prepared.given) == len(prepared.train)
    # The same of an adapter that is there already, whatever the settings say of a method.
    run = lorica.train(model, tok, rows, TrainSettings(max_len=10, steps=1, lr=1e-3), out=tmp_path / "again")
    assert (run.settings.method, run.settings.prefix, run.settings.infix) == ("prefix-embedding", 3, 2)
    tokens = [json.loads(line) for line in (tmp_path / "again" / METRICS).read_text().splitlines()]
    assert max(event["tokens"] for event in tokens if event["kind"] == "step") <= 8 * 10


def test_each_answer_of_a_talk_is_learnt_behind_an_infix(fresh, tok, short, tmp_path):
    talk = Example([0, 5, 6, 7, 8, 9, 1], [False, False, True, False, False, True, True])
    settings = dataclasses.replace(short, method="prefix-embedding", steps=None, epochs=1.0, batch=1, sample=0)
    run = lorica.train(fresh(), tok, [talk, talk], settings, out=tmp_path / "run")
    assert run.steps == 4


def test_text_without_prompts_is_refused_before_anything_is_written(fresh, tok, short, tmp_path):
    text = [Example([0, 5, 6, 7], [False, True, True, True], f"rows:{i}") for i in range(4)]
    with pytest.raises(LoricaError, match="--infix 0"):
        lorica.train(fresh(), tok, text, dataclasses.replace(short, method="prefix-embedding"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_they_share_no_pass(fresh, tok, rows, short, tmp_path):
    members = {
        name: dataclasses.replace(short, method="prefix-embedding", lr=lr) for name, lr in (("a", 0.1), ("b", 0.2))
    }
    with pytest.raises(LoricaError, match="a: method prefix-embedding cannot share a pass"):
        many.train(fresh(), tok, rows, members, out=tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_real_model_learns_with_it(method, tmp_path):
    model, tok = lorica.load("smollm2-135m")
    asked = [
        ("name : Blue Spice | Type : pub", "Blue Spice is a pub ."),
        ("name : Aromi | Type : cafe", "Aromi is a cafe ."),
    ]
    rows = [{"prompt": mr, "completion": ref} for mr, ref in asked * 2]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows)))
    settings = TrainSettings(method=method, steps=6, batch=2, held_out=0.0, save_every=0)
    run = lorica.train(model, tok, path, settings, out=tmp_path / "run")
    losses = [event["loss"] for event in read_log(run.path / METRICS) if event["kind"] == "step"]
    assert losses[-1] < losses[0]
    examples = encode(lorica.data.read(path).rows, tok).examples
    after = evaluate.loss(model, examples).loss
    prompts = [example.ids[:-6] for example in examples]
    said = evaluate.generate(model, tok, prompts, max_new=8)
    lorica.eject(model)
    assert insertion(model) is None
    if method != "prefix-layer":  # six updates do not make up for the activations that it starts by replacing
        assert after < evaluate.loss(model, examples).loss
    Adapter.load(run.path / "best").apply(model)
    assert evaluate.loss(model, examples).loss == after
    assert evaluate.generate(model, tok, prompts, max_new=8) == said
