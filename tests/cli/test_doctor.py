"""`lorica doctor` prints facts to paste, as lines or as one object."""

from __future__ import annotations

import json

import pytest

from lorica import models
from lorica.cli import doctor
from lorica.cli.main import main
from lorica.models import examine

REPORT = {
    "versions": {"lorica": "1.2", "python": "3.12.1", "torch": "2.13.0"},
    "machine": {
        "system": "Linux 6 x86_64",
        "device": "cuda",
        "bf16": True,
        "dtype": "bfloat16",
        "cores": 8,
        "threads": 4,
        "memory": 64_000_000_000,
        "memory_free": 500_000_000,
        "disk_free": 1_234_000_000_000,
        "cuda": "13.0",
        "gpus": [{"name": "Some GPU", "memory": 80_000_000_000}],
    },
    "extras": {"data": [], "plot": ["matplotlib"]},
    "pip": False,
    "caches": {
        "lorica": {"path": "~/.cache/lorica", "bytes": 2_000_000},
        "hub": {"path": "~/hub", "bytes": 0, "token": True},
        "builtin": {"smollm2-135m": True, "minilm-l6": False},
    },
    "selftest": {"ok": True, "seconds": 1.25, "dtype": "bfloat16", "steps": {"forward": "ok", "merge": "ok"}},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path))


def test_every_fact_is_one_line():
    text = [f"{label}: {line}" for label, line in doctor.lines(REPORT)]
    assert text == [
        "lorica: 1.2   python 3.12.1   Linux 6 x86_64",
        "packages: torch 2.13.0",
        "device: cuda   bf16 yes   auto dtype bfloat16",
        "cuda:0: Some GPU   80.0 GB   cuda 13.0",
        "cores: 8   torch threads 4",
        "memory: 64.0 GB   free 500.0 MB",
        "disk: free 1,234.0 GB",
        "extra: data   installed",
        'extra: plot   missing matplotlib: pip install "lorica[plot]"',
        "pip: missing, so no built-in model can be fetched: python -m ensurepip",
        "cache: ~/.cache/lorica   2.0 MB   built in: smollm2-135m",
        "hub: ~/hub   0.0 MB   token found",
        "self-test: forward, merge: ok in 1.2 s (bfloat16)",
        "next: lorica quickstart",
    ]


def test_a_failed_self_test_says_where_and_why_and_exits_with_1(monkeypatch, capsys):
    failed = {"ok": False, "seconds": 1.0, "dtype": "float32", "steps": {"forward": "ok", "backward": "no gradient"}}
    monkeypatch.setattr(examine, "selftest", lambda device, dtype: failed)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "backward FAILED (float32): no gradient" in capsys.readouterr().out


def test_json_prints_the_whole_report_as_one_object(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["selftest"]["ok"] and set(report["caches"]["builtin"]) == set(models.BUILTIN)


def test_it_runs_on_this_machine(capsys):
    assert main(["doctor", "--device", "cpu", "--dtype", "fp32"]) == 0
    assert "ok in" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_an_error(capsys):
    assert main(["doctor", "--device", "gpu"]) == 1
    assert "unknown device 'gpu'" in capsys.readouterr().err
