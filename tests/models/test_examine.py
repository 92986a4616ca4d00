"""What `lorica doctor` knows: facts without a connection, and a small run that fails where something is broken."""

from __future__ import annotations

import json

import pytest
import torch

import lorica
from lorica import Adapter, models
from lorica.models import examine
from lorica.models.builtin import place


def test_the_facts_are_plain_json_and_name_versions_machine_and_caches(cache):
    report = examine.examine("cpu")
    assert json.loads(json.dumps(report)) == report
    assert report["versions"]["lorica"] == lorica.__version__ and report["versions"]["torch"] == torch.__version__
    assert report["machine"]["device"] == "cpu" and report["machine"]["cores"] >= 1
    assert report["machine"]["memory"] > 1e8 and report["machine"]["disk_free"] > 0


def test_caches_are_weighed_and_built_in_models_found(cache):
    assert examine.examine()["caches"]["lorica"]["bytes"] == 0
    place("minilm-l6").mkdir(parents=True)
    (place("minilm-l6") / "model.safetensors").write_bytes(b"1234")
    caches = examine.examine()["caches"]
    assert caches["lorica"]["bytes"] == 4
    assert caches["builtin"] == {alias: alias == "minilm-l6" for alias in models.BUILTIN}


def test_the_users_home_is_not_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORICA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert examine.examine()["caches"]["lorica"]["path"] == "~/.cache/lorica"


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(examine, "_EXTRAS", {"plot": ("rich", "no-such-package")})
    assert examine.examine()["extras"] == {"plot": ["no-such-package"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_small_run_passes_on_the_cpu_and_leaves_the_random_state(dtype):
    state = torch.get_rng_state()
    tested = examine.selftest("cpu", dtype)
    assert tested["ok"], tested
    assert list(tested["steps"]) == ["forward", "backward", "merge", "save", "load"]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_small_run_stops_at_what_is_broken_and_says_what(monkeypatch):
    def broken(self, folder):
        raise OSError("disk on fire")

    monkeypatch.setattr(Adapter, "save", broken)
    tested = examine.selftest("cpu", "fp32")
    assert not tested["ok"]
    assert tested["steps"] == {"forward": "ok", "backward": "ok", "merge": "ok", "save": "OSError: disk on fire"}


def test_the_small_run_notices_a_merge_that_does_something_else(monkeypatch):
    from lorica import patch

    merge = patch.merge

    def wrong(model):
        merge(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(0.1)

    monkeypatch.setattr(patch, "merge", wrong)
    assert "merging changed the logits" in examine.selftest("cpu", "fp32")["steps"]["merge"]
