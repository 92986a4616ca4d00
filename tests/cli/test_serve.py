"""`lorica serve`: what it plans and refuses, and a process that answers as the models do alone."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import lorica
from lorica import data, evaluate, models
from lorica.cli.main import main

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A model folder, and a folder of two adapters."""
    spec = importlib.util.spec_from_file_location("small", Path(__file__).parents[1] / "evaluate" / "conftest.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    path = tmp_path_factory.mktemp("things")
    base = Path(small.make_folder(path / "model"))
    for seed, name in enumerate("ab", 1):
        small.make_adapter(str(base), path / "adapters" / name, seed)
    return base, path / "adapters"


def test_the_plan_tells_memory_without_loading(things, capsys, monkeypatch):
    base, adapters = things
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("it was loaded"))
    argv = ["serve", str(base), f"x={adapters / 'a'}", "--adapters", str(adapters), "--dtype", "fp32", "--dry-run"]
    assert main([*argv, "--kv-memory", "1MB"]) == 0
    told = capsys.readouterr().out
    config = json.loads((base / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    each = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * 4
    assert f"{1_000_000 // each:,} tokens in 1.0 MB" in told
    assert ("up to 500.0 kB for those of running answers" in told) == (models.resolve_device().type != "cuda")
    model, _ = lorica.load(base)
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert f"model   {weights / 1e3:,.1f} kB in fp32" in told
    assert [line.split()[1] for line in told.splitlines() if line.startswith("adapter ")] == ["x", "a", "b"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "--keys FILE, or --open"),
        (["--kv-memory", "much"], "--kv-memory is 'much'; it must be a size"),
        (["--concurrency", "0", "--timeout", "0"], "--concurrency must be 1 or more\n--timeout and"),
        (["--merge-dominant", "--deterministic"], "--merge-dominant changes the last bits"),
        (["--merge-dominant", "--quantize", "nf4"], "--merge-dominant needs a base that is not quantised"),
        (["--keys", "k.toml", "--open"], "--open is for a server without --keys"),
    ],
)
def test_wrong_use_is_told_before_anything_is_loaded(things, capsys, flags, told):
    assert main(["serve", str(things[0]), *flags]) == 2
    assert told in capsys.readouterr().err


def test_every_adapter_that_cannot_be_served_is_told_at_once(things, capsys, tmp_path):
    base, adapters = things
    (tmp_path / "empty").mkdir()
    argv = ["serve", str(base), "nopath", f"a={adapters / 'a'}", f"a={adapters / 'b'}", f"e={tmp_path / 'empty'}"]
    assert main(argv) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: these adapters cannot be served:"
    assert [line.split(":")[0].split("=")[0].strip() for line in lines[1:]] == ["nopath", "a", "e"]


def test_an_adapter_is_served_on_the_base_that_it_names(things):
    from lorica.serve.http.opening import resolve

    base, adapters = things
    thing = resolve(str(adapters / "a"), [f"other={adapters / 'b'}"])
    assert (thing.base, thing.name) == (str(base), "model")
    assert dict(thing.adapters) == {"a": adapters / "a", "other": adapters / "b"}
    assert resolve(str(base), [], "mine").name == "mine"


def alone(thing, text):
    opened = models.open_thing(thing, dtype="fp32")
    ids, _ = data.prompt_ids(data.Record("chat", messages=[{"role": "user", "content": text}]), opened.tok)
    return evaluate.generate(opened.model, opened.tok, [ids], max_new=8)[0]


def test_a_process_answers_as_each_model_does_alone_and_ends_with_0(things, tmp_path):
    base, adapters = things
    argv = [sys.executable, "-m", "lorica", "serve", str(base), f"x={adapters / 'a'}", "--adapters", str(adapters)]
    flags = ["--port", "0", "--dtype", "fp32", "--json", "--kv-memory", "4MB", "--log", str(tmp_path / "log.jsonl")]
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen([*argv, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as it:
        try:
            told = json.loads(it.stdout.readline() or it.stderr.read())
            assert told["adapters"] == ["a", "b", "x"] and told["base"] == "model"

            def ask(model, text):
                body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
                request = urllib.request.Request(
                    f"{told['url']}/chat/completions",
                    json.dumps(body | {"max_tokens": 8}).encode(),
                    {"content-type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return json.load(reply)["choices"][0]["message"]["content"]

            said = {model: ask(model, "hi") for model in ("model", "a", "b", "x")}
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask("c", "hi")
            it.send_signal(signal.SIGTERM)
            assert it.wait(20) == 0, it.stderr.read()
        finally:
            it.kill()
    assert said == {
        "model": alone(base, "hi"),
        "a": alone(adapters / "a", "hi"),
        "b": alone(adapters / "b", "hi"),
        "x": alone(adapters / "a", "hi"),
    }
    assert len(set(said.values())) == 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5
