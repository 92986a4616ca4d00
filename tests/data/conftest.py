"""Tiny tokenizers, and chat templates written after the manner of well-known ones."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|head|>", "<|/head|>", "<|eot|>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the system user assistant model",
    "hi  there\n\nhow are you\n\n\nfine thanks  spam ham 2+2=4 get_weather arguments name role content",
] * 4

_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_LOOP = "{% for m in messages %}"

TEMPLATES = {
    "chatml": _LOOP + _TURN + "{% endfor %}" + _ASK,
    "default-system": "{% if messages[0]['role'] != 'system' %}"
    + "{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}{% endif %}"
    + _LOOP
    + _TURN
    + "{% endfor %}"
    + _ASK,
    "markers": _LOOP
    + "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    + _ASK,
    "inst": "{{ bos_token }}"
    + _LOOP
    + "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}"
    + _LOOP
    + "{{ '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    + "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}",
    # earlier answers lose their thinking, the last one keeps it
    "stripping": _LOOP
    + "{% set c = m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last else m['content'] %}"
    + "{{ '<|im_start|>' + m['role'] + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}"
    + _ASK,
    # the generation prompt opens a thought that an answered turn does not have
    "opening": _LOOP
    + _TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    # what stands before depends on how many messages follow
    "counting": "{{ messages | length }}:" + _LOOP + _TURN + "{% endfor %}" + _ASK,
    "open-ended": _LOOP + "{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}  # fmt: skip


def byte_level() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def spaced() -> Tokenizer:
    """After the manner of SentencePiece: a space is put before every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    inner.train_from_iterator([text.replace(": ", ":") for text in CORPUS] + ["class: spam"] * 9, trainer)
    return inner


@pytest.fixture(scope="session")
def make_tok():
    """A function: name of a template (or None) -> tokenizer whose pad token is its end token."""
    inner = byte_level().to_str()

    def make(
        template: str | None = None, *, eos: str = "<|im_end|>", bos: str | None = "<s>"
    ) -> PreTrainedTokenizerFast:
        tok = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(inner), eos_token=eos, pad_token=eos, bos_token=bos
        )
        tok.chat_template = TEMPLATES[template] if template else None
        return tok

    return make


@pytest.fixture(scope="session")
def spaced_tok() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=spaced(), eos_token="</s>", pad_token="</s>")


@pytest.fixture
def write(tmp_path):
    """A function: file name and rows (or raw text) -> path of the file."""

    def write(name: str, rows: list | str):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write
