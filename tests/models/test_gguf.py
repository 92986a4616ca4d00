"""A GGUF becomes a dense model that trains, saves and tokenises as the one it was made from."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from model_files import llama, save, write_gguf
from transformers import GgufConfig

import lorica
from lorica import LoRA, LoricaError, models


@pytest.fixture
def path(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


def test_every_weight_is_what_the_blocks_stand_for(path):
    model, _ = lorica.load(path, dtype="fp32")
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, want in llama().state_dict().items():
        array = want.numpy()
        if array.ndim == 2 and "proj" in name:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        assert np.array_equal(model.state_dict()[name].numpy(), array), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_knows_no_quantizer_so_it_trains_and_saves(path, tmp_path):
    model, tok = lorica.load(path, dtype="fp32")
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    lorica.inject(model, LoRA(r=2), targets="all-linear")
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    lorica.eject(model)
    again, _ = lorica.load(save(tmp_path / "again", model, tok), dtype="fp32")
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_packed_weights_are_never_asked_for(path, monkeypatch):
    asked = []

    def spy(**settings):
        asked.append(settings)
        return GgufConfig(**settings)

    monkeypatch.setattr("lorica.models.ggufs.GgufConfig", spy)
    lorica.load(path)
    assert asked == [{"dequantize": True}]


def test_digits_are_split_where_the_file_says_smollm(path, tmp_path):
    _, tok = lorica.load(path)
    assert tok.tokenize("a12") == ["a", "1", "2"]
    tok.save_pretrained(tmp_path / "tok")
    assert models.load_tokenizer(tmp_path / "tok").tokenize("a12") == ["a", "1", "2"]
    assert tok.decode(tok("12 a").input_ids) == "12 a"


def test_a_plain_pre_tokenizer_is_left_as_it_is(tmp_path):
    assert lorica.load(write_gguf(tmp_path / "plain.gguf", pre="gpt-2"))[1].tokenize("a12") == ["a", "12"]


def test_an_unknown_pre_tokenizer_is_told(tmp_path):
    with pytest.warns(UserWarning, match="the pre-tokenizer 'surprise' is not known"):
        lorica.load(write_gguf(tmp_path / "other.gguf", pre="surprise"))


def test_the_tokenizer_knows_its_length_its_template_and_its_ends(path):
    model, tok = lorica.load(path)
    assert tok.model_max_length == model.config.max_position_embeddings == 64
    roles = (tok.bos_token, tok.eos_token, tok.pad_token, tok.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tok.decode(tok("a , b .").input_ids) == "a , b ."
    assert "<|im_start|>assistant" in tok.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    assert "gguf_file" not in tok.init_kwargs
    assert model.config._name_or_path == tok.name_or_path == str(path)
    assert models.load_tokenizer(path).chat_template == tok.chat_template


def test_a_file_that_is_no_gguf_inside_is_an_error(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf at all")
    with pytest.raises(LoricaError, match="broken.gguf is not a readable GGUF file"):
        lorica.load(tmp_path / "broken.gguf")


def test_an_architecture_that_transformers_cannot_convert_is_an_error(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "odd")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LoricaError, match="odd.gguf cannot be loaded: .*odd"):
        lorica.load(tmp_path / "odd.gguf")


def test_loading_is_silent(path, capfd):
    lorica.load(path)
    assert capfd.readouterr() == ("", "")
