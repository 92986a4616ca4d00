"""`lorica show`: models, adapters, runs and whole folders of adapters."""

from __future__ import annotations

import json

import pytest
from model_files import llama, save

import lorica
from lorica import Adapter, LoRA
from lorica.cli.main import main


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base")


def adapter(base, folder, method=None, stirred=True):
    from tiny import stir

    model, _ = lorica.load(base, dtype="fp32")
    lorica.inject(model, method or LoRA(r=4, alpha=8), "qv")
    if stirred:
        stir(model)
    Adapter.of(model).save(folder)
    return folder


def shown(capsys, *argv):
    assert main(["show", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_shows_its_size_and_the_names_of_its_layers(base, capsys):
    found = shown(capsys, base)
    assert found["kind"] == "model"
    assert found["parameters"] == sum(parameter.numel() for parameter in llama().parameters())
    assert "q_proj x2" in found["layers"]
    assert main(["show", str(base)]) == 0
    assert "next:  lorica train" in capsys.readouterr().out


def test_an_adapter_shows_its_scale_and_how_to_serve_it(base, tmp_path, capsys):
    found = shown(capsys, adapter(base, tmp_path / "a"), "--norms")
    assert (found["ranks"], found["scales"], found["dead"]) == ([4], [2.0], [])
    assert found["parameters"] == sum(t.numel() for t in Adapter.load(tmp_path / "a").tensors.values())
    assert "--max-lora-rank 8" in found["vllm"]["line"]
    assert 0 < found["norms"]["median"] <= found["norms"]["max"]
    assert main(["show", str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    assert "r 4, alpha 8 (x2)" in told and "dead       none" in told


def test_what_vllm_would_misread_is_told(base, tmp_path, capsys):
    found = shown(capsys, adapter(base, tmp_path / "a", LoRA(r=4, ranks={"q_proj": 2}, modules_to_save=("norm",))))
    assert found["ranks"] == [2, 4]
    assert "whole modules" in found["vllm"]["refused"] and "one scale" in found["vllm"]["refused"]


@pytest.mark.filterwarnings("ignore:.*change nothing yet")
def test_a_folder_of_adapters_is_one_table_with_the_faults(base, tmp_path, capsys):
    for name in ("a", "b"):
        adapter(base, tmp_path / "many" / name)
    adapter(base, tmp_path / "many" / "zero", stirred=False)
    broken = adapter(base, tmp_path / "many" / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    adapter(base, tmp_path / "many" / "run" / "best")
    rows = {row["name"]: row for row in shown(capsys, tmp_path / "many")["adapters"]}
    assert set(rows) == {"a", "b", "zero", "broken", "run/best"}
    assert rows["a"]["loads"] and not rows["a"]["fault"]
    assert "4 of 4 patches are zero" in rows["zero"]["fault"]
    assert not rows["broken"]["loads"] and "damaged" in rows["broken"]["fault"]
    assert main(["show", str(tmp_path / "many")]) == 0
    assert "broken" in capsys.readouterr().out


def test_a_run_shows_what_came_of_it(base, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {n}", "completion": f"{n} {n}"} for n in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    assert main(["train", str(base), str(data), "-o", str(run), "--steps", "2", "-q", "--sample", "0"]) == 0
    capsys.readouterr()
    found = shown(capsys, run)
    assert found["kind"] == "run" and found["finished"]
    assert found["result"]["steps"] == 2
    assert found["adapter"]["kind"] == "adapter"
    assert main(["show", str(run)]) == 0
    assert f"next:  lorica chat {run}" in capsys.readouterr().out
