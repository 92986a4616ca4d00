"""A tiny task that can be learnt, for a tiny random Llama and a tokenizer of single characters."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorica import TrainSettings
from lorica.data import Record

CHARACTERS = ["<s>", "</s>", *string.ascii_lowercase, " ", "="]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.3,  # at the usual 0.02, so narrow a frozen head could say next to nothing
    )
    return LlamaForCausalLM(config).eval()


def make_tok() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, unk_token="="))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def make_rows(count: int = 40) -> list[Record]:
    """Prompts of unlike lengths, answers of one to three letters."""
    letters = string.ascii_lowercase
    rows = []
    for i in range(count):
        prompt = letters[i % 26] * (1 + i % 7) + letters[(3 * i) % 26] + "="
        rows.append(Record("pair", prompt=prompt, completion=letters[i % 5] * (1 + i % 3), where=f"rows:{i + 1}"))
    return rows


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="session")
def fresh() -> Callable[[], nn.Module]:
    """Makes the same model again."""
    return make_model


@pytest.fixture(scope="session")
def tok() -> PreTrainedTokenizerFast:
    return make_tok()


@pytest.fixture(scope="session")
def rows() -> list[Record]:
    return make_rows()


@pytest.fixture(scope="session")
def brief() -> TrainSettings:
    """Nine updates, a measurement every three, the state saved after each."""
    return TrainSettings(steps=9, batch=4, eval_every=3, save_every=0, sample=1, sample_len=4, rank=2)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tok().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in make_rows())
    )
    return path
