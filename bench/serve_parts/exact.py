"""What mixed requests said, against each alone on merged weights, while all happens that could mix them up.

Eight adapters of ranks 2 to 64, with DoRA, rsLoRA and patterns, and the base. Prompts are longer than a step, so they
are read in pieces; many begin alike under different adapters, so their keys are reused; files are replaced by other
weights while requests of the old ones run; memory holds some of the adapters only. Which weights a request ran on is
known from the digest of the generation that it leased.

A text is right if each of its tokens is the likeliest one after those before it: that is what greedy decoding alone
gives. What differs is listed; it is allowed only where the two likeliest are less than 1e-4 apart.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import summary

import lorica
from lorica import LoRA
from lorica.serve.engine import EngineSettings, Sampling
from lorica.serve.places import TENSORS, digest
from serve_parts.served import Served, adapters_in, drawn, made

KINDS = {
    "r2": (LoRA(r=2, alpha=4), "all-linear"),
    "r4-qv": (LoRA(r=4, alpha=8), "qv"),
    "r8": (LoRA(r=8, alpha=8), "all-linear"),
    "r8-dora": (LoRA(r=8, alpha=8, dora=True), "all-linear"),
    "r16-rslora": (LoRA(r=16, alpha=4, scaling="alpha/sqrt(r)"), "all-linear"),
    "r32-dora": (LoRA(r=32, alpha=32, dora=True), "qv"),
    "r32-patterns": (LoRA(r=32, alpha=32, ranks={"q_proj": 16}, alphas={"o_proj": 48.0}), "q_proj,o_proj,down_proj"),
    "r64-rslora": (LoRA(r=64, alpha=8, scaling="alpha/sqrt(r)"), "qv"),
}
ASKERS, ANSWER, STEP = 16, 8, 48  # STEP: tokens of one step
SIZE = EngineSettings(requests=ASKERS, batch_tokens=STEP, kv_tokens=4096, page=16)
ROOM = 0.7  # of the adapters' bytes that may be in memory
AT_ONCE, MOVES, REPLACED = 5, 64, 40  # models in traffic; requests until it moves on; requests between two reloads
NEAR = 1e-4
OTHERS = 10  # answers of other weights that each merged model is shown


@dataclass
class Job:
    """One request and what became of it."""

    name: str | None
    ids: list[int]
    said: list[int]
    digest: str  # of the weights that it ran on; empty for the base
    cached: int
    replaced: bool  # whether other weights had its name when it ended


class Traffic:
    """Sixteen who ask, one of whom replaces files now and then."""

    def __init__(self, served: Served, versions: Path, count: int) -> None:
        self.served, self.versions, self.count = served, versions, count
        self.jobs: list[Job] = []
        self.reloads_in_flight = 0
        self._version = dict.fromkeys(KINDS, 0)
        self._lock = threading.Lock()
        self._number, self._faults = 0, [""]
        draw = random.Random(3)
        self._stems = [drawn(draw, 64) for _ in range(6)]

    def run(self) -> float:
        """Ask everything; seconds."""
        threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(ASKERS)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not any(self._faults), self._faults
        return time.monotonic() - began

    def _ask(self, seed: int) -> None:
        draw, models = random.Random(seed), [*KINDS, None]
        while True:
            with self._lock:
                number, self._number = self._number, self._number + 1
            if number >= self.count:
                return
            name = models[(number // MOVES + draw.randrange(AT_ONCE)) % len(models)]
            stem = draw.choice(self._stems)[: draw.choice((0, 32, 64))]
            if number % REPLACED == REPLACED // 2:
                self._replace(name or "r8")
            try:
                self._one(name, stem + drawn(draw, draw.randrange(4, 40)))
            except Exception as fault:
                self._faults.append(f"{name}: {fault}")
                return

    def _one(self, name: str | None, ids: list[int]) -> None:
        lease = self.served.store.lease(name) if name else None
        tokens, end = self.served.engine.submit(ids, Sampling(ANSWER, ignore_eos=True), lease).result()
        assert end.reason == "length" and len(tokens) == ANSWER, end
        generation = lease.generation if lease else None
        self.jobs.append(
            Job(
                name,
                ids,
                [token.id for token in tokens],
                generation.digest if generation else "",
                end.cached_tokens,
                bool(generation and generation.retired),
            )
        )

    def _replace(self, name: str) -> None:
        """Put the other version's weights in an adapter's place, and have it read again."""
        with self._lock:
            self._version[name] = version = 1 - self._version[name]
            there = self.served.root / name
            shutil.copyfile(self.versions / f"{name}-{version}" / TENSORS, there / "coming")
            os.replace(there / "coming", there / TENSORS)
            self.reloads_in_flight += self.served.store.find(name).leases > 0
            self.served.store.load(name).release()

    def counters(self) -> dict[str, int]:
        """How often happened what is to be shown harmless."""
        reused = [job for job in self.jobs if job.cached]
        return {
            "prompts read in pieces": sum(len(job.ids) - job.cached > STEP for job in self.jobs),
            "prompts that reused keys": len(reused),
            "weights under which keys were reused": len({job.digest for job in reused}),
            "reloads in flight": self.reloads_in_flight,
            "requests that ended on replaced weights": sum(job.replaced for job in self.jobs),
            "evictions": self.served.store.evictions,
        }


def run(options: Any) -> dict[str, Any]:
    """How many tokens differ beyond a near tie; RuntimeError where something did not happen."""
    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        versions, root = folder / "versions", folder / "exact"
        shutil.rmtree(root, ignore_errors=True)
        for place, (name, (method, targets)) in enumerate(KINDS.items()):
            for version in (0, 1):
                made(model, versions, f"{name}-{version}", method, targets, 2 * place + version)
            shutil.copytree(versions / f"{name}-0", root / name)
        nbytes = sum((root / name / TENSORS).stat().st_size for name in KINDS)
        served = Served(options, root, SIZE, limit=int(ROOM * nbytes))
        traffic = Traffic(served, versions, options.exact)
        seconds = traffic.run()
        counters = traffic.counters()
        served.close()
        if never := [name for name, count in counters.items() if not count]:
            raise RuntimeError(f"this did not happen: {', '.join(never)}")
        differ, apart = _compare(model, versions, traffic.jobs)
    tokens = ANSWER * len(traffic.jobs)
    beyond = sum(each["behind"] >= NEAR for each in differ)
    row = summary([tokens / seconds]) | {"counters": counters, "differ": differ, "told apart": apart}
    notes = [
        f"exact: {len(traffic.jobs):,} requests, {tokens:,} tokens; {len(differ)} differ, {beyond} beyond a near tie",
        f"exact: {', '.join(f'{name} {count:,}' for name, count in counters.items())}",
        f"exact: of answers of other weights, the reference refuses {apart[0]} of {apart[1]}",
        *(f"exact: differs: {each}" for each in differ),
    ]
    return {"results": {"exact": row}, "ratios": {"exact: tokens beyond a near tie": float(beyond)}, "notes": notes}


@torch.no_grad()
def _compare(model: Any, versions: Path, jobs: list[Job]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """The tokens that are not the likeliest; and of how many answers of other weights that is so."""
    by_digest: dict[str, list[Job]] = {}
    for job in jobs:
        by_digest.setdefault(job.digest, []).append(job)
    names = {digest(folder): folder for folder in sorted(versions.iterdir())}
    assert by_digest.keys() <= {"", *names}, "weights that were nowhere"
    differ: list[dict[str, Any]] = []
    refused, shown, last = 0, 0, list[Job]()
    for own, asked in by_digest.items():
        if own:
            lorica.Adapter.load(names[own]).apply(model)
            lorica.merge(model, check=False)
        for job in asked:
            differ += _not_likeliest(model, job)
        others = last[:OTHERS]
        refused += sum(bool(_not_likeliest(model, job)) for job in others)
        shown, last = shown + len(others), asked
        if own:
            lorica.eject(model)
    return differ, (refused, shown)


def _not_likeliest(model: Any, job: Job) -> list[dict[str, Any]]:
    """Tokens that others lead: by how many nats, and how far the two likeliest are apart."""
    ids = torch.tensor([job.ids + job.said[:-1]])
    logits = model(input_ids=ids, logits_to_keep=len(job.said)).logits[0].float()
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(job.said)[:, None])[:, 0]
    return [
        {
            "adapter": job.name,
            "prompt": len(job.ids),
            "place": place,
            "behind": gap,
            "apart": float(-logits[place].topk(2).values.diff()),
        }
        for place, gap in enumerate(behind.tolist())
        if gap > 0
    ]
