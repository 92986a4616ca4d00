"""An engine over a real base, with adapters and prompts made on the spot."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lorica
from lorica.serve import open_engine
from lorica.serve.engine import EngineSettings, Sampling
from lorica.serve.rows import Layers
from lorica.serve.store import Store
from serve_parts import timing

RANKS = (2, 4, 8, 16, 32, 64)
SIZE = EngineSettings(requests=16, batch_tokens=512, kv_tokens=32_768, prefix_cache=False)


class Served:
    """An engine and a store of the adapters in a folder."""

    def __init__(self, options: Any, root: Path, size: EngineSettings = SIZE, limit: int | None = None) -> None:
        self.model, self.tok = lorica.load(options.model, dtype="fp32")
        self.model.requires_grad_(False)
        self.layers, self.root = Layers(self.model), root
        self.store = Store(self.layers.read, root, limit=limit)
        self.engine, note = open_engine(self.model, self.layers, size)
        assert not note, note

    def close(self) -> None:
        self.engine.stop()
        self.store.close()

    def run(self, jobs: list[tuple[str | None, list[int]]], count: int | list[int]) -> tuple[float, list[float]]:
        """Seconds for all of some requests at once, and between the tokens of the last one.

        `count`: tokens of an answer, or of each. Where as many are asked as run at a time, and the last has its first
        token, all are read, so those times are of steps that decode all of them.
        """
        counts = count if isinstance(count, list) else [count] * len(jobs)
        leases = [self.store.lease(name) if name else None for name, _ in jobs]
        for lease in leases:
            assert lease is None or (lease.wait() and lease.generation.payload), lease.generation.error
        began = timing.clock()
        streams = [
            self.engine.submit(ids, Sampling(count, ignore_eos=True), lease)
            for (_, ids), count, lease in zip(jobs, counts, leases, strict=True)
        ]
        times = [timing.clock() for _ in streams[-1]][:-1]
        for stream in streams[:-1]:
            assert stream.result()[1].reason == "length"
        return timing.clock() - began, [after - before for before, after in itertools.pairwise(times)]


def made(model: Any, folder: Path, name: str, method: lorica.LoRA, targets: str, seed: int) -> None:
    """An adapter with random factors, small enough that the base still speaks; one that is there stays."""
    if (folder / name).is_dir():
        return
    lorica.inject(model, method, targets, name)
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in lorica.trainable(model, name).items():
        drawn = torch.randn(tensor.shape, generator=generator)
        tensor.data = tensor.data * (1 + 0.05 * drawn) if key.endswith(".m") else drawn * _SPREAD[key[-1]]
    lorica.Adapter.of(model, name).save(folder / name)
    lorica.eject(model, name)


_SPREAD = {"A": 0.05, "B": 0.02}


@contextlib.contextmanager
def adapters_in(options: Any) -> Iterator[Path]:
    """The folder of adapters, for good or for the length of a block."""
    if options.folder:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        yield Path(options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def drawn(draw: random.Random, length: int) -> list[int]:
    """So many ids of ordinary tokens."""
    return [draw.randrange(10, 40_000) for _ in range(length)]


def prompts(length: int, count: int) -> tuple[list[list[int]], str]:
    """Prompts of equal length, the same each time, and a digest of them."""
    draw = random.Random(0)
    ids = [drawn(draw, length) for _ in range(count)]
    return ids, hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def uneven(count: int) -> tuple[list[list[int]], list[int], str]:
    """Prompts of 16 to 128 tokens and answers of 8 to 128, many short and few long, and a digest of them."""
    draw = random.Random(1)
    ids = [drawn(draw, round(16 * 8 ** draw.random())) for _ in range(count)]
    answers = [round(8 * 16 ** draw.random()) for _ in range(count)]
    return ids, answers, hashlib.sha256(json.dumps([ids, answers]).encode()).hexdigest()[:12]


def mixtures(model: Any, folder: Path) -> dict[str, list[str]]:
    """The adapters of 16 requests by the name of the mixture; made where they are not there."""
    plan = {"one r8 all-linear": ["all-linear-r8-0"] * 16}
    for targets in ("all-linear", "qv"):
        plan[f"16 r8 {targets}"] = [f"{targets}-r8-{i}" for i in range(16)]
        plan[f"16 mixed {targets}"] = [f"{targets}-r{RANKS[i % len(RANKS)]}-{i}" for i in range(16)]
    for name in sorted({name for names in plan.values() for name in names}):
        targets, rank, i = name.rsplit("-", 2)
        r = int(rank[1:])
        made(model, folder, name, lorica.LoRA(r=r, alpha=r), targets, 100 * r + int(i))
    return plan
