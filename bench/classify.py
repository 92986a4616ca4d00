"""Sentence classification: LoRA beside full fine-tuning, on equal rows, over several seeds.

    OMP_NUM_THREADS=2 python bench/classify.py --json > bench/results/classify.json

Each method first chooses its learning rate among a few, on rows of the training set that no final run is measured on;
then it trains once per seed, and the dev set is looked at once, after the last update. Each method is a process of its
own. `learn` trains one task of GLUE's kind and gives its measures, for any method and model; `TASKS` are those at hand.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import DATA, finish, machine, summary


@dataclass(frozen=True)
class GlueTask:
    """A data set of `DATA`: its files, whether it has labels or scores, and the measure that is reported for it."""

    name: str
    train: str = "train.jsonl"
    dev: str = "dev.jsonl"
    kind: str = "classify"
    measure: str = "accuracy"


TASKS = {
    task.name: task
    for task in (
        GlueTask("sst2"),
        GlueTask("cola", measure="matthews"),
        GlueTask("rte"),
        GlueTask("qnli", train="train-from-dev.jsonl"),
        GlueTask("stsb", kind="regress", measure="pearson"),
        GlueTask("sick"),
    )
}
# Upwards from the paper's 5e-4 of LoRA on SST-2 (table 9), since a small model wants more; a tenth of that for whole
# weights, as "LoRA Without Regret" found.
RATES = {"lora": (5e-4, 1e-3, 2e-3, 4e-3), "full": (5e-5, 1e-4, 2e-4, 4e-4)}
TARGETS = {"lora less full, points": (">=", -1.0)}
CHOICE_ROWS = 1000


def main() -> None:
    """Choose rates, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--task", default="sst2", choices=TASKS)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--methods", default="lora,full")
    parser.add_argument("--rows", type=int, default=3000, help="rows of the training set to train on")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=7200)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(contender(**json.loads(Path(options.child).read_text()))))
        return
    found = {method: _child(options, method) for method in options.methods.split(",")}
    finish(report(options, found), options.json, "%")


def contender(
    method: str, rates: Sequence[float], task: str, rows: int, epochs: float, seeds: int, **work: Any
) -> dict[str, Any]:
    """Choose a rate for one method, each tried on half of the rows for one epoch, then train once per seed."""

    def run(lr: float, seed: int, rows: int, epochs: float, choice: bool = False) -> dict[str, Any]:
        done = learn(task, method, lr=lr, seed=seed, rows=rows, epochs=epochs, choice=choice, **work)
        said = f"{method:6} lr {lr:g}  seed {seed}  {done['rows']:,} rows x {epochs:g}  {done['measures']}"
        print(f"{said}  {done['seconds']:.0f} s", file=sys.stderr, flush=True)
        return done

    measure = TASKS[task].measure
    tried = {lr: run(lr, 0, rows // 2, 1.0, choice=True)["measures"][measure] for lr in rates}
    best = max(tried, key=tried.__getitem__)
    return {"lr": best, "tried": list(tried.items()), "runs": [run(best, seed, rows, epochs) for seed in range(seeds)]}


def learn(
    task: str,
    method: str,
    model: str,
    lr: float,
    seed: int,
    rows: int,
    epochs: float,
    batch: int,
    choice: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Train one method on one task once; measured after the last update on the dev set, once.

    Args:
        rows: of the training set, drawn by a fixed seed; 0 for all.
        choice: measure on `CHOICE_ROWS` other rows of the training set instead, to choose settings by.
        more: other settings of a training (`rank`, `targets`, ...).

    Returns:
        `measures` (all of the task's), `loss`, `seconds`, `peak_bytes`, `trainable`, `rows` and `steps`.
    """
    import lorica
    from lorica import TrainSettings
    from lorica.data import label_names, read_labelled
    from lorica.tasks import task_of

    spec = TASKS[task]
    train, dev = (read_labelled(DATA / spec.name / part, spec.kind).rows for part in (spec.train, spec.dev))
    labels = label_names(train) if spec.kind == "classify" else ("score",)
    known = {row.key for row in dev}
    train = [row for row in train if row.key not in known]
    random.Random(0).shuffle(train)
    chosen = train[: rows or None]
    if choice:
        dev = train[-CHOICE_ROWS:]
        chosen = chosen[: len(train) - CHOICE_ROWS]
    base, tok = lorica.load(model, labels=labels, dtype="fp32")
    goal = task_of(base)
    settings = TrainSettings(
        task=spec.kind, method=method, lr=lr, seed=seed, batch=batch, epochs=epochs, held_out=0, keep="adapter",
        save_every=1e9, max_len=128, warmup=0.06, **more,
    )  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = lorica.train(base, tok, (chosen, []), settings, out=Path(folder) / "run")
    seconds = time.monotonic() - began
    loss, measures = goal.measure(base, goal.encode(dev, tok, 128).examples)
    return {
        "measures": measures,
        "loss": loss,
        "seconds": round(seconds, 1),
        "peak_bytes": run.peak_rss_bytes,
        "trainable": sum(tensor.numel() for tensor in run.adapter.tensors.values()),
        "rows": len(chosen),
        "steps": run.steps,
    }


def _child(options: argparse.Namespace, method: str) -> dict[str, Any]:
    work = {key: getattr(options, key) for key in ("task", "model", "rows", "epochs", "batch", "seeds")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(work | {"method": method, "rates": RATES[method]}))
        command = [sys.executable, __file__, "--child", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.timeout)
    if done.returncode:
        return {"skipped": f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def report(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The object of the contract; measures as percentages."""
    measure = TASKS[options.task].measure
    results: dict[str, Any] = {}
    for method, told in found.items():
        if "skipped" in told:
            results[method] = told
            continue
        values = [100 * run["measures"][measure] for run in told["runs"]]
        results[method] = summary(values) | {
            "mean": statistics.mean(values),
            "values": values,
            "peak_bytes": summary(run["peak_bytes"] for run in told["runs"])["median"],
            "seconds": summary(run["seconds"] for run in told["runs"])["median"],
            "trainable": told["runs"][0]["trainable"],
            "lr": told["lr"],
            "tried": [[lr, round(100 * value, 2)] for lr, value in told["tried"]],
        }
    ratios = {}
    if all("mean" in results.get(method, {}) for method in ("lora", "full")):
        ratios["lora less full, points"] = results["lora"]["mean"] - results["full"]["mean"]
    settings = {key: getattr(options, key) for key in ("model", "rows", "epochs", "batch", "seeds")}
    settings |= {"measure": measure, "r": 8, "alpha": 16, "targets": "all-linear", "warmup": 0.06}
    settings |= {"train": TASKS[options.task].train, "dev": TASKS[options.task].dev}
    return {
        "bench": f"classify {options.task}", "settings": settings, "machine": machine(), "results": results,
        "ratios": ratios, "targets": TARGETS, "floor": floor(options.task),
    }  # fmt: skip


def floor(task: str) -> dict[str, float]:
    """What is had without learning: the share of the commonest label of the dev set, in percent."""
    from lorica.data import read_labelled

    spec = TASKS[task]
    if spec.kind != "classify":
        return {}
    labels = [row.label for row in read_labelled(DATA / spec.name / spec.dev, spec.kind).rows]
    return {"commonest_label": 100 * max(labels.count(label) for label in set(labels)) / len(labels)}


if __name__ == "__main__":
    main()
