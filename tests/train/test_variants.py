"""Every variant of LoRA trains the real small model for a few updates, and its file is the adapter."""

from __future__ import annotations

import pytest
import torch

import lorica
from lorica import Adapter, TrainSettings
from lorica.data import Record

VARIANTS = {
    "rslora": {"scaling": "alpha/sqrt(r)"},
    "lora+": {"lr_ratio": 16.0},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "gradient": {"init": "gradient"},
}
CAPITALS = ("Paris France", "Rome Italy", "Madrid Spain", "Berlin Germany", "Vienna Austria", "Athens Greece")
ROWS = [
    Record("pair", prompt=f"{country} ->", completion=f" {town}, of course!")
    for town, country in (pair.split() for pair in CAPITALS)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_and_its_file_says_the_same(name, tmp_path):
    model, tok = lorica.load("smollm2-135m", dtype="fp32")
    settings = TrainSettings(rank=4, steps=4, batch=6, sample=0, warmup=0.0, keep="adapter", **VARIANTS[name])
    run = lorica.train(model, tok, (ROWS, ROWS[:3]), settings, out=tmp_path / "run")
    assert run.after < 0.8 * run.before
    ids = torch.tensor([tok("France ->")["input_ids"]])
    with torch.no_grad():
        said = model(ids).logits
        lorica.eject(model)
        Adapter.load(run.path / "best").apply(model)
        loaded = model(ids).logits
    assert (said - loaded).abs().max() < 1e-4 * said.abs().max()
