"""Both engines: mixed batches are exact, whatever comes, goes, is reloaded or cancelled meanwhile."""

from __future__ import annotations

import gc
import random
import threading
import time

import pytest
import torch

from lorica import Adapter, LoRA
from lorica.errors import LoricaError
from lorica.serve import check, open_engine, recorded
from lorica.serve.bridge import Bridge
from lorica.serve.engine import FACTS, EngineSettings, Sampling, TooLong
from lorica.serve.plain import Plain
from lorica.serve.rows import Layers
from lorica.serve.store import Store
from serving import alone, base, merged, prompt, saved, trained

SMALL = EngineSettings(requests=6, batch_tokens=24, kv_tokens=1024, page=16)


class Running:
    """An engine and a store over one base."""

    def __init__(self, root, family="llama", kind=Bridge, settings=SMALL, ends=(), device="cpu", **options):
        self.model = base(family).to(device)
        layers = Layers(self.model)
        self.store = Store(layers.read, root, every=0.02, **options)
        self.engine = kind(self.model, layers, settings, ends)

    def __enter__(self):
        self.engine.start()
        return self

    def __exit__(self, *_):
        self.engine.stop()
        self.store.close()

    def ask(self, name, ids, count=12, space="", **sampling):
        lease = self.store.lease(name) if name else None
        return self.engine.submit(ids, Sampling(count, ignore_eos=True, **sampling), lease, space)


def said(stream) -> list[int]:
    tokens, end = stream.result()
    assert end.reason in ("length", "stop"), end
    return [token.id for token in tokens]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def running(root):
    with Running(root) as running:
        yield running


@pytest.fixture
def recording(monkeypatch):
    """Take the steps that a GPU records, and run them."""
    monkeypatch.setattr(recorded, "pays", lambda model: True)


@pytest.fixture(params=["call by call", "recorded"])
def either(request, monkeypatch):
    """Steps as on a CPU, and as on a GPU."""
    monkeypatch.setattr(recorded, "pays", lambda model: request.param == "recorded")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("family, kind", [("llama", Bridge), ("gpt2", Bridge), ("phi3", Bridge), ("llama", Plain)])
def test_a_mixed_batch_gives_what_each_request_alone_gives_on_merged_weights(tmp_path, family, kind):
    """Every adapter and the base, twice with one long shared prompt and with others; chunks, the prefix cache and more
    requests than the batch takes are all in it."""
    shared = prompt(0, 40)
    jobs = [(name, shared) for name in merged(family)] * 2
    jobs += [(name, prompt(place, 3 + 7 * place)) for place, name in enumerate(merged(family))]
    with Running(saved(tmp_path, family), family, kind) as running:
        streams = [running.ask(name, ids) for name, ids in jobs]
        results = [stream.result() for stream in streams]
        facts = running.engine.facts()
    for (name, ids), (tokens, end) in zip(jobs, results, strict=True):
        assert [token.id for token in tokens] == alone(merged(family)[name], ids), name
        assert end.reason == "length"
    assert set(facts) == set(FACTS)
    assert facts["generated_tokens"] == 12 * len(jobs) and facts["running"] == facts["waiting"] == 0
    if kind is Bridge:
        assert 0 < facts["cached_tokens"] == sum(end.cached_tokens for _, end in results)
        assert len({tuple(token.id for token in tokens) for tokens, _ in results[: len(merged(family))]}) > 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_steps_as_a_gpu_records_them_give_the_same(tmp_path, family, device, recording):
    """DoRA is not among them, nor are steps in which a prompt is read."""
    names = list(merged(family))
    jobs = [(name, prompt(place, 3 + place), 8 + 3 * place) for place, name in enumerate(names)]
    jobs += [(None, prompt(0, 300), 20), (names[1], prompt(3, 1), 5), (names[2], prompt(4, 9), 30)]
    with Running(saved(tmp_path, family), family, device=device) as running:
        assert said(running.ask(None, [7, 8])) == alone(merged(family)[None], [7, 8])
        streams = [running.ask(name, ids, count) for name, ids, count in jobs]
        for stream, (name, ids, count) in zip(streams, jobs, strict=True):
            assert said(stream) == alone(merged(family)[name], ids, count), name
        recorder = running.engine.recorder
        assert recorder.fits and len(recorder._passes) > 2
        assert {room is None for room, *_ in recorder._passes} == {True, False}
        assert all(bool(each.graph) == (device == "cuda") for each in recorder._passes.values())


def test_adapters_keep_their_rows_and_give_them_back(tmp_path):
    layers = Layers(base())
    made = {name: layers.rows(Adapter.of(merged()[name])) for name in ("qv", "qv2", "qv3")}
    room = recorded.Room(layers, tuple(sorted(made["qv"].ups)), 8)
    room.place([made["qv"], made["qv2"]])
    before = list(room.places.values())
    room.place([made["qv2"]])
    assert list(room.places.values()) == before  # nobody asked for its rows
    room.place([made["qv2"], made["qv3"]])
    assert room.places == {made["qv2"]: 4, made["qv3"]: 0}
    del made["qv2"]
    gc.collect()
    assert list(room.places.values()) == [0]


def test_a_prefix_is_shared_within_an_adapter_only(running):
    """The trap: blocks known by their tokens alone would give one adapter the keys of another."""
    ids = prompt(99, 49)
    first = running.ask("r2", ids).result()
    for name in ("rslora", None, "patterns"):
        tokens, end = running.ask(name, ids).result()
        assert end.cached_tokens == 0
        assert [token.id for token in tokens] == alone(merged()[name], ids)
    again = running.ask("r2", ids).result()
    assert again[1].cached_tokens == 48 and again[0] == first[0]


def test_a_prefix_is_shared_within_a_space_only(running):
    """Else who is told how much of a prompt was in the cache learns what another tenant asked."""
    ids = prompt(98, 49)
    for name in ("r2", None):
        for space in ("", "support", "ops"):
            tokens, end = running.ask(name, ids, space=space).result()
            assert end.cached_tokens == 0
            assert [token.id for token in tokens] == alone(merged()[name], ids)
            assert running.ask(name, ids, space=space).result()[1].cached_tokens == 48


def test_what_can_never_be_served_is_refused_before_it_reaches_the_loop(running):
    most = running.engine.max_context
    with pytest.raises(TooLong, match=f"{most:,}"):
        running.ask("qv", [5] * most)
    for ids in ([], [-1], [64]):
        with pytest.raises(LoricaError):
            running.ask("qv", ids)
    assert all(status.leases == 0 for status in running.store.status())
    longest = prompt(1, most - 3)
    assert len(said(running.ask("qv", longest, 50))) == 3  # up to the context, and the loop lives
    assert running.engine.alive and said(running.ask(None, [5])) == alone(merged()[None], [5])


def test_requests_that_together_need_more_than_the_cache_take_turns(running):
    jobs = [(name, prompt(place, 400)) for place, name in enumerate(["qv", "r2", None, "qv2", "rslora"])]
    streams = [running.ask(name, ids, 40) for name, ids in jobs]
    for stream, (name, ids) in zip(streams, jobs, strict=True):
        assert said(stream) == alone(merged()[name], ids, 40)
    assert running.engine.facts()["restarts"] == 0


@pytest.mark.parametrize("kind", [Bridge, Plain])
def test_a_cancelled_request_ends_soon_and_gives_its_lease_back(root, kind):
    with Running(root, kind=kind) as running:
        stream = running.ask("qv", prompt(0, 5), 900)
        other = running.ask("r2", prompt(1, 5))
        next(stream)
        stream.cancel()
        stream.cancel()
        *_, end = list(stream)
        assert end.reason == "cancelled"
        assert said(other) == alone(merged()["r2"], prompt(1, 5))
        assert all(status.leases == 0 for status in running.store.status())


@pytest.mark.parametrize("kind", [Bridge, Plain])
def test_stopping_ends_everything_as_cancelled_and_gives_the_model_back(root, kind):
    running = Running(root, kind=kind)
    before = running.model.config._attn_implementation
    with running:
        streams = [running.ask(name, prompt(0, 5), 300) for name in ("qv", None, "r2")]
        next(streams[0])
    assert [list(stream)[-1].reason for stream in streams] == ["cancelled"] * 3
    assert not running.engine.alive and running.model.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in running.model.modules())
    with pytest.raises(LoricaError, match="not running"):
        running.ask("qv", [5])


@pytest.mark.parametrize("kind", [Bridge, Plain])
def test_what_is_submitted_while_it_stops_ends_too(root, kind, monkeypatch):
    with Running(root, kind=kind) as running:
        requests, check = running.engine.requests, running.engine.requests._check
        stopping = threading.Thread(target=running.engine.stop)

        def checked(ids):
            check(ids)
            stopping.start()
            stopping.join(0.5)

        monkeypatch.setattr(requests, "_check", checked)
        assert running.ask("qv", prompt(3, 20)).result()[1].reason in ("cancelled", "length")
        stopping.join()
        assert all(status.leases == 0 for status in running.store.status())


def test_end_tokens_stop_a_text_and_are_not_part_of_it(root):
    ids = prompt(3, 8)
    whole = alone(merged()["qv"], ids)
    stop = next(id for id in whole if id != whole[0])
    until = whole[: whole.index(stop)]
    with Running(root, ends=(stop,)) as running:
        lease = running.store.lease
        for sampling, wanted, reason in (
            (Sampling(12), until, "stop"),
            (Sampling(12, ignore_eos=True), whole, "length"),
            (Sampling(12, ignore_eos=True, stop_ids=(stop,)), until, "stop"),
        ):
            tokens, end = running.engine.submit(ids, sampling, lease("qv")).result()
            assert ([token.id for token in tokens], end.reason) == (wanted, reason)


def test_a_seed_gives_its_tokens_whatever_else_is_in_the_batch(running):
    settings = {"temperature": 0.8, "top_p": 0.95, "top_k": 20, "seed": 5, "logprobs": 2}
    alone_ = running.ask("qv", prompt(2, 9), 20, **settings).result()[0]
    noise = [running.ask(name, prompt(place, 30), 20, temperature=1.0) for place, name in enumerate(merged())]
    mixed = running.ask("qv", prompt(2, 9), 20, **settings).result()[0]
    assert [token.id for token in mixed] == [token.id for token in alone_]
    assert all(abs(a.logprob - b.logprob) < 1e-3 and len(b.top) == 2 for a, b in zip(alone_, mixed, strict=True))
    for stream in noise:
        stream.result()


def test_a_reload_in_flight_changes_the_next_request_and_not_the_running_one(tmp_path):
    ids = prompt(4, 40)
    old, new = (trained("llama", LoRA(r=4), "all-linear", seed) for seed in (50, 51))
    Adapter.of(old).save(tmp_path / "x")
    with Running(tmp_path) as running:
        first = running.ask("x", ids, 200)
        next(first)
        Adapter.of(new).save(tmp_path / "x")
        lease = running.store.load("x")
        assert lease.wait(5)
        second = running.engine.submit(ids, Sampling(12, ignore_eos=True), lease)
        assert said(second) == alone(new, ids)
        assert said(first) == alone(old, ids, 200)[1:]
        assert running.ask("x", ids).result()[1].cached_tokens == 32  # the new generation's own


@pytest.mark.usefixtures("either")
def test_eviction_in_flight_touches_nobody(root):
    with Running(root, limit=140_000) as running:  # room for a few of them
        names = [name for name in merged() if name] * 3
        random.Random(0).shuffle(names)
        jobs = [(name, prompt(place, 20)) for place, name in enumerate(names)]
        streams = [running.ask(name, ids) for name, ids in jobs]
        for stream, (name, ids) in zip(streams, jobs, strict=True):
            assert said(stream) == alone(merged()[name], ids)
        assert running.store.evictions > 0 and running.store.nbytes <= 140_000


def test_an_adapter_that_cannot_be_read_fails_its_own_request_only(root, tmp_path):
    (tmp_path / "broken").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "broken" / name).write_text("{}")
    with Running(root, named={"broken": tmp_path / "broken"}) as running:
        bad, good = running.ask("broken", [5]), running.ask("qv", [5])
        tokens, end = bad.result()
        assert not tokens and end.reason == "error" and "broken" in end.error
        assert said(good) == alone(merged()["qv"], [5])


@pytest.mark.usefixtures("either")
def test_a_loop_that_dies_is_built_again_and_texts_go_on(root, monkeypatch):
    from lorica.serve import bridge

    deaths, choose = iter([False, False, False, True, False, False, False, False]), bridge.choose

    def fragile(*args):
        if next(deaths, False):
            raise RuntimeError("out of something")
        return choose(*args)

    monkeypatch.setattr(bridge, "choose", fragile)
    jobs = [("qv", prompt(0, 9)), (None, prompt(1, 30)), ("r2", prompt(2, 5))]
    with Running(root) as running:
        streams = [running.ask(name, ids) for name, ids in jobs]
        for stream, (name, ids) in zip(streams, jobs, strict=True):
            assert said(stream) == alone(merged()[name], ids)
        assert running.engine.facts()["restarts"] == 1 and running.engine.alive


def test_a_request_that_kills_the_loop_each_time_fails_and_the_next_one_is_served(root, monkeypatch):
    from lorica.serve import bridge

    choose = bridge.choose

    def poisoned(logits, choosers):
        if any(chooser.sampling.top_k == 13 for chooser in choosers):
            raise RuntimeError("poison")
        return choose(logits, choosers)

    monkeypatch.setattr(bridge, "choose", poisoned)
    with Running(root) as running:
        _, end = running.ask("qv", [5], temperature=1.0, top_k=13).result()
        assert end.reason == "error" and "poison" in end.error
        assert said(running.ask("qv", [5])) == alone(merged()["qv"], [5])
        assert running.engine.facts()["restarts"] == 2 and running.engine.alive
        assert all(status.leases == 0 for status in running.store.status())


@pytest.mark.parametrize("kind", [Bridge, Plain])
def test_nothing_runs_inside_a_pause(root, kind):
    with Running(root, kind=kind) as running:
        stream = running.ask("qv", prompt(0, 5), 300)
        next(stream)
        with running.engine.pause():
            steps = running.engine.facts()["steps"]
            time.sleep(0.05)
            assert running.engine.facts()["steps"] == steps
        assert said(stream) == alone(merged()["qv"], prompt(0, 5), 300)[1:]


def test_many_threads_ask_cancel_and_reload_at_random(root):
    names, faults = [*merged()], []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(15):
            name, ids = draw.choice(names), prompt(draw.randrange(1000), draw.randrange(1, 60))
            try:
                stream = running.ask(name, ids, draw.randrange(1, 12))
            except TooLong:
                continue
            if draw.random() < 0.3:
                stream.cancel()
            if name and draw.random() < 0.2:
                running.store.load(name).release()
            tokens, end = stream.result()
            if end.reason == "error" or [t.id for t in tokens] != alone(merged()[name], ids)[: len(tokens)]:
                faults.append((name, ids, tokens, end))

    with Running(root, limit=140_000) as running:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not faults and not any(thread.is_alive() for thread in threads)
        facts = running.engine.facts()
        assert facts["running"] == facts["waiting"] == facts["kv_blocks_used"] == facts["restarts"] == 0
        assert all(status.leases == 0 for status in running.store.status())


def test_the_best_engine_is_opened_checked_and_the_reason_for_another_is_told(monkeypatch):
    model = base()
    engine, note = open_engine(model, Layers(model), SMALL)
    try:
        assert isinstance(engine, Bridge) and not note
    finally:
        engine.stop()
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    engine, note = open_engine(model, Layers(model), SMALL)
    try:
        assert isinstance(engine, Plain) and "5.99.0" in note
        assert [t.id for t in engine.submit([5], Sampling(3, ignore_eos=True), None).result()[0]] == alone(
            model, [5], 3
        )
    finally:
        engine.stop()


def test_a_deterministic_engine_gives_the_same_bits_whatever_else_is_asked(root, monkeypatch):
    monkeypatch.setattr("lorica.kernels.few.most", lambda W: pytest.fail("a way was chosen by its speed"))
    model = base()
    layers = Layers(model, deterministic=True)
    store = Store(layers.read, root)
    engine, note = open_engine(model, layers, SMALL)

    def ask(name, place, **sampling):
        lease = store.lease(name) if name else None
        return engine.submit(prompt(place, 40), Sampling(12, ignore_eos=True, logprobs=3, **sampling), lease)

    mine = [("r2", 0, {}), ("qv", 0, {"temperature": 1.0, "seed": 4}), (None, 0, {})]
    try:
        assert "by itself" in note
        by_itself = [ask(name, place, **more).result() for name, place, more in mine]
        others = [ask(name, place) for place, name in enumerate(["qv2", "r64", None, "qv3"], start=1)]
        among = [ask(name, place, **more) for name, place, more in mine]
        assert [each.result() for each in among] == by_itself  # floats and all, and nothing from a prefix cache
        for each in others:
            each.result()
    finally:
        engine.stop()
        store.close()


def test_the_check_at_the_start_sees_a_prefix_cache_that_ignores_adapters(monkeypatch):
    monkeypatch.setattr("lorica.serve.bridge._salted", lambda ids, digest, vocab: ids)
    with pytest.raises(LoricaError, match="merged weights"):
        check.adapters_are_exact(Bridge)


def test_the_check_at_the_start_sees_rows_that_are_mixed_up(monkeypatch):
    plan = Layers.plan

    def wrong(self, parts, kept=None):
        return plan(self, [(None, count) for _, count in parts], kept)

    monkeypatch.setattr(Layers, "plan", wrong)
    with pytest.raises(LoricaError, match="merged weights"):
        check.adapters_are_exact(Bridge)


def test_a_model_with_a_window_is_served_exactly():
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, attn_implementation="eager",
    )  # fmt: skip
    from serving import loud

    model = loud(transformers.MistralForCausalLM(config).eval())
    wanted = [alone(model, prompt(seed, 30)) for seed in range(3)]
    engine = Bridge(model, Layers(model), SMALL)
    engine.start()
    try:
        streams = [engine.submit(prompt(seed, 30), Sampling(12, ignore_eos=True), None) for seed in range(3)]
        assert [said(stream) for stream in streams] == wanted
    finally:
        engine.stop()
