"""A tiny random Llama whose greedy answers vary, a byte-level tokenizer with a chat template, and adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lorica
from lorica import Adapter, LoRA
from tiny import stir

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tok(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte; ends of text and of turn are special."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet))
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tok.chat_template = template
    return tok


def make_model(positions: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.4,  # at the usual 0.02 every answer is one token again and again
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_gpt2() -> GPT2LMHeadModel:
    """Learnt absolute positions: an answer depends on them, and past the last there are none."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(SPECIAL) + 256, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def make_folder(path: Path, template: str | None = TEMPLATE) -> str:
    make_model().save_pretrained(path)
    make_tok(template).save_pretrained(path)
    return str(path)


def make_adapter(base: str, path: Path, seed: int, meta: dict[str, str] | None = None) -> str:
    """An adapter that changes what the model in the folder `base` says."""
    model, _ = lorica.load(base, dtype="fp32")
    lorica.inject(model, LoRA(r=2, alpha=4))
    stir(model, seed, size=0.2)
    Adapter.of(model, meta=meta).save(path)
    return str(path)


@pytest.fixture(scope="session")
def tok() -> PreTrainedTokenizerFast:
    return make_tok()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture(scope="session")
def retok() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """Makes the tokenizer with another chat template, or with none."""
    return make_tok


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model in a folder."""
    return make_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def two(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two adapters of it."""
    path = tmp_path_factory.mktemp("adapters")
    return make_adapter(base, path / "one", 1), make_adapter(base, path / "two", 2)
