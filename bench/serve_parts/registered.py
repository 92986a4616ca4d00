"""What it costs that adapters are many: registered, and more of them than memory holds.

Sixteen ask at a time, each anew when it is answered. Throughput with as many registered as there are is compared with
few, once under Zipf traffic (few then also means fewer distinct ones in a step), once with sixteen distinct ones in
every step on both sides. The wait for the first token is compared between all in memory and half of them.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import threading
from pathlib import Path
from typing import Any

import lorica
from lorica.serve.engine import Sampling
from lorica.serve.store import Store
from serve_parts import timing
from serve_parts.served import Served, adapters_in, made, prompts
from serve_parts.timing import in_turn, medians, rates

ASKERS = 16
PROMPT, ANSWER = 16, 16  # tokens; short prompts, since it is decoding that adapters make slower
TRAFFIC = 64  # adapters that are asked where half of them fit


def run(options: Any) -> dict[str, Any]:
    """Ratios of throughput, and of waits."""
    each = -(-options.requests // ASKERS)
    with adapters_in(options) as folder:
        first = _register(options, folder)
        served = Served(options, folder)
        ids, digest = prompts(PROMPT, ASKERS * each)
        draw = random.Random(1)
        half = Store(served.layers.read, folder, limit=TRAFFIC // 2 * served.layers.rows(first).nbytes)

        def zipf(count: int) -> list[list[int]]:
            weights = [1 / (i + 1) for i in range(count)]
            return [draw.choices(range(count), weights, k=each) for _ in range(ASKERS)]

        def apart(count: int) -> list[list[int]]:
            """Asker w asks adapters w, w + 16, ..., so that those in a step are always distinct."""
            return [[draw.randrange(w, count, ASKERS) for _ in range(each)] for w in range(ASKERS)]

        count = options.adapters
        plans = {
            "5 registered": (zipf(5), served.store),
            f"{count} registered": (zipf(count), served.store),
            "16 registered, 16 in a step": (apart(ASKERS), served.store),
            f"{count} registered, 16 in a step": (apart(count), served.store),
        }
        every = [[draw.randrange(TRAFFIC) for _ in range(each)] for _ in range(ASKERS)]
        plans |= {"64 adapters, all in memory": (every, served.store), "64 adapters, half in memory": (every, half)}
        waits: dict[str, list[float]] = {name: [] for name in plans}

        def flow(name: str) -> float:
            numbers, store = plans[name]
            seconds, waited = _flow(served.engine, store, numbers, ids)
            waits[name].append(statistics.median(waited))
            return seconds

        found = in_turn({name: lambda name=name: flow(name) for name in plans}, options.repeats)
        reread = half.loads
        half.close()
        served.close()
    took = medians(found)
    wait = {name: statistics.median(each[1:]) for name, each in waits.items()}
    ratios = {
        f"throughput, {count} registered / 5": took["5 registered"] / took[f"{count} registered"],
        f"throughput, {count} registered / 16, distinct in a step alike": took["16 registered, 16 in a step"]
        / took[f"{count} registered, 16 in a step"],
        "first token, twice the limit / all in memory": wait["64 adapters, half in memory"]
        / wait["64 adapters, all in memory"],
    }
    told = [f"registered: first token after {1000 * wait[name]:.0f} ms, {name}" for name in list(plans)[4:]]
    told.append(f"registered: half in memory took {reread} loads")
    return {
        "results": rates(found, ANSWER * ASKERS * each),
        "ratios": ratios,
        "settings": {"registered prompts": digest},
        "notes": told,
    }


def _register(options: Any, folder: Path) -> lorica.Adapter:
    """Write the adapters that are not there; the first of them."""
    model, _ = lorica.load(options.model, dtype="fp32")
    made(model, folder, "a0", lorica.LoRA(r=8, alpha=8), "qv", 0)
    first = lorica.Adapter.load(folder / "a0")
    for i in range(1, options.adapters):
        if not (folder / f"a{i}").is_dir():
            moved = {key: tensor.roll(i) for key, tensor in first.tensors.items()}
            dataclasses.replace(first, tensors=moved).save(folder / f"a{i}")
    return first


def _flow(engine: Any, store: Store, plans: list[list[int]], ids: list[list[int]]) -> tuple[float, list[float]]:
    """Seconds for all that the askers want, and the waits for first tokens."""
    waits: list[float] = []

    def ask(asker: int, numbers: list[int]) -> None:
        for turn, number in enumerate(numbers):
            began = timing.clock()
            prompt = ids[turn * ASKERS + asker]
            stream = engine.submit(prompt, Sampling(ANSWER, ignore_eos=True), store.lease(f"a{number}"))
            next(stream)
            waits.append(timing.clock() - began)
            assert stream.result()[1].reason == "length"

    threads = [threading.Thread(target=ask, args=plan) for plan in enumerate(plans)]
    began = timing.clock()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == sum(map(len, plans)), "an asker failed"
    return timing.clock() - began, waits
