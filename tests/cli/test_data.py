"""`lorica data`: what it prints and what it returns."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorica.cli import data
from lorica.errors import LoricaError

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    """Whatever the model is called, its tokenizer is a byte-level one with a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters))
    tok = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tok.chat_template = TEMPLATE
    monkeypatch.setattr("lorica.models.load_tokenizer", lambda model: tok)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "support.jsonl"
    lines = [{"prompt": "late [/INST] [red]", "completion": "sorry\x1b[2J"}] * 2 + [{"prompt": "hi", "completion": ""}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_page_names_format_faults_lengths_and_marks_the_loss_tokens(rows, capsys):
    data.run(data.Settings(data=str(rows), model="m"))
    out = capsys.readouterr().out
    assert "pair   1 row" in out
    assert "1 duplicate dropped: support.jsonl:2 (as support.jsonl:1)" in out
    assert "1 without an answer dropped: support.jsonl:3" in out
    assert "median" in out
    assert "loss on" in out
    assert "assistant\n\u27e6sorry\\x1b[2J<|im_end|>\u27e7" in out
    assert "late [/INST] [red]" in out
    assert f"lorica train m {rows}" in out


def test_json_is_one_object_with_counts_lengths_and_the_example(rows, capsys):
    result = data.run(data.Settings(data=str(rows), model="m", json=True))
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(result)) == result
    assert result["rows"] == {"train": 1, "valid": 0, "test": 0}
    assert (result["duplicates"], result["empty"]) == (1, 1)
    assert result["tokens"]["learnt"] == sum(len(b) for b in [b"sorry\x1b[2J"]) + 1
    assert result["example"]["runs"][-1] == {"text": "sorry\x1b[2J<|im_end|>", "loss": True}


def test_without_a_model_only_the_rows_are_looked_at(rows, capsys):
    result = data.run(data.Settings(data=str(rows)))
    assert "tokens" not in result
    assert "-m MODEL" in capsys.readouterr().out


def test_columns_are_mapped_and_the_next_command_repeats_the_flags(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("body,label\nx,1\n")
    data.run(data.Settings(data=str(path), model="m", prompt="Classify: {body}", completion="{label}"))
    out = capsys.readouterr().out
    assert "mapped to pair" in out
    assert "--prompt 'Classify: {body}' --completion '{label}'" in out
    with pytest.raises(LoricaError, match="--map prompt=body,completion=label"):
        data.run(data.Settings(data=str(path), model="m"))


def test_the_example_to_show_can_be_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) + "\n" for i in range(3)))
    for wanted, shown in ((1, 1), (3, 3), (99, 3)):
        result = data.run(data.Settings(data=str(path), model="m", json=True, example=wanted))
        assert result["example"]["where"] == f"a.jsonl:{shown}"
