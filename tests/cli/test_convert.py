"""`lorica convert`: one line for any program, and a table of what was read back."""

from __future__ import annotations

import json

import pytest
import torch
from model_files import save, write_gguf
from safetensors.torch import save_file

import lorica
from lorica import Adapter, LoRA
from lorica.cli.main import main
from tiny import stir


@pytest.fixture
def made(tmp_path):
    """An adapter folder of a small base, with two scales unless asked otherwise."""

    def make(**settings):
        base = save(tmp_path / "base")
        model, _ = lorica.load(base, dtype="fp32")
        lorica.inject(model, LoRA(r=4, **settings or {"alphas": {"v_proj": 6}}), "qv")
        stir(model)
        Adapter.of(model).save(tmp_path / "run/best")
        return tmp_path / "run"

    return make


def test_the_table_says_what_was_read_back_and_what_was_folded(made, tmp_path, capsys):
    assert main(["convert", str(made()), "--to", "vllm", "-o", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"wrote {tmp_path / 'out'} for vllm in fp32, ") and lines[0].endswith("read it back")
    assert lines[1].split() == ["update", "of", "layers", "largest", "element", "max", "difference"]
    assert [line.split()[:2] for line in lines[2:4]] == [["q_proj", "2"], ["v_proj", "2"]]
    assert lines[2].split()[-1] == "0"
    assert lines[4] == "folded the scales into B: 1.5, 4"
    line = f"vllm serve {tmp_path}/base --enable-lora --max-lora-rank 8 --lora-modules out={tmp_path}/out"
    assert lines[-1] == f"next:  {line}"


def test_json_gives_every_layer_its_difference(made, tmp_path, capsys):
    run = made(alpha=8)
    assert main(["convert", str(run), "--to", "gguf", "-o", str(tmp_path / "a.gguf"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["max_difference"] == 0
    assert len(told["differences"]) == 4
    assert told["next"].startswith("llama-cli -m ") and told["next"].endswith(f"--lora {tmp_path / 'a.gguf'}")


@pytest.mark.parametrize(("to", "out"), [("gguf", "a.gguf"), ("mlx", "a"), ("loralib", "a.safetensors")])
def test_show_and_eval_take_what_was_written(to, out, made, tmp_path, capsys):
    run, rows = made(alpha=8), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a 1 2 ", "completion": f"{i} a"}) + "\n" for i in range(4)))
    assert main(["convert", str(run), "--to", to, "-o", str(tmp_path / out), "-q"]) == 0
    capsys.readouterr()
    losses = []
    for thing in (run, tmp_path / out):
        assert main(["eval", str(thing), str(rows), "--json", "-q", "--dtype", "fp32"]) == 0
        losses.append(capsys.readouterr().out)
    first, second = (json.loads(text) for text in losses)
    assert first["results"][0]["loss"] == second["results"][0]["loss"]
    assert main(["show", str(tmp_path / out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "adapter" and shown["ranks"] == [4] and shown["scales"] == [2.0]
    assert shown["base"] == str(tmp_path / "base") and shown["file_bytes"] > 0


def test_loralib_needs_what_its_file_does_not_hold(tmp_path, capsys):
    torch.manual_seed(0)
    path = "transformer.h.0.attn.c_attn"
    state = {f"{path}.lora_A": torch.randn(4, 32), f"{path}.lora_B": torch.randn(64, 2)}
    save_file(state, tmp_path / "a.safetensors")
    asked = ["convert", str(tmp_path / "a.safetensors"), "--to", "peft", "-o", str(tmp_path / "out")]
    assert main(asked) == 1
    said = capsys.readouterr().err
    assert "--alpha" in said and "--slots c_attn=q,-,v" in said
    assert main([*asked, "--alpha", "8", "--slots", "c_attn"]) == 1
    assert "as in c_attn=q,-,v" in capsys.readouterr().err
    assert main([*asked, "--alpha", "8", "--slots", "c_attn=q,-,v", "--base", "gpt2"]) == 0
    assert "max difference" in capsys.readouterr().out
    back = Adapter.load(tmp_path / "out")
    assert [str(target) for target in back.targets] == [f"{path}[q]", f"{path}[v]"]
    assert back.meta["base_model"] == "gpt2"
    assert back.method.scale_of(path) == 4.0


def test_a_pickle_is_named_with_the_line_that_converts_it(tmp_path, capsys):
    torch.save({"a.lora_A": torch.ones(2, 4), "a.lora_B": torch.ones(4, 2)}, tmp_path / "a.bin")
    asked = ["convert", str(tmp_path / "a.bin"), "--to", "peft", "-o", str(tmp_path / "out")]
    assert main([*asked]) == 1
    assert f"lorica convert {tmp_path / 'a.bin'} --from loralib --alpha" in capsys.readouterr().err
    assert main([*asked, "--from", "loralib", "--alpha", "2"]) == 0
    assert Adapter.load(tmp_path / "out").method == LoRA(r=2, alpha=2)


def test_wrong_use_is_told(made, tmp_path, capsys):
    run = str(made(alpha=8))
    assert main(["convert", run, "-o", str(tmp_path / "out")]) == 2
    assert "TO is missing" in capsys.readouterr().err
    assert main(["convert", run, "--to", "onnx", "-o", str(tmp_path / "out")]) == 2
    assert main(["convert", run, "--to", "peft"]) == 1
    assert "-o OUT" in capsys.readouterr().err
    assert main(["convert", run, "--to", "peft", "-o", run]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main(["convert", run, "--to", "peft", "-o", str(tmp_path / "out"), "--alpha", "3"]) == 1
    assert "--alpha, --slots and --kernels are for loralib's files" in capsys.readouterr().err
    assert main(["convert", run, "--to", "peft", "-o", str(tmp_path / "out"), "--kernels", "conv1=wide"]) == 1
    assert "as in conv1=3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_is_no_adapter(tmp_path, capsys):
    for thing in (save(tmp_path / "base"), write_gguf(tmp_path / "model.gguf")):
        assert main(["convert", str(thing), "--to", "peft", "-o", str(tmp_path / "out")]) == 1
        assert "error: " in capsys.readouterr().err


def test_a_dry_run_reads_the_adapter_and_writes_nothing(made, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(made()), "--to", "vllm", "-o", str(out), "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "would write q_proj x2, v_proj x2 for vllm" in told.err
    assert ["to", "vllm", "flag"] in [line.split() for line in told.out.splitlines()]
    assert not out.exists()
