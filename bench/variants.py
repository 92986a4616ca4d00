"""Variants of LoRA on the same rows: held-out loss at a third, once and three times their own default rate.

    python bench/variants.py --json > bench/results/variants.json
    python bench/variants.py --variants lora,dora --steps 40

E2E rows, r=8 on all linear layers, each variant in a process of its own. Every rate is tried with the first seed, and
the best of them with the others; what is compared is the mean over seeds at each variant's best rate, less that of
plain LoRA: a variant pays where that is below zero by more than the seeds lie apart. The default rate is lorica's,
corrected for what changes the first update (`lorica.geometry`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import DATA, child, finish, machine, summary

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"scaling": "alpha/sqrt(r)"},
    "lora+": {"lr_ratio": 16.0},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "gradient": {"init": "gradient"},
}
FACTORS = (1 / 3, 1.0, 3.0)
TARGETS = {f"{name} less lora, nats": ("<=", 0.0) for name in VARIANTS if name != "lora"}


def main() -> None:
    """Parse, measure every variant, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held", type=int, default=48, help="rows to measure on")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender(options.child[0], json.loads(Path(options.child[1]).read_text()))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(vars(options)))
        for name in options.variants.split(","):
            began = time.monotonic()
            arguments = ["--child", name, str(path)]
            found[name] = child(sys.executable, Path(__file__), arguments, options.timeout, {"HF_HUB_OFFLINE": "1"})
            said = found[name].get("skipped") or found[name]["losses"]
            print(f"{name:10} {said}   ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    finish(report(options, found), options.json, "nats")


def contender(name: str, work: dict[str, Any]) -> None:
    """Train one variant at every rate, the best one with every seed, and print one line of JSON."""
    import lorica
    from lorica.data import Record
    from lorica.train.setup import preview

    model, tok = lorica.load(work["model"])
    train, held = (
        [Record("pair", prompt=f"{row['mr']}\n", completion=row["ref"]) for row in lines(part, count)]
        for part, count in (("train", 2 * work["steps"] * work["batch"]), ("test", work["held"]))
    )
    plain = lorica.TrainSettings(
        steps=work["steps"], batch=work["batch"], eval_every=work["steps"], sample=0, keep="adapter", save_every=1e9,
        **VARIANTS[name],
    )  # fmt: skip
    default = preview(model, tok, (train, held), plain)["lr"]
    lorica.eject(model)
    told: dict[str, Any] = {"default_lr": default, "losses": {}}

    def run(factor: float, seed: int) -> float:
        import dataclasses

        settings = dataclasses.replace(plain, lr=default * factor, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            ended = lorica.train(model, tok, (train, held), settings, out=out)
            events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lorica.eject(model)
        first = next(event for event in events if event["kind"] == "eval")
        told["base"], told["at_start"] = ended.before, first["held_out"]
        told["losses"][f"{factor:.2g} seed {seed}"] = ended.after
        return ended.after

    best = min(FACTORS, key=lambda factor: run(factor, 0))
    told |= {"best_factor": best, "best": [told["losses"][f"{best:.2g} seed 0"]]}
    told["best"] += [run(best, seed) for seed in range(1, work["seeds"])]
    told["peak_bytes"] = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    print(json.dumps(told), flush=True)
    os._exit(0)


def lines(part: str, count: int) -> list[dict[str, str]]:
    """Rows of E2E, evenly spaced, since neighbours are of one meaning."""
    every = [json.loads(line) for line in (DATA / "e2e" / f"{part}.jsonl").read_text().splitlines()]
    return every[:: max(1, len(every) // count)][:count]


def report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The object that the bench prints: losses at each variant's best rate, and all that were measured beside them."""
    results: dict[str, Any] = {}
    for name, told in found.items():
        if "skipped" not in told:
            best = told.pop("best")
            told = summary(best) | {"mean": statistics.mean(best)} | told
        results[name] = told
    ratios = {
        f"{name} less lora, nats": row["mean"] - results["lora"]["mean"]
        for name, row in results.items()
        if name != "lora" and "mean" in row and "mean" in results.get("lora", {})
    }
    settings = {key: getattr(options, key) for key in ("model", "steps", "batch", "held", "seeds")}
    settings |= {"r": 8, "alpha": 16, "targets": "all-linear", "factors": [round(factor, 2) for factor in FACTORS]}
    return {
        "bench": "variants", "settings": settings, "machine": machine(), "results": results, "ratios": ratios,
        "targets": TARGETS, "floor": None,
    }  # fmt: skip


if __name__ == "__main__":
    main()
