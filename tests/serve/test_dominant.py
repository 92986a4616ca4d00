"""The adapter with most of the tokens is merged: the same answers meanwhile, and the same weights afterwards."""

from __future__ import annotations

import pytest
import torch

from lorica.serve import dominant
from lorica.serve.bridge import Bridge
from lorica.serve.dominant import Dominant
from lorica.serve.engine import EngineSettings
from lorica.serve.plain import Plain
from serving import alone, merged, prompt, saved

from .test_engines import Running, said


@pytest.fixture(params=[Bridge, Plain], ids=lambda kind: kind.__name__)
def watched(request, tmp_path):
    """A running engine, what watches it (looking only when asked), and what was told."""
    settings = EngineSettings(requests=6, batch_tokens=24, kv_tokens=1024, page=16)
    with Running(saved(tmp_path), kind=request.param, settings=settings) as running:
        told: list[str] = []
        layers = running.engine.layers
        watch = Dominant(running.engine, layers, running.store, told.append, every=3600, least=20)
        yield running, watch, told
        watch.close()
        assert layers.merged is None and all(status.leases == 0 for status in running.store.status())


def weights_of(running):
    return {name: each.clone() for name, each in running.model.named_parameters()}


def test_every_request_says_the_same_while_one_adapter_is_merged(watched):
    running, watch, told = watched
    before = weights_of(running)
    said(running.ask("rslora", prompt(0, 30)))
    watch.look()
    assert watch.merged and watch.merged.difference < 1e-4 and "rslora has 100% of the tokens: merged" in told[0]
    assert any(not torch.equal(each, before[name]) for name, each in running.model.named_parameters())
    jobs = [(name, prompt(place, 3 + 7 * place)) for place, name in enumerate([*merged(), "rslora", None, "dora"])]
    streams = [running.ask(name, ids) for name, ids in jobs]
    for (name, ids), stream in zip(jobs, streams, strict=True):
        assert said(stream) == alone(merged()[name], ids), name
    watch.look()  # one among many now
    assert watch.merged is None and told[-1] == "rslora is not merged any more"
    assert all(torch.equal(each, before[name]) for name, each in running.model.named_parameters())
    for name, ids in jobs[:3]:
        assert said(running.ask(name, ids)) == alone(merged()[name], ids)


def test_a_merge_in_the_middle_of_a_text_changes_none_of_it(watched):
    running, watch, _ = watched
    streams = {name: running.ask(name, prompt(3, 20), 60) for name in ("rslora", None, "qv", "dora")}
    for stream in streams.values():
        next(stream)
    with running.store.lease("rslora") as lease:
        rows = lease.generation.payload
    watch.merge(rows, 1.0)
    assert watch.merged
    for name, stream in streams.items():
        tokens, _ = stream.result()
        assert [token.id for token in tokens] == alone(merged()[name], prompt(3, 20), 60)[1:]


def test_a_merge_that_fails_leaves_everything_as_it_was(watched, monkeypatch):
    running, watch, told = watched
    before = weights_of(running)
    said(running.ask("rslora", prompt(0, 30)))
    calls = iter([torch.zeros(1), None])

    def broken(rows):
        if (found := next(calls)) is None:
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(watch, "_logits", broken)
    watch.look()
    assert watch.merged is None and "cannot be merged: out of memory" in told[0]
    assert all(torch.equal(each, before[name]) for name, each in running.model.named_parameters())
    assert said(running.ask("rslora", prompt(1, 9))) == alone(merged()["rslora"], prompt(1, 9))
    said(running.ask("rslora", prompt(0, 30)))
    watch.look()
    assert len(told) == 1  # it is not tried again


def test_what_cannot_be_merged_is_told_once(watched, monkeypatch):
    running, watch, told = watched
    for _ in range(2):
        said(running.ask("dora", prompt(0, 30)))
        watch.look()
    assert watch.merged is None and len(told) == 1 and "no low rank" in told[0]
    monkeypatch.setattr(dominant.psutil, "virtual_memory", lambda: type("Free", (), {"available": 10})())
    said(running.ask("qv", prompt(0, 200)))
    watch.look()
    assert watch.merged is None and "10 are free" in told[1]


def test_counting_forgets_adapters_that_nobody_asks_for(watched):
    running, watch, _ = watched
    for name in merged():
        said(running.ask(name, prompt(0, 10)))
    assert len(watch.layers.tokens) == len(merged())
    for _ in range(12):
        said(running.ask(None, prompt(0, 30)))
        watch.look()
    assert set(watch.layers.tokens) == {None}
