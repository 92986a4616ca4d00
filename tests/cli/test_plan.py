"""`lorica plan`: a table for people, one object for programs."""

from __future__ import annotations

import json

import pytest

from lorica.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return path


def test_a_folder_with_a_config_alone_has_a_plan(folder, capsys):
    assert main(["plan", str(folder), "--len", "64", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert "full fine-tuning" in out and "nf4" in out and "fits" in out
    assert out.splitlines()[-1].startswith("next:  lorica plan")


def test_json_holds_every_plan(folder, capsys):
    assert main(["plan", str(folder), "--len", "64", "--rank", "4", "--dtype", "fp32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["trainable"] == 6 * 4 * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)
    totals = {name: each["total_bytes"] for name, each in told["plans"].items()}
    assert (
        totals["  with checkpointing"]
        < totals["lora r 4, alpha 16 (x4), all-linear, fp32"]
        < totals["full fine-tuning, fp32"]
    )


def test_the_papers_largest_model_shows_the_papers_claims(capsys):
    assert main(["plan", "gpt3-175b", "--targets", "qv", "--rank", "4", "--dtype", "fp16"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "paper: 350 GB" in out and "9,251" in out


def test_an_unknown_model_is_an_error(capsys):
    assert main(["plan", "./no-such-thing"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_the_papers_parameter_counts_are_a_table_that_ends_with_the_marks(capsys):
    assert main(["plan", "--params", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("15 ") and "603.8M" in line and "603,979,776" in line and "misprint" in line
               for line in lines)  # fmt: skip
    assert any("by formula" in line for line in lines)
    assert lines[-2] == "64 ok, 17 misprints, 16 nominal"
    assert lines[-1].startswith("next:  lorica plan")


def test_the_papers_parameter_counts_are_one_object(capsys):
    assert main(["plan", "--params", "paper", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["marks"] == {"ok": 64, "misprint": 17, "nominal": 16}
    row = next(row for row in told["rows"] if row["table"] == "2" and row["model"] == "DeBERTa XXL" and row["settings"])
    assert (row["printed"], row["formula"], row["counted"], row["mark"]) == ("4.7M", 4_718_592, 4_718_592, "ok")


def test_a_plan_without_a_model_is_wrong_use(capsys):
    assert main(["plan"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err
