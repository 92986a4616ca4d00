"""Many adapters on one base: what they cost beside the base, and beside transformers and PEFT, and that they are exact.

    python bench/serve.py --json > bench/results/serve.json
    python bench/serve.py --parts mixes --repeats 5

Parts (`serve_parts/`), each in a process of its own, its contenders in turn within it so that they share a moment of
the machine:

    steps       the same without attention to the past, each step between two of the base's: what the products cost
    mixes       a decoding step of 16 requests: the base, merged, one adapter, sixteen, of one rank and of many
    peers       the same prompts through transformers' continuous batching, batched generate, and PEFT's mixed batch
    registered  requests over few and over 1,000 registered adapters, and over twice what may be in memory
    switch      from one merged adapter to another, beside copying the weights that change
    exact       1,000 requests, read in pieces, with reused prefixes, reloads and evictions, against merged weights
    gpu         (not by default) a step of 64 requests on an 8B-shaped model, on one GPU
    soak        10,000 requests over HTTP with hanging up, reloads, bad keys, slow readers and prompts too long

Prompts are random ids, the same for all contenders. Adapters are random too, and small.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from measure import child, finish, machine

PARTS = ("steps", "mixes", "peers", "registered", "switch", "exact", "soak")
TARGETS = {
    "merged / base": ("<=", 1.01),
    "merged / base, products": ("<=", 1.01),
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
    "lorica 16 r8 all-linear / peft mixed batch, all-linear": (">=", 3.0),
    "lorica, many lengths / peft mixed batch, many lengths": (">=", 3.0),
    "throughput, 1000 registered / 5": (">=", 0.9),
    "throughput, 1000 registered / 16, distinct in a step alike": (">=", 0.97),
    "first token, twice the limit / all in memory": ("<=", 2.0),
    "task switch fp32 / copy": ("<=", 2.0),
    "task switch bf16 / copy": ("<=", 3.5),
    "gpu: one adapter / base": ("<=", 1.03),
    "gpu: 64 adapters / byte floor": ("<=", 1.2),
    "exact: tokens beyond a near tie": ("<=", 0.0),
    "soak: wrong answers": ("<=", 0.0),
    "soak: memory at the end / after a fifth": ("<=", 1.02),
}


def main() -> None:
    """Run the parts one after another and print one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", help="contenders of parts mixes and peers, with commas between; default all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="tokens, of parts mixes and peers")
    parser.add_argument("--answer", type=int, default=32, help="tokens, of parts mixes and peers")
    parser.add_argument("--adapters", type=int, default=1000, help="registered ones")
    parser.add_argument("--requests", type=int, default=96, help="of part registered")
    parser.add_argument("--exact", type=int, default=1000, help="requests of part exact")
    parser.add_argument("--soak", type=int, default=10_000, help="requests of part soak")
    parser.add_argument("--folder", help="where adapters are made, and found again by the next run")
    parser.add_argument("--cpu", action="store_true", help="count a process's CPU time, where others share the cores")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(options)))
        return
    settings = {key: value for key, value in vars(options).items() if key not in ("child", "json", "folder", "timeout")}
    report: dict[str, Any] = {"bench": "serve", "settings": settings, "machine": machine(), "results": {}}
    report |= {"ratios": {}, "targets": TARGETS, "floor": {}, "notes": []}
    for part in options.parts.split(","):
        began = time.monotonic()
        found = child(sys.executable, Path(__file__), [*sys.argv[1:], "--child", part], options.timeout, {})
        print(f"{part}: {found.get('skipped') or 'done'} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        report["results"] |= {part: found} if "skipped" in found else found["results"]
        for key in ("ratios", "settings"):
            report[key] |= found.get(key, {})
        report["notes"] += found.get("notes", [])
    finish(report, options.json, "tok/s")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """One part, in this process."""
    from serve_parts import timing

    if options.cpu:
        timing.count_cpu_time()
    return importlib.import_module(f"serve_parts.{options.child}").run(options)


if __name__ == "__main__":
    main()
