"""Folders and hub ids: what loads, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import errors as hub
from model_files import llama, save, tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import lorica
from lorica import LoricaError, models

BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 300}


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_folder_gives_the_weights_and_the_tokenizer_that_were_saved(folder):
    model, tok = lorica.load(folder, dtype="fp32")
    want = llama().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._name_or_path == tok.name_or_path == str(folder)
    assert (
        tok.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        == "<|im_start|>user\nhi<|im_end|>\n"
    )


def test_a_relative_folder_is_remembered_by_its_absolute_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert lorica.load("model")[0].config._name_or_path == str(folder.resolve())


@pytest.mark.parametrize("word, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_cast_to_the_dtype_asked_for(folder, word, dtype):
    assert {parameter.dtype for parameter in lorica.load(folder, dtype=word)[0].parameters()} == {dtype}


@pytest.mark.parametrize(
    "made",
    [
        lambda: BertModel(BertConfig(**BERT)),
        lambda: BertForMaskedLM(BertConfig(**BERT)),
        lambda: BertForSequenceClassification(BertConfig(**BERT)),
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)),
    ],
)
def test_a_model_loads_as_the_class_it_was_saved_from(tmp_path, made):
    model = made()
    assert type(lorica.load(save(tmp_path / "model", model))[0]) is type(model)


@pytest.mark.parametrize(
    "config, kind",
    [
        (BertConfig(**BERT), transformers.AutoModel),
        (T5Config(**T5), transformers.AutoModelForSeq2SeqLM),
        (GPT2Config(), transformers.AutoModelForCausalLM),
    ],
)
def test_without_a_named_class_the_kind_of_model_decides(config, kind):
    from lorica.models.checkpoint import model_class

    assert config.architectures is None
    assert model_class(config) is kind


def test_a_loaded_model_saves_and_loads_again(folder, tmp_path):
    model, tok = lorica.load(folder, dtype="fp32")
    again, tok_again = lorica.load(save(tmp_path / "again", model, tok), dtype="fp32")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert tok_again.chat_template == tok.chat_template and tok_again("a 12").input_ids == tok("a 12").input_ids


def test_all_weights_that_do_not_fit_are_in_one_error(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)

    edit_weights(folder, change)
    with pytest.raises(LoricaError) as caught:
        lorica.load(folder)
    assert str(caught.value).splitlines() == [
        f"the weights of {folder} do not fit LlamaForCausalLM:",
        "  model.norm.weight: missing",
        "  model.extra.weight: not part of the model",
        "  model.layers.0.mlp.up_proj.weight: shape [3, 32] in the file, [64, 32] in the model",
    ]


def test_a_tied_head_and_old_buffers_are_no_faults(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    edit_weights(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    )
    lorica.load(folder)


def test_pickled_weights_are_refused_with_the_converter(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(LoricaError, match=r"pickles \(pytorch_model.bin\).*use_safetensors=False\).save_pretrained"):
        lorica.load(folder)


def test_a_folder_says_everything_that_it_lacks(tmp_path):
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(LoricaError) as caught:
        lorica.load(tmp_path)
    assert "no weights: model.safetensors" in str(caught.value) and "no tokenizer: copy" in str(caught.value)


def test_a_model_without_tokenizer_is_an_error_and_not_an_empty_tokenizer(tmp_path):
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path)
    with pytest.raises(LoricaError, match="no tokenizer: copy tokenizer.json"):
        lorica.load(tmp_path)


def test_a_folder_that_is_no_model_says_so_and_names_a_gguf_in_it(tmp_path):
    with pytest.raises(LoricaError, match="holds no config.json"):
        lorica.load(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(LoricaError, match="it holds a.gguf: name the file"):
        lorica.load(tmp_path)


def test_broken_weights_are_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0broken")
    with pytest.raises(LoricaError, match="model.safetensors is damaged or not a safetensors file: .+") as told:
        lorica.load(folder)
    assert "\n" not in str(told.value)


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(LoricaError, match="needs Python code that comes with the model, which lorica does not run"):
        lorica.load(folder)


def test_a_file_that_is_no_gguf_and_a_path_that_is_nowhere_are_errors(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LoricaError, match="is a file, but not a .gguf"):
        lorica.load(tmp_path / "model.safetensors")
    with pytest.raises(LoricaError, match="no such folder or file: ./none/here/at-all"):
        lorica.load("./none/here/at-all")


@pytest.mark.parametrize("source", ["smollm-135m", "SmolLM2-135M"])
def test_an_unknown_word_gets_the_nearest_built_in_suggested(source):
    with pytest.raises(LoricaError, match="did you mean 'smollm2-135m'"):
        lorica.load(source)


def test_a_hub_id_without_network_says_so_without_addresses():
    with pytest.raises(LoricaError, match="unknown model 'some-org/some-model': .*the hub cannot be reached") as caught:
        lorica.load("some-org/some-model")
    assert "://" not in str(caught.value)


def test_a_hub_id_takes_safetensors_and_no_pickles_or_code(folder, monkeypatch):
    asked = {}

    def snapshot(name, **patterns):
        asked.update(patterns, name=name)
        return str(folder)

    monkeypatch.setattr("lorica.models.loading.snapshot_download", snapshot)
    model, tok = lorica.load("some-org/some-model")
    assert model.config._name_or_path == tok.name_or_path == asked["name"] == "some-org/some-model"
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"}
    models.load_tokenizer("some-org/some-model")
    assert "*.safetensors" not in asked["allow_patterns"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        LoricaError, match=r"no weights: .*from_pretrained\('some-org/some-model', use_safetensors=False\)"
    ):
        lorica.load("some-org/some-model")


@pytest.mark.parametrize(
    "fault, words",
    [
        (hub.RepositoryNotFoundError, "the hub has no such model"),
        (hub.GatedRepoError, "is gated: accept its terms"),
        (hub.LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_sentence(monkeypatch, fault, words):
    error = fault.__new__(fault)
    Exception.__init__(error, "https://hub.test said no")
    monkeypatch.setattr("lorica.models.loading.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(LoricaError, match=words) as caught:
        lorica.load("some-org/some-model")
    assert "hub.test" not in str(caught.value)


def test_loading_is_silent_and_leaves_transformers_settings(folder, capfd):
    transformers.utils.logging.enable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    lorica.load(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert transformers.utils.logging.get_verbosity() == level


def test_the_tokenizer_alone_is_that_of_the_model(folder):
    (folder / "model.safetensors").unlink()
    tok = models.load_tokenizer(folder)
    assert tok("a 12").input_ids == tokenizer()("a 12").input_ids and tok.name_or_path == str(folder)
