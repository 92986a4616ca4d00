"""Law 7: what would fail in silence is an error, or a warning with the count."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import lorica
from lorica import Adapter, LoRA, LoricaError, TrainSettings
from lorica.data import Example
from lorica.train import guards
from lorica.train.guards import NotFinite


def test_examples_with_every_label_masked_are_named(model, tok, brief, tmp_path):
    good = Example([0, 3, 4, 1], [False, True, True, True], "rows:1")
    masked = [Example([0, 3, 4], [False] * 3, "rows:2"), Example([3, 4], [True, False], "rows:3")]
    with pytest.raises(LoricaError, match=r"(?s)2 of 3 training examples.*rows:2\n.*rows:3"):
        lorica.train(model, tok, [good, *masked], brief, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_target_that_matches_nothing_is_an_error_before_anything_is_written(model, tok, rows, brief, tmp_path):
    with pytest.raises(LoricaError, match="query"):
        lorica.train(model, tok, rows, dataclasses.replace(brief, targets="query"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_that_selects_nothing_is_an_error(model, tok, rows, brief, tmp_path):
    with pytest.raises(LoricaError, match="bias"):
        lorica.train(model, tok, rows, dataclasses.replace(brief, bias="all"), out=tmp_path / "run")


def test_tensors_without_a_gradient_are_listed(model, tok, rows, brief, tmp_path):
    def cut_off(module, arguments, output):
        return output.detach()

    model.model.layers[0].self_attn.v_proj.register_forward_hook(cut_off)
    with pytest.raises(LoricaError, match=r"(?s)2 of 28 trained tensors got no gradient.*layers.0.*v_proj#lora.A"):
        lorica.train(model, tok, rows, brief, out=tmp_path / "run")


def test_a_gradient_that_stays_zero_is_warned_of_with_the_count(model, tok, rows, brief, tmp_path):
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, arguments, output: output * 0)
    with pytest.warns(UserWarning, match="trained tensors had a gradient of zero"):
        lorica.train(model, tok, rows, brief, out=tmp_path / "run")


def test_tensors_that_only_some_tokens_reach_may_wait():
    parameters = {
        "model.layers.0.mlp.experts.3.down_proj#lora.A": torch.nn.Parameter(torch.zeros(1)),
        "model.embed_tokens#tokens.rows": torch.nn.Parameter(torch.zeros(1)),
    }
    watch = guards.Gradients(parameters)
    for _ in range(3):
        watch.check(last=False)


@pytest.mark.parametrize("spoiled", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_weights(fresh, tok, rows, brief, tmp_path, spoiled):
    whole = lorica.train(
        fresh(), tok, rows, dataclasses.replace(brief, steps=4, lr=1e-2, schedule="constant"), out=tmp_path / "whole"
    )
    model, forward, calls = fresh(), None, 0
    forward = model.forward

    def spoil(*given, **named):
        nonlocal calls
        result = forward(*given, **named)
        calls += model.training
        if calls == 5 and model.training:
            result.loss = result.loss * float(spoiled)
        return result

    spoil.__signature__ = inspect.signature(forward)
    model.forward = spoil
    path = tmp_path / "run"
    with pytest.raises(NotFinite, match=r"step 5: the loss is.*after step 4"):
        lorica.train(model, tok, rows, dataclasses.replace(brief, lr=1e-2, schedule="constant"), out=path)
    last, expected = (Adapter.load(each / "last") for each in (path, whole.path))
    assert last.sha256 == expected.sha256
    assert (path / "best").exists()


def test_a_gradient_that_is_no_number_stops_too():
    with pytest.raises(NotFinite, match="step 3: the gradient's norm is inf"):
        guards.finite(3, 1.0, float("inf"))
    guards.finite(3, 1.0, 1.0)


def test_an_adapter_that_changes_nothing_in_the_end_is_an_error(model):
    lorica.inject(model, LoRA(r=2))
    with pytest.raises(LoricaError, match="after 5 updates all 14 patches still change nothing"):
        guards.changed(Adapter.of(model), 5)
    with torch.no_grad():
        next(parameter for name, parameter in lorica.trainable(model).items() if name.endswith("B")).add_(1)
    guards.changed(Adapter.of(model), 5)


def test_settings_that_cannot_be_used_are_refused_all_at_once(model, tok, rows, tmp_path):
    with pytest.raises(LoricaError, match=r"(?s)lr is -1.*batch is 0"):
        lorica.train(model, tok, rows, TrainSettings(lr=-1.0, batch=0), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_another_adapter_than_the_one_on_the_model_are_refused(model, tok, rows, tmp_path):
    lorica.inject(model, LoRA(r=2, alpha=4), targets="q_proj")
    with pytest.raises(LoricaError, match=r"(?s)rank is 3, on the model 2.*targets is 'v_proj', on the model 'q_proj'"):
        lorica.train(model, tok, rows, TrainSettings(rank=3, targets="v_proj"), out=tmp_path / "run")


def test_a_merged_adapter_is_not_trained(model, tok, rows, brief, tmp_path):
    lorica.inject(model, LoRA(r=2))
    lorica.merge(model, check=False)
    with pytest.raises(LoricaError, match="unmerge"):
        lorica.train(model, tok, rows, brief, out=tmp_path / "run")
