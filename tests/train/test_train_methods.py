"""Every method in a training: it learns, resumes to the byte, says what it is, and shares packs exactly."""

from __future__ import annotations

import dataclasses
import re
import signal

import pytest
import torch

import lorica
from families import FAMILIES
from lorica import Adapter, TrainSettings
from lorica.cli.main import main
from lorica.data import LabelledRow, Record
from lorica.errors import LoricaError
from lorica.fast import Fast
from lorica.methods import METHODS
from lorica.methods.adapters import AdapterH
from lorica.models import open_thing
from lorica.tasks import task_of
from lorica.train import Interrupted, many
from lorica.train.recipe import method_of
from lorica.train.settings import default_lr
from test_fast import apart, eager, gradients, packed
from tiny import stir

OTHERS = [name for name in METHODS if name != "lora"]
ON_ROWS_AS_THEY_ARE = [name for name in OTHERS if "prefix" not in name]  # those: tests/methods/test_prefix.py
GIVEN = {"bitfit": {"add_biases": True}}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("lorica.train.curve.draw", lambda runs, out: None)


@pytest.fixture
def settings(brief):
    def of(name, **changes):
        given = {"method": name, "rank": 8, "lr": 5e-3, "schedule": "constant", "held_out": 0.2}
        return dataclasses.replace(brief, **given | GIVEN.get(name, {}) | changes)

    return of


def equipped(family, name):
    model = FAMILIES[family]()
    lorica.inject(model, method_of(TrainSettings(method=name, **GIVEN.get(name, {}))))
    stir(model, size=0.05)
    return model


@pytest.mark.parametrize("name", ON_ROWS_AS_THEY_ARE)
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "gpt2", "bert"])
def test_on_the_fast_path_a_pack_gives_the_gradient_of_its_rows_alone(family, name):
    from lorica.passes import Passes
    from test_fast import ROWS

    model = equipped(family, name)
    passes = Passes(model, ROWS, 1)
    assert passes.way in ("packed", "rows"), passes.note
    with passes(model, ROWS) as (loss, _):
        loss.backward()
    found = gradients(model)
    wanted, expected = eager(equipped(family, name))
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert apart(found, expected) < 1e-5
    assert all(tensor.any() for tensor in found.values())


def test_a_block_whose_layers_are_adapted_is_left_to_itself():
    # The adapted layers themselves are there for mixed passes.
    assert Fast(equipped("llama", "adapter-h")).names == ["Linear", "LlamaAttention", "LlamaRMSNorm"]
    assert "LlamaRMSNorm" not in Fast(equipped("llama", "full")).names
    assert packed(equipped("llama", "adapter-h"))[0] == pytest.approx(
        eager(equipped("llama", "adapter-h"))[0], rel=1e-5
    )


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_learns_and_a_stopped_run_ends_as_one_that_was_not(fresh, tok, rows, settings, tmp_path, name):
    whole = lorica.train(fresh(), tok, rows, settings(name), out=tmp_path / "whole")
    assert whole.after < whole.before

    def stop(event):
        if event["kind"] == "step" and event["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        lorica.train(fresh(), tok, rows, settings(name), out=tmp_path / "cut", report=stop)
    lorica.train(fresh(), tok, rows, resume=tmp_path / "cut")
    for file in ("best/adapter_model.safetensors", "best/adapter_config.json", "last/adapter_model.safetensors"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"`{name}`" in card and "--enable-lora" not in card
    assert ("cannot be merged" in card) == bool(method_of(settings(name)).unmergeable)
    loaded = Adapter.load(tmp_path / "whole" / "best")
    assert loaded.sha256 == whole.adapter.sha256
    model = fresh()
    loaded.apply(model)
    assert lorica.count(model).trainable == sum(tensor.numel() for tensor in loaded.tensors.values())


@pytest.mark.parametrize("name", METHODS)
def test_members_share_a_pass_if_their_method_says_so(fresh, tok, rows, settings, tmp_path, name):
    members = {"a": settings(name, steps=2), "b": settings(name, steps=2, lr=1e-2)}
    if METHODS[name].shares:
        assert len(many.train(fresh(), tok, rows, members, out=tmp_path / "sweep").rows) == 2
        return
    with pytest.raises(LoricaError, match=re.escape(f"a: method {name} cannot share a pass")):
        many.train(fresh(), tok, rows, members, out=tmp_path / "sweep")


def test_the_commands_say_what_can_be_done(model_folder, data_file, tmp_path, capsys):
    run = tmp_path / "run"
    how = ["--method", "adapter-h", "--bottleneck", "4", "--steps", "3", "--sample", "0", "-o", str(run)]
    assert main(["train", str(model_folder), str(data_file), *how]) == 0
    told = capsys.readouterr().err
    assert "adapter-h bottleneck 4, activation relu, 4 layers" in " ".join(told.split())
    assert "0.5 x 5e-4 (2000 / 16)^0.775" in told
    assert main(["show", str(run)]) == 0
    told = capsys.readouterr().out
    assert "adapter-h: bottleneck 4, activation relu" in told and "vLLM knows no adapter-h" in told
    assert main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 1
    assert "cannot be merged, since a nonlinearity" in capsys.readouterr().err
    assert main(["convert", str(run / "best"), "--to", "gguf", "-o", str(tmp_path / "g")]) == 1
    assert "no other program knows adapter-h" in capsys.readouterr().err
    assert main(["generate", str(run), str(data_file), "-o", str(tmp_path / "out.jsonl"), "--max-new", "2", "-q"]) == 0
    assert main(["train", str(model_folder), str(data_file), "--method", "full", "--rank", "4"]) == 1
    assert "rank is 4, which method full does not read" in capsys.readouterr().err


def test_the_rate_follows_the_method(model, tok, rows, settings):
    from lorica.train.setup import preview

    found = preview(model, tok, rows, dataclasses.replace(settings("full"), lr=None))
    assert found["lr"] == default_lr(16, "full") == pytest.approx(default_lr(16) / 10)
    assert found["lr_from"].startswith("0.1 x ")


def test_a_model_with_an_adapter_is_trained_with_it_and_with_no_other(model, tok, rows, settings, tmp_path):
    lorica.inject(model, AdapterH(bottleneck=4))
    with pytest.raises(LoricaError, match="bottleneck is 5, on the model 4"):
        lorica.train(model, tok, rows, settings("adapter-h", bottleneck=5), out=tmp_path / "a")
    ended = lorica.train(model, tok, rows, settings("lora"), out=tmp_path / "b")
    assert ended.settings.method == "adapter-h" and ended.settings.bottleneck == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_real_encoder_learns_labels_by_every_method_and_resumes(name, tmp_path):
    words = {"positive": ("wonderful", "good", "moving"), "negative": ("awful", "bad", "dull")}
    rows = [LabelledRow((f"A {word} film.",), label) for label, said in words.items() for word in said]
    settings = TrainSettings(
        task="classify", method=name, steps=6, batch=6, held_out=0, sample=0, eval_every=6, save_every=0, warmup=0.0
    )

    def fresh():
        return lorica.load("minilm-l6", labels=("negative", "positive"), dtype="fp32")

    def stop(event):
        if event["kind"] == "step" and event["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    losses = []
    model, tok = fresh()
    whole = lorica.train(
        model, tok, rows, settings, out=tmp_path / "whole",
        report=lambda event: losses.append(event["loss"]) if event["kind"] == "step" else None,
    )  # fmt: skip
    assert min(losses[-2:]) < losses[0]
    with pytest.raises(Interrupted):
        lorica.train(*fresh(), rows, settings, out=tmp_path / "cut", report=stop)
    resumed = lorica.train(*fresh(), rows, resume=tmp_path / "cut")
    assert resumed.adapter.sha256 == whole.adapter.sha256
    opened = open_thing(tmp_path / "whole")
    assert opened.adapter.sha256 == whole.adapter.sha256
    text = ["A truly good film."]
    assert task_of(opened.model).say(opened.model, opened.tok, text) == task_of(model).say(model, tok, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_real_decoder_learns_by_every_method(name, tmp_path):
    model, tok = lorica.load("smollm2-135m", dtype="fp32")
    words = ("red", "blue", "two")
    rows = [Record("pair", prompt=f"Say {word}.", completion=f" {word}, as {word} is said.") for word in words]
    settings = TrainSettings(method=name, steps=4, batch=3, held_out=0, sample=0, eval_every=4, **GIVEN.get(name, {}))
    losses = []
    ended = lorica.train(
        model, tok, rows, settings, out=tmp_path / "run",
        report=lambda event: losses.append(event["loss"]) if event["kind"] == "step" else None,
    )  # fmt: skip
    assert losses[-1] < losses[0]
    lorica.eject(model)
    Adapter.load(tmp_path / "run" / "best").apply(model)
    assert all(torch.equal(tensor, ended.adapter.tensors[key]) for key, tensor in lorica.trainable(model).items())
