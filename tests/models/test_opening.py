"""Whatever a thing is - model, adapter, run - it opens with its base and its adapter, or says what is missing."""

from __future__ import annotations

import warnings

import pytest
import torch
from model_files import llama, save

import lorica
from lorica import Adapter, LoRA, LoricaError, models
from lorica.models import open_thing

IDS = torch.arange(8)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(folder, meta=None, seed=1) -> tuple[Adapter, torch.Tensor]:
    """An adapter with something in it, and what the model says with it."""
    model, _ = lorica.load(folder, dtype="fp32")
    lorica.inject(model, LoRA(r=2), targets="all-linear")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lorica.trainable(model).values():
            parameter.normal_(generator=generator, std=0.1)
    return Adapter.of(model, meta=meta), logits(model)


def test_a_model_opens_without_adapter(folder):
    opened = open_thing(folder, dtype="fp32")
    assert opened.adapter is None and opened.base == str(folder)
    assert torch.equal(logits(opened.model), logits(llama()))


def test_an_adapter_opens_on_the_base_that_it_names(folder, tmp_path):
    adapter, want = trained(folder)
    adapter.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_thing(tmp_path / "adapter", dtype="fp32")
    assert opened.base == str(folder) and opened.adapter.sha256 == adapter.sha256
    assert lorica.adapters(opened.model) == ["default"] and lorica.active(opened.model) == "default"
    assert torch.equal(logits(opened.model), want)


def test_a_run_opens_with_its_best_adapter_else_its_last(folder, tmp_path):
    adapter, want = trained(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.toml").touch()
    with pytest.raises(LoricaError, match="has no adapter yet"):
        open_thing(tmp_path / "run")
    adapter.save(tmp_path / "run/last")
    assert torch.equal(logits(open_thing(tmp_path / "run", dtype="fp32").model), want)
    best, want_best = trained(folder, seed=2)
    assert not torch.equal(want, want_best)
    best.save(tmp_path / "run/best")
    assert torch.equal(logits(open_thing(tmp_path / "run", dtype="fp32").model), want_best)


def test_an_adapter_may_be_put_on_a_base_given_by_hand(folder, tmp_path):
    adapter, want = trained(folder)
    adapter.save(tmp_path / "adapter")
    moved = folder.rename(tmp_path / "moved")
    opened = open_thing(moved, adapter=tmp_path / "adapter", dtype="fp32")
    assert opened.base == str(moved) and torch.equal(logits(opened.model), want)
    with pytest.raises(LoricaError, match=f"the base model of the adapter {tmp_path / 'adapter'}: .*{folder}"):
        open_thing(tmp_path / "adapter")


def test_two_adapters_or_an_adapter_that_is_none_are_errors(folder, tmp_path):
    trained(folder)[0].save(tmp_path / "adapter")
    with pytest.raises(LoricaError, match="is an adapter already"):
        open_thing(tmp_path / "adapter", adapter=tmp_path / "adapter")
    with pytest.raises(LoricaError, match="neither an adapter nor a run"):
        open_thing(folder, adapter=folder)


def test_an_adapter_that_names_no_base_asks_for_it(folder, tmp_path):
    trained(folder, {"base_model": ""})[0].save(tmp_path / "adapter")
    with pytest.raises(LoricaError, match="names no base model"):
        open_thing(tmp_path / "adapter")


def test_other_weights_under_the_same_name_are_warned_about(folder, tmp_path):
    trained(folder)[0].save(tmp_path / "adapter")
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    save(folder, other)
    with pytest.warns(UserWarning, match="are not those that .*adapter was trained on"):
        open_thing(tmp_path / "adapter", dtype="fp32")


def test_the_base_in_another_dtype_is_the_same_base(folder, tmp_path):
    model, _ = lorica.load(folder, dtype="bf16")
    save(tmp_path / "bf16", model)
    model, _ = lorica.load(tmp_path / "bf16", dtype="bf16")
    lorica.inject(model, LoRA(r=2), targets="qv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained adapter is said to be silent
        Adapter.of(model).save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_thing(tmp_path / "adapter", dtype="fp32")
    assert lorica.fingerprint(opened.model) == opened.adapter.meta["base_fingerprint"]


def test_the_chat_template_of_the_training_is_used(folder, tmp_path):
    trained(folder, {"chat_template": "{{ 'own' }}"})[0].save(tmp_path / "adapter")
    assert open_thing(tmp_path / "adapter").tok.chat_template == "{{ 'own' }}"
    assert models.load_tokenizer(tmp_path / "adapter").chat_template == "{{ 'own' }}"


def test_an_adapter_on_the_hub_opens_like_a_folder(folder, tmp_path, monkeypatch):
    adapter, want = trained(folder)
    adapter.save(tmp_path / "adapter")
    monkeypatch.setattr("lorica.models.loading.snapshot_download", lambda name, **_: str(tmp_path / "adapter"))
    assert torch.equal(logits(open_thing("some-org/some-adapter", dtype="fp32").model), want)


def test_an_adapter_is_not_taken_for_a_model(folder, tmp_path):
    trained(folder)[0].save(tmp_path / "adapter")
    with pytest.raises(LoricaError, match="is an adapter, not a model"):
        lorica.load(tmp_path / "adapter")


def test_a_description_counts_the_base_once(folder):
    model, _ = lorica.load(folder, dtype="bf16")
    plain = models.describe(model)
    assert plain.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plain.nbytes == 2 * plain.parameters and plain.dtype == "bfloat16"
    assert (plain.kind, plain.name, plain.title) == ("LlamaForCausalLM", str(folder), "model")
    lorica.inject(model, LoRA(r=2), targets="all-linear")
    assert models.describe(model) == plain
