"""Many adapters on one base: what they cost beside the base, and beside transformers and PEFT.

    python bench/serve.py --json > serve.json
    python bench/serve.py --parts mixes --repeats 5

Parts, each in a process of its own, its contenders in turn within it so that they share a moment of the machine:

    steps       the same without attention to the past, each step between two of the base's: what the products cost
    mixes       a decoding step of 16 requests: the base, merged, one adapter, sixteen, of one rank and of many
    peers       the same prompts through transformers' continuous batching, batched generate, and PEFT's mixed batch
    registered  requests over 5 and over 1,000 registered adapters (Zipf), and over twice what may be in memory
    exact       requests on the base and 16 adapters; what was said against the argmax of merged weights
    soak        requests on a tiny model with random cancels, reloads and prompts that are too long

Prompts are random ids, the same for all contenders. Adapters are random too, and small.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import child, finish, machine, summary

PARTS = ("steps", "mixes", "peers", "registered", "exact", "soak")
RANKS = (2, 4, 8, 16, 32, 64)
TARGETS = {
    "merged / base": ("<=", 1.01),
    "one r8 all-linear / base": ("<=", 1.05),
    "one r8 all-linear / base, products": ("<=", 1.05),
    "16 r8 all-linear / base": ("<=", 1.2),
    "16 r8 all-linear / base, products": ("<=", 1.2),
    "16 r8 qv / base": ("<=", 1.06),
    "16 r8 qv / base, products": ("<=", 1.06),
    "16 mixed qv / base": ("<=", 1.35),
    "16 mixed qv / base, products": ("<=", 1.35),
    "16 mixed all-linear / base": ("<=", 1.35),
    "16 mixed all-linear / base, products": ("<=", 1.35),
    "lorica / transformers continuous batching": (">=", 1.0),
    "lorica / batched generate": (">=", 1.0),
    "lorica 16 r8 qv / peft mixed batch": (">=", 3.0),
    "throughput, 1000 registered / 5": (">=", 0.9),
    "first token, twice the limit / all in memory": ("<=", 2.0),
    "exact: share of tokens that differ beyond a near tie": ("<=", 0.0),
    "soak: memory at the end / after a tenth": ("<=", 1.02),
    "soak: wrong ends": ("<=", 0.0),
}


clock = time.perf_counter


def main() -> None:
    """Run the parts one after another and print one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", help="contenders of part mixes, with commas between; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument("--adapters", type=int, default=1000, help="registered ones")
    parser.add_argument("--requests", type=int, default=300, help="of part registered")
    parser.add_argument("--exact", type=int, default=1000, help="requests of part exact")
    parser.add_argument("--soak", type=int, default=10_000, help="requests of part soak")
    parser.add_argument("--folder", help="where adapters are made, and found again by the next run")
    parser.add_argument(
        "--cpu", action="store_true", help="count this process's CPU time, where others share the cores"
    )
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    global clock
    clock = time.process_time if options.cpu else time.perf_counter
    if options.child:
        print(json.dumps(globals()[options.child](options)))
        return
    report: dict[str, Any] = {"settings": {key: value for key, value in vars(options).items() if key != "child"}}
    report |= {"machine": machine(), "results": {}, "ratios": {}, "targets": TARGETS, "floor": {}}
    for part in options.parts.split(","):
        began = time.monotonic()
        found = child(sys.executable, Path(__file__), [*sys.argv[1:], "--child", part], options.timeout, {})
        print(f"{part}: {found.get('skipped') or 'done'} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        report["results"] |= {part: found} if "skipped" in found else found["results"]
        report["ratios"] |= found.get("ratios", {})
        report["settings"] |= found.get("settings", {})
    finish(report, options.json, "tok/s")


class Served:
    """An engine over a real base, with adapters made on the spot."""

    def __init__(self, options: Any, root: Path, **store: Any) -> None:
        import lorica
        from lorica.serve import open_engine
        from lorica.serve.engine import EngineSettings
        from lorica.serve.rows import Layers
        from lorica.serve.store import Store

        self.model, self.tok = lorica.load(options.model, dtype="fp32")
        self.model.requires_grad_(False)
        self.layers, self.root = Layers(self.model), root
        self.store = Store(self.layers.read, root, **store)
        size = EngineSettings(requests=16, batch_tokens=512, kv_tokens=32_768, prefix_cache=False)
        self.engine, note = open_engine(self.model, self.layers, size)
        assert not note, note

    def close(self) -> None:
        self.engine.stop()
        self.store.close()

    def run(self, jobs: list[tuple[str | None, list[int]]], count: int) -> tuple[float, list[list[int]], list[float]]:
        """Seconds for all of some requests at once, what they said, and between the tokens of the last one.

        When the last has its first token all are read, so those times are of steps that decode all of them.
        """
        from lorica.serve.engine import Sampling

        leases = [self.store.lease(name) if name else None for name, _ in jobs]
        for lease in leases:
            assert lease is None or (lease.wait() and lease.generation.payload), lease.generation.error
        began = clock()
        sampling = Sampling(count, ignore_eos=True)
        streams = [self.engine.submit(ids, sampling, lease) for (_, ids), lease in zip(jobs, leases, strict=True)]
        times = [(item, clock()) for item in streams[-1]]
        said = [[token.id for token in stream.result()[0]] for stream in streams[:-1]]
        said.append([token.id for token, _ in times[:-1]])
        gaps = [after - before for (_, before), (_, after) in itertools.pairwise(times[:-1])]
        return clock() - began, said, gaps


def made(model: Any, folder: Path, name: str, r: int, targets: str, seed: int) -> None:
    """An adapter with random factors, small enough that the base still speaks; one that is there stays."""
    import torch

    import lorica

    if (folder / name).is_dir():
        return
    lorica.inject(model, lorica.LoRA(r=r, alpha=r), targets, name)
    generator = torch.Generator().manual_seed(seed)
    for key, factor in lorica.trainable(model, name).items():
        factor.data = torch.randn(factor.shape, generator=generator) * (0.05 if key.endswith("A") else 0.02)
    lorica.Adapter.of(model, name).save(folder / name)
    lorica.eject(model, name)


@contextlib.contextmanager
def adapters_in(options: Any) -> Iterator[Path]:
    """The folder of adapters, for good or for the length of a block."""
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        yield Path(options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def prompts(options: Any, count: int, vocab: int) -> tuple[list[list[int]], str]:
    """Prompts of equal length, and a digest of them."""
    draw = random.Random(0)
    ids = [[draw.randrange(10, min(vocab, 40_000)) for _ in range(options.prompt)] for _ in range(count)]
    return ids, hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, or of each of its steps, once to warm up and then `repeats` times in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            gc.collect()
            seconds = call()
            each = seconds if isinstance(seconds, list) else [seconds]
            if turn:
                found[name] += each
                print(f"{turn}/{repeats} {name:32} {statistics.median(each):.3f} s", file=sys.stderr, flush=True)
    return found


def rates(found: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    return {name: summary(tokens / seconds for seconds in each) for name, each in found.items()}


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in found.items()}


def mixtures(options: Any, model: Any, folder: Path) -> dict[str, list[str]]:
    """The adapters of 16 requests by the name of the mixture; made where they are not there."""
    plan = {"one r8 all-linear": ["all-linear-r8-0"] * 16}
    for targets in ("all-linear", "qv"):
        plan[f"16 r8 {targets}"] = [f"{targets}-r8-{i}" for i in range(16)]
        plan[f"16 mixed {targets}"] = [f"{targets}-r{RANKS[i % len(RANKS)]}-{i}" for i in range(16)]
    for name in sorted({name for names in plan.values() for name in names}):
        targets, r, i = name.rsplit("-", 2)
        made(model, folder, name, int(r[1:]), targets, 100 * int(r[1:]) + int(i))
    return plan


def steps(options: Any) -> dict[str, Any]:
    """Paired forward passes of 16 tokens: robust against a machine that others use."""
    import torch

    import lorica
    from lorica.serve.rows import Layers

    with adapters_in(options) as folder, torch.no_grad():
        model, _ = lorica.load(options.model, dtype="fp32")
        plans = mixtures(options, model, folder)
        model.requires_grad_(False)
        layers, ids = Layers(model), torch.randint(10, 40_000, (16, 1))
        results: dict[str, Any] = {}
        ratios: dict[str, float] = {}

        def step(work: list[Any]) -> float:
            layers.work = work
            began = clock()
            model(input_ids=ids, use_cache=False)
            return clock() - began

        with layers.attached():
            base: list[Any] = [None] * len(layers.layers)
            for name, names in plans.items():
                loaded = {each: layers.read(folder / each) for each in set(names)}
                work = layers.plan([(loaded[each], 1) for each in names]).work
                step(base), step(work)
                took = [(step(base), step(work), step(base)) for _ in range(5 * options.repeats)]
                layers.idle()
                ratios[f"{name} / base, products"] = statistics.median(2 * b / (a + c) for a, b, c in took)
                results[f"step, {name}"] = summary(16 / b for _, b, _ in took)
                print(f"{name:22} {ratios[f'{name} / base, products']:.3f}", file=sys.stderr, flush=True)
    return {"results": results, "ratios": ratios}


def mixes(options: Any) -> dict[str, Any]:
    """What adapters cost in one batch of 16."""
    import lorica

    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        plan: dict[str, list[Any]] = {"base": [None] * 16} | mixtures(options, model, folder)
        adapter = lorica.Adapter.load(folder / "all-linear-r8-0")
        del model
        served = Served(options, folder)
        ids, digest = prompts(options, 16, served.model.config.vocab_size)

        def merged() -> list[float]:
            with served.engine.pause():
                kept = {name: p.data for name, p in served.model.named_parameters()}
                for target in adapter.targets:
                    A, B = (adapter.tensors[f"{target.path}#lora.{factor}"] for factor in "AB")
                    parameter = served.model.get_parameter(f"{target.path}.weight")
                    parameter.data = parameter.data + adapter.method.scale_of(target.key) * (B @ A)
            gaps = served.run([(None, each) for each in ids], options.answer)[2]
            with served.engine.pause():
                for name, value in kept.items():
                    served.model.get_parameter(name).data = value
            return gaps

        calls: dict[str, Callable[[], Any]] = {
            name: lambda names=names: served.run(list(zip(names, ids, strict=True)), options.answer)[2]
            for name, names in plan.items()
        }
        calls = {"base": calls.pop("base"), "merged": merged, **calls}
        only = options.only.split(",") if options.only else calls
        found = in_turn({name: calls[name] for name in calls if name in only}, options.repeats)
        served.close()
    took = medians(found)
    ratios = {f"{name} / base": seconds / took["base"] for name, seconds in took.items() if name != "base"}
    return {"results": rates(found, 16), "ratios": ratios, "settings": {"prompts": digest}}


def peers(options: Any) -> dict[str, Any]:
    """The engine beside transformers' own ways, and PEFT's."""
    import torch
    from peft import PeftModel
    from transformers import ContinuousBatchingConfig, GenerationConfig

    import lorica

    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        for i in range(16):
            made(model, folder, f"qv-{i}", 8, "qv", i)
        served = Served(options, folder)
        ids, digest = prompts(options, 16, model.config.vocab_size)
        given = torch.tensor(ids)
        count = {"max_new_tokens": options.answer, "min_new_tokens": options.answer, "do_sample": False}
        quiet = GenerationConfig(**count, eos_token_id=-1, pad_token_id=0)
        pefted = PeftModel.from_pretrained(lorica.load(options.model, dtype="fp32")[0], f"{folder}/qv-0", "qv-0").eval()
        for i in range(1, 16):
            pefted.load_adapter(f"{folder}/qv-{i}", f"qv-{i}")

        @torch.no_grad()
        def timed(call: Callable[[], Any]) -> float:
            began = clock()
            call()
            return clock() - began

        def upstream() -> None:
            size = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512, max_memory_percent=1.0)
            plain = GenerationConfig(max_new_tokens=options.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
            found = model.generate_batch(ids, generation_config=plain, continuous_batching_config=size, warmup=False)
            assert all(len(each.generated_tokens) == options.answer for each in found.values())

        generate = {"attention_mask": torch.ones_like(given), "generation_config": quiet}
        names = [f"qv-{i}" for i in range(16)]
        calls: dict[str, Callable[[], float]] = {
            "lorica": lambda: served.run([(None, each) for each in ids], options.answer)[0],
            "transformers continuous batching": lambda: timed(upstream),
            "batched generate": lambda: timed(lambda: model.generate(given, **generate)),
            "lorica 16 r8 qv": lambda: served.run(list(zip(names, ids, strict=True)), options.answer)[0],
            "peft mixed batch": lambda: timed(lambda: pefted.generate(given, adapter_names=names, **generate)),
        }
        found = in_turn(calls, options.repeats)
        served.close()
    took = medians(found)
    pairs = [("lorica", "transformers continuous batching"), ("lorica", "batched generate")]
    pairs.append(("lorica 16 r8 qv", "peft mixed batch"))
    ratios = {f"{ours} / {theirs}": took[theirs] / took[ours] for ours, theirs in pairs}
    return {"results": rates(found, 16 * options.answer), "ratios": ratios, "settings": {"prompts": digest}}


def registered(options: Any) -> dict[str, Any]:
    """Throughput against the number of registered adapters, and the wait for the first token against memory."""
    import lorica
    from lorica.serve.engine import Sampling
    from lorica.serve.store import Store

    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        made(model, folder, "a0", 8, "qv", 0)
        first = lorica.Adapter.load(folder / "a0")
        for i in range(1, options.adapters):
            if (folder / f"a{i}").is_dir():
                continue
            moved = {key: tensor.roll(i) for key, tensor in first.tensors.items()}
            dataclasses.replace(first, tensors=moved).save(folder / f"a{i}")
        served = Served(options, folder)
        ids, digest = prompts(options, options.requests, model.config.vocab_size)
        draw = random.Random(1)
        size = served.layers.rows(first).nbytes

        def zipf(count: int) -> list[str]:
            weights = [1 / (i + 1) for i in range(count)]
            return [f"a{i}" for i in draw.choices(range(count), weights, k=options.requests)]

        def flow(store: Store, names: list[str]) -> tuple[float, float]:
            """Seconds for all, 16 asking at a time, and the median wait for a first token."""
            jobs, waits, lock = iter(list(zip(names, ids, strict=True))), [], threading.Lock()

            def ask() -> None:
                while True:
                    with lock:
                        job = next(jobs, None)
                    if job is None:
                        return
                    began = clock()
                    stream = served.engine.submit(job[1], Sampling(8, ignore_eos=True), store.lease(job[0]))
                    next(stream)
                    waits.append(clock() - began)
                    assert stream.result()[1].reason == "length"

            began = clock()
            threads = [threading.Thread(target=ask) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return clock() - began, statistics.median(waits)

        few, many = zipf(5), zipf(options.adapters)
        every = [f"a{draw.randrange(64)}" for _ in range(options.requests)]
        half = Store(served.layers.read, folder, limit=32 * size)
        waits: dict[str, list[float]] = {"all": [], "half": []}

        def waiting(name: str, store: Store) -> float:
            seconds, wait = flow(store, every)
            waits[name].append(wait)
            return seconds

        found = in_turn(
            {
                "5 registered": lambda: flow(served.store, few)[0],
                f"{options.adapters} registered": lambda: flow(served.store, many)[0],
                "64 adapters, all in memory": lambda: waiting("all", served.store),
                "64 adapters, half in memory": lambda: waiting("half", half),
            },
            options.repeats,
        )
        half.close()
        served.close()
    took = medians(found)
    ratios = {
        f"throughput, {options.adapters} registered / 5": took["5 registered"] / took[f"{options.adapters} registered"],
        "first token, twice the limit / all in memory": statistics.median(waits["half"][1:])
        / statistics.median(waits["all"][1:]),
    }
    told = {f"first token, {name} in memory, s": statistics.median(each[1:]) for name, each in waits.items()}
    return {"results": rates(found, 8 * options.requests), "ratios": ratios, "settings": {"prompts": digest} | told}


def exact(options: Any) -> dict[str, Any]:
    """What mixed requests said, token by token against the logits of merged weights over the same text."""
    import torch

    import lorica

    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        names: list[str | None] = [None]
        for i in range(16):
            targets = ("all-linear", "qv")[i % 2]
            names.append(f"{targets}-{i}")
            made(model, folder, f"{targets}-{i}", RANKS[i % len(RANKS)], targets, i)
        served = Served(options, folder)
        draw, jobs = random.Random(2), []
        for each in prompts(options, options.exact, model.config.vocab_size)[0]:
            jobs.append((draw.choice(names), each[: draw.randrange(4, len(each))]))
        seconds, said, _ = served.run(jobs, 8)
        served.close()
        differ: list[dict[str, Any]] = []
        beyond = 0
        for name in names:
            if name:
                lorica.Adapter.load(folder / name).apply(model)
                lorica.merge(model, check=False)
            for (whose, ids), answer in zip(jobs, said, strict=True):
                if whose != name:
                    continue
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids + answer[:-1]]), logits_to_keep=len(answer)).logits[0]
                for place, (row, id) in enumerate(zip(logits, answer, strict=True)):
                    gap = float(row.max() - row[id])
                    if gap > 0:
                        differ.append({"adapter": name, "prompt": len(ids), "place": place, "gap": gap})
                        beyond += gap >= 1e-4
            if name:
                lorica.eject(model)
    total = sum(map(len, said))
    row = summary([total / seconds]) | {"tokens": total, "differ": differ, "beyond": beyond}
    share = beyond / total
    return {"results": {"exact": row}, "ratios": {"exact: share of tokens that differ beyond a near tie": share}}


def soak(options: Any) -> dict[str, Any]:
    """Whether memory stays flat and the loop alive under everything at once."""
    import psutil
    import torch
    import transformers

    from lorica.serve import open_engine
    from lorica.serve.engine import EngineSettings, Sampling, TooLong
    from lorica.serve.rows import Layers
    from lorica.serve.store import Store

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=512, **shape)).eval()
    with tempfile.TemporaryDirectory() as made_here:
        folder = Path(made_here)
        for i in range(40):
            made(model, folder, f"a{i}", RANKS[i % len(RANKS)], "all-linear", i)
        layers = Layers(model)
        store = Store(layers.read, folder, limit=1_500_000)
        engine, _ = open_engine(model, layers, EngineSettings(requests=16, batch_tokens=128, kv_tokens=4096, page=16))
        counts = {"length": 0, "cancelled": 0, "refused": 0, "wrong": 0}
        memory: list[int] = []
        numbers, lock = iter(range(options.soak)), threading.Lock()

        def asking(seed: int) -> Iterator[str]:
            draw = random.Random(seed)
            while (number := next_number()) is not None:
                length = draw.randrange(1, 200) if draw.random() < 0.98 else 5000
                name = f"a{draw.randrange(40)}"
                if draw.random() < 0.01:
                    store.load(name).release()
                try:
                    stream = engine.submit([draw.randrange(512) for _ in range(length)], Sampling(8, ignore_eos=True),
                                           store.lease(name))  # fmt: skip
                except TooLong:
                    yield "refused"
                    continue
                if called_off := draw.random() < 0.2:
                    stream.cancel()
                tokens, end = stream.result()
                whole = end.reason == "length" and len(tokens) == 8
                yield end.reason if whole or (called_off and end.reason == "cancelled") else "wrong"
                if number % (options.soak // 20) == 0:
                    gc.collect()
                    memory.append(psutil.Process().memory_info().rss)

        def next_number() -> int | None:
            with lock:
                return next(numbers, None)

        def count(seed: int) -> None:
            for reason in asking(seed):
                with lock:
                    counts[reason] += 1

        began = clock()
        threads = [threading.Thread(target=count, args=(seed,)) for seed in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds, facts = clock() - began, engine.facts()
        alive = engine.alive and not facts["restarts"] and all(status.leases == 0 for status in store.status())
        engine.stop()
        store.close()
    row = summary([facts["generated_tokens"] / seconds]) | {"counts": counts, "alive": alive, "memory": memory}
    ratios = {
        "soak: memory at the end / after a tenth": memory[-1] / memory[2],
        "soak: wrong ends": float(counts["wrong"] + (not alive)),
    }
    return {"results": {"soak": row}, "ratios": ratios}


if __name__ == "__main__":
    main()
