"""`lorica merge`: a plain model folder that says what the tuned model says."""

from __future__ import annotations

import json

import pytest
import torch
from model_files import save
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorica
from lorica import Adapter, LoRA
from lorica.cli.main import main
from tiny import stir

IDS = torch.arange(3, 30)[None]


@pytest.fixture
def tuned(tmp_path):
    """A base folder, an adapter of it, and the tuned logits."""

    def make(targets="all-linear"):
        base = save(tmp_path / "base")
        model, _ = lorica.load(base, dtype="fp32")
        lorica.inject(model, LoRA(r=4), targets)
        stir(model)
        Adapter.of(model).save(tmp_path / "adapter")
        with torch.no_grad():
            return tmp_path / "adapter", model(IDS).logits

    return make


def test_the_merged_folder_is_the_tuned_model(tuned, tmp_path, capsys):
    adapter, logits = tuned()
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out"), "--dtype", "fp32", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"] == 14
    assert told["max_logit_diff"] < 1e-4
    assert told["same_top"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_side_of_a_tied_matrix_is_told(tuned, tmp_path, capsys):
    adapter, logits = tuned("lm_head")
    assert main(["merge", str(adapter), "-o", str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    assert "two matrices now" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.tie_word_embeddings is False
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits, atol=1e-4)


def test_nothing_is_overwritten_and_a_plain_model_is_refused(tuned, tmp_path, capsys):
    adapter, _ = tuned()
    assert main(["merge", str(adapter)]) == 1
    assert "-o DIR" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    assert main(["merge", str(adapter), "-o", str(tmp_path / "there")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "base"), "-o", str(tmp_path / "out")]) == 1
    assert "nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
