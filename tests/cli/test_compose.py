"""`lorica compose`: an expression over adapters, its faults shown where they are, and a table of what came of it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from model_files import save

import lorica
from lorica import Adapter, LoRA
from lorica.cli.main import main
from tiny import llama, stir


def make(path, seed, **settings):
    model = llama(tied=False)
    lorica.inject(model, LoRA(**{"r": 2, "alpha": 4} | settings), "qv")
    stir(model, seed)
    Adapter.of(model, meta={"base_model": "tiny"}).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make(folder / "runs/first-try/best", 0)
    make(folder / "b", 1, r=4)
    make(folder / "my-lora", 2)
    return folder


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    return tmp_path


def compose(expression, out, *more):
    return main(["compose", expression, "-o", str(out), *more])


def test_the_table_says_what_went_in_what_came_out_and_what_was_cut(here, capsys):
    assert compose("truncate(0.5*a + 0.5*b, r=3)", here / "c", "a=runs/first-try", "b=b") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["adapter", "r", "scale", "||dW||", "cos", "a", "cos", "b"]
    assert [line.split()[:3] for line in lines[1:4]] == [["a", "2", "2"], ["b", "4", "1"], ["result", "3", "1"]]
    a, b = Adapter.load("runs/first-try/best"), Adapter.load("b")
    cosine = a.inner(b) / (a.inner(a) * b.inner(b)) ** 0.5
    assert float(lines[1].split()[5]) == pytest.approx(cosine, abs=6e-4)
    whole, made = 0.5 * a + 0.5 * b, Adapter.load(here / "c")
    share = 1 - made.inner(made) / whole.inner(whole)
    assert lines[5] == f"cut        {share:.2%} of the energy, by truncate(0.5*a + 0.5*b, r=3)"
    assert lines[6].startswith(f"wrote      {here / 'c'}: ")
    assert lines[7] == f"next:  lorica eval {here / 'c'} DATA --compare base"
    assert made.sha256 == whole.truncate(r=3).sha256


@pytest.mark.parametrize(
    ("expression", "meant"),
    [
        ("runs/first-try + b", lambda a, b, c: a + b),
        ("runs/first-try - b*2", lambda a, b, c: a - b * 2),
        ("'my-lora' + -b", lambda a, b, c: c + -b),
        ("2*(./b - 'my-lora')*0.5", lambda a, b, c: 2 * (b - c) * 0.5),
        ("cat(b, my)", lambda a, b, c: b + c),
        ("ties(b, my, density=0.6) ", lambda a, b, c: Adapter.ties(b, c, density=0.6)),
        ("dare( b,my , density = 1-0.5, seed=3)", lambda a, b, c: Adapter.dare(b, c, density=0.5, seed=3)),
        ("truncate(b + my, energy=0.9)", lambda a, b, c: (b + c).truncate(energy=0.9)),
        ("truncate(b, energy=0.99, r=3)", lambda a, b, c: b.truncate(r=3, energy=0.99)),
    ],
)
def test_an_expression_means_what_it_means_in_python(expression, meant, here, capsys):
    names = ["my=my-lora"] if "my" in re.sub("'.*?'", "", expression) else []
    assert compose(expression, here / "c", *names, "-q") == 0
    a, b, c = (Adapter.load(path) for path in ("runs/first-try/best", "b", "my-lora"))
    assert Adapter.load(here / "c").sha256 == meant(a, b, c).sha256


def test_every_fault_is_shown_where_it_is(here, capsys):
    expression = "0.5*a + bb + b*b - tie(b, density=2) + my-lora + truncate(b, rank=2)"
    assert compose(expression, here / "c", "a=b", "x=b") == 1
    said = capsys.readouterr().err
    for what, where in (
        ("nothing here is called 'bb'; did you mean", "bb"),
        ("a product of two adapters is no adapter", "b*b"),
        ("no function is called 'tie'; did you mean 'ties'?", "tie"),
        ("nothing here is called 'my'; 'my-lora' is there: write it in quotes", "my"),
        ("truncate has no option 'rank'; its options: r, energy", "rank=2"),
        ("nothing here is called 'lora'", "lora"),
    ):
        line = next(place for place, line in enumerate(said.splitlines()) if what in line)
        assert said.splitlines()[line + 1].strip() == expression
        assert said.splitlines()[line + 2].rstrip() == " " * (4 + expression.index(where)) + "^" * len(where), what
    assert "x=b is not in the expression" in said
    assert not (here / "c").exists()


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("0.5*a +", "invalid syntax"),
        ("(a + b", "'(' was never closed"),
        ("2*3", "this is a number; an adapter was expected"),
        ("a + 1", "cannot be added; * multiplies"),
        ("a / 2", "only names, numbers, + - *"),
        ("a if b else a", "only names, numbers, + - *"),
        ("__import__('os')", "no function is called '__import__'"),
        ("a.truncate(r=2)", "no function is called 'a.truncate'"),
        ("truncate(a, b, r=1)", "truncate takes one adapter"),
        ("ties(density=1)", "ties takes an adapter"),
        ("ties(a, *b)", "only names, numbers, + - *"),
        ("ties(a, **b)", "ties has no option None"),
        ("truncate(a, r=0)", "truncate takes a rank r from 1 up"),
        ("truncate(a, r='x')", "r takes a number"),
        ("9" * 400 + "*a", "nested too deep, or a number is too big"),
        ("+" * 3000 + "a", "recursion"),
        ("", "invalid syntax"),
        ("nowhere/at-all + b", "nowhere/at-all"),
    ],
)
def test_what_is_no_expression_is_told_and_nothing_is_written(expression, why, here, capsys):
    assert compose(expression, here / "c", *(each for each in ("a=b", "b=b") if each[0] in expression)) in (1, 2)
    said = capsys.readouterr().err
    assert why in said and "not your fault" not in said
    assert not (here / "c").exists()


def test_options_truncate_the_result_and_the_file_may_be_half_as_large(here, capsys):
    assert compose("b + b", here / "c", "--energy", "1", "--rank", "4", "--dtype", "bf16", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["result"]["ranks"] == [4] and told["cuts"]["--rank 4 --energy 1"] == pytest.approx(0, abs=1e-9)
    assert told["parts"][0]["cosine"] == {"b": pytest.approx(1)}
    assert told["sha256"] == (2 * Adapter.load("b")).truncate(r=4).sha256 or told["bytes"] > 0
    made = Adapter.load(here / "c")
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in made.tensors.values())
    assert json.loads(made.meta["made_of"])["adapters"] == {Adapter.load("b").sha256[:12]: Adapter.load("b").sha256}


def test_nothing_is_overwritten_and_a_dry_run_writes_nothing(here, capsys):
    assert compose("b + b", here / "c", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "would be" in said and "expression" in said and not (here / "c").exists()
    (here / "c").mkdir()
    assert compose("b + b", here / "c") == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["compose", "b + b"]) == 1
    assert main(["compose", "a + b", "oops", "-o", str(here / "d")]) == 1
    assert "oops" in capsys.readouterr().err


def test_the_base_is_read_where_values_trained_whole_need_it(here, capsys):
    model, _ = lorica.load(save(here / "base"), dtype="fp32")
    table = model.get_input_embeddings().weight.detach().clone()
    lorica.inject(model, LoRA(r=2, token_rows=(3,)), "qv")
    stir(model)
    Adapter.of(model).save(here / "rows")
    Adapter.of(model, meta={"base_model": ""}).save(here / "unnamed")
    assert compose("0.5*r + 0.5*r", here / "same", f"r={here / 'unnamed'}") == 0
    assert compose("2*r", here / "no", f"r={here / 'unnamed'}") == 1
    assert "--base MODEL" in capsys.readouterr().err
    assert compose("2*r", here / "twice", f"r={here / 'rows'}") == 0
    assert compose("2*r", here / "too", f"r={here / 'unnamed'}", "--base", str(here / "base")) == 0
    once, twice, too = (Adapter.load(here / name) for name in ("rows", "twice", "too"))
    (key,) = (key for key in once.tensors if "tokens" in key)
    assert torch.allclose(twice.tensors[key], 2 * once.tensors[key] - table[3], atol=1e-6)
    assert twice.sha256 == too.sha256
