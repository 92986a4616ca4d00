"""Eight adapters in one pass against the same eight one after another, each contender in a process of its own.

    python bench/many.py --json > many.json
    python bench/many.py --dtype bf16 --steps 6

E2E rows, r=8 on all linear layers, one seed per adapter. `full`: 8 rows a step, which fill a pack by themselves;
`2rows`: 2 rows a step, which do not. Tokens per second are real tokens of all adapters over the seconds of their
updates, the first --warm of each left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import child, finish, interleaved, machine, peak, summary

from train import floor, prepare

ADAPTERS = 8
CONTENDERS = ("alone_full", "many_full", "alone_2rows", "many_2rows")
TARGETS = {"many_full / alone_full": (">=", 1.0), "many_2rows / alone_2rows": (">=", 1.1)}


def main() -> None:
    """Parse, prepare the rows, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1, help="first steps of each adapter that are not counted")
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender(options.child[0], json.loads(Path(options.child[1]).read_text()))
        return
    options.workload = "e2e"
    work = prepare(options) | {"dtype": options.dtype, "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(work))
        calls: dict[str, Any] = {
            name: lambda name=name: child(
                sys.executable, Path(__file__), ["--child", name, str(path)], options.timeout, {"HF_HUB_OFFLINE": "1"}
            )
            for name in options.contenders.split(",")
        }
        calls[f"gemm_{options.dtype}"] = lambda: {"flops": peak(options.dtype, work["shapes"])}
        found = interleaved(calls, options.repeats, lambda line: print(line, file=sys.stderr, flush=True))
    finish(report(options, work, found), options.json, "tok/s")


def contender(name: str, work: dict[str, Any]) -> None:
    """Train all adapters in one way and print one line of JSON."""
    import lorica
    from lorica.data import Example
    from lorica.train import many

    how, _, batch = name.partition("_")
    model, tok = lorica.load(work["model"], dtype=work["dtype"])
    rows = [Example(ids, [i >= first for i in range(len(ids))]) for ids, first in work["rows"]]
    members = {
        f"seed{seed}": lorica.TrainSettings(
            rank=8, alpha=16, lr=2e-4, schedule="constant", warmup=0.0, steps=work["steps"], seed=seed, sample=0,
            batch=2 if batch == "2rows" else work["batch"], save_every=1e9, eval_every=10**9, keep="adapter",
        )
        for seed in range(ADAPTERS)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all"
        if how == "many":
            many.train(model, tok, rows, members, out=out)
        else:
            for member, settings in members.items():
                lorica.train(model, tok, rows, settings, out=out / member)
                lorica.eject(model)
        events = [
            json.loads(line) for member in members for line in (out / member / "metrics.jsonl").read_text().splitlines()
        ]
    steps = [event for event in events if event["kind"] == "step" and event["step"] > work["warm"]]
    told = {
        "tokens_per_second": sum(event["tokens"] for event in steps) / sum(event["seconds"] for event in steps),
        "peak_bytes": int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024,  # type: ignore[index]
        "tokens": sum(event["tokens"] for event in steps),
        "losses": [event["loss"] for event in events if event["kind"] == "step" and event["step"] == work["steps"]],
        "sha256": hashlib.sha256(json.dumps(work["rows"]).encode()).hexdigest(),
    }
    print(json.dumps(told), flush=True)
    os._exit(0)


def report(options: argparse.Namespace, work: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The object that the bench prints; `losses` show that both ways train the same."""
    results: dict[str, Any] = {}
    for name, runs in found.items():
        if any("skipped" in run for run in runs):
            results[name] = {"skipped": next(run["skipped"] for run in runs if "skipped" in run)}
        elif name.startswith("gemm"):
            results[name] = summary(run["flops"] / 1e9 for run in runs)
        else:
            more = {key: runs[0][key] for key in ("tokens", "losses", "sha256")}
            memory = summary(run["peak_bytes"] for run in runs)["median"]
            results[name] = summary(run["tokens_per_second"] for run in runs) | {"peak_bytes": memory} | more
    speed = {name: row["median"] for name, row in results.items() if "peak_bytes" in row}
    ratios = {}
    for name in TARGETS:
        ours, _, theirs = name.partition(" / ")
        if ours in speed and theirs in speed:
            ratios[name] = speed[ours] / speed[theirs]
    settings = {key: getattr(options, key) for key in ("model", "dtype", "repeats", "steps", "warm")}
    settings |= {
        "adapters": ADAPTERS,
        "r": 8,
        "alpha": 16,
        "lr": 2e-4,
        "rows a step": {"full": work["batch"], "2rows": 2},
    }
    settings["sha256"] = hashlib.sha256(json.dumps(work["rows"]).encode()).hexdigest()
    return {
        "bench": "many", "settings": settings, "machine": machine(), "results": results, "ratios": ratios,
        "targets": TARGETS, "floor": floor(work),
    }  # fmt: skip


if __name__ == "__main__":
    main()
