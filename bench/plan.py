"""The plan's peak memory and time beside what a training then takes, on a CPU, each in a process of its own.

    python bench/plan.py --json > plan.json
    python bench/plan.py --only smollm2-fp32,gpt2-124m --plot docs/plan.png

Every setting is predicted in one process, from the model's config alone, and trained for a few updates in another,
through `lorica.train`, or `many.train` where several adapters share a pass. Measured is the largest resident memory of
that process since it began, loading included. `header` is what the training itself predicted before its first update.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import child, finish, machine, summary

TARGETS = {
    "settings within 10 %": (">=", 12),
    "largest error of the plan": ("<=", 0.1),
    "largest error of the header": ("<=", 0.1),
}


@dataclass(frozen=True)
class Case:
    """One setting: a model (an alias or a key of `SHAPES`), rows of so many tokens, the last share of them labelled.

    With `ranks`, several adapters are trained in one pass, one of each rank.
    """

    model: str
    dtype: str
    rank: int
    targets: str
    rows: int
    length: int
    labelled: float = 1.0
    how: tuple[tuple[str, Any], ...] = ()
    ranks: tuple[int, ...] = ()


# Random weights: (family, width, layers, heads, key and value heads, inner width, vocabulary).
SHAPES = {
    "llama-50m": ("llama", 512, 8, 8, 4, 1408, 32000),
    "llama-150m-wide": ("llama", 1024, 8, 16, 16, 2816, 32000),
    "llama-400m": ("llama", 1152, 20, 18, 6, 3072, 32000),
    "gpt2-124m": ("gpt2", 768, 12, 12, 12, 3072, 50257),
    "gpt2-355m": ("gpt2", 1024, 24, 16, 16, 4096, 50257),
}
ON, OFF = (("checkpointing", "on"),), (("checkpointing", "off"),)
CASES = {
    "smollm2-fp32": Case("smollm2-135m", "fp32", 8, "all-linear", 8, 64, 0.5, OFF),
    "smollm2-512": Case("smollm2-135m", "fp32", 8, "all-linear", 2, 512, 1.0, OFF),
    "smollm2-bf16": Case("smollm2-135m", "bf16", 8, "all-linear", 8, 64, 0.5, OFF),
    "smollm2-r64-qv": Case("smollm2-135m", "fp32", 64, "qv", 4, 256, 0.25, OFF),
    "smollm2-2048": Case("smollm2-135m", "fp32", 8, "all-linear", 1, 2048, 1.0, OFF),
    "smollm2-2048-again": Case("smollm2-135m", "fp32", 8, "all-linear", 1, 2048, 1.0, ON),
    "smollm2-micro1": Case("smollm2-135m", "fp32", 8, "all-linear", 8, 100, 0.5, (*OFF, ("micro", 1))),
    "llama-50m-r64": Case("llama-50m", "fp32", 64, "all-linear", 2, 512, 1.0, OFF),
    "llama-150m-bf16": Case("llama-150m-wide", "bf16", 16, "mlp", 4, 128, 0.5, OFF),
    "llama-150m-again": Case("llama-150m-wide", "fp32", 16, "all-linear", 1, 1024, 0.5, ON),
    "llama-400m-bf16": Case("llama-400m", "bf16", 8, "all-linear", 2, 256, 0.5, OFF),
    "llama-400m-qv": Case("llama-400m", "fp32", 8, "qv", 8, 64, 0.5, OFF),
    "gpt2-124m": Case("gpt2-124m", "fp32", 8, "all-linear", 1, 512, 1.0, OFF),
    "gpt2-355m-bf16": Case("gpt2-355m", "bf16", 4, "qv", 2, 256, 0.5, OFF),
    "smollm2-sweep": Case("smollm2-135m", "fp32", 8, "all-linear", 2, 64, 0.5, OFF, (1, 2, 4, 8, 16, 32, 64, 128)),
    "llama-50m-sweep": Case("llama-50m", "fp32", 8, "all-linear", 4, 128, 1.0, OFF, (8, 8, 64)),
}


def main() -> None:
    """Parse, predict and measure every case, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--plot", default="", help="where to draw predicted against measured")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, name = options.child
        told = {"plan": planned, "train": trained}[what](CASES[name], options.steps)
        print(json.dumps(told), flush=True)
        return
    results = {}
    for name in options.only.split(","):
        results[name] = compared(name, options)
        print(f"{name:20} {_line(results[name])}", file=sys.stderr, flush=True)
    told = report(options, results)
    if options.plot:
        draw(told["results"], Path(options.plot))
    finish(told, options.json, "GB")


def compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the results: measured GB, and beside it what was predicted."""

    def process(what: str) -> dict[str, Any]:
        arguments = ["--child", what, name, "--steps", str(options.steps)]
        return child(sys.executable, Path(__file__), arguments, options.timeout, {"HF_HUB_OFFLINE": "1"})

    found = process("plan")
    runs = [process("train") for _ in range(options.repeats)]
    if skipped := next((each["skipped"] for each in [found, *runs] if "skipped" in each), None):
        return {"skipped": skipped}
    measured = summary(run["peak_bytes"] / 1e9 for run in runs)
    seconds = summary(run["step_seconds"] for run in runs)["median"]
    header = runs[0]["header_bytes"]
    return measured | {
        "plan": found["total_bytes"] / 1e9,
        "error": found["total_bytes"] / 1e9 / measured["median"] - 1,
        "header": header and header / 1e9,
        "header_error": header and header / 1e9 / measured["median"] - 1,
        "parts": found["parts"],
        "step_seconds": seconds,
        "plan_step_seconds": found["step_seconds"],
        "case": dataclasses.asdict(CASES[name]),
    }


def planned(case: Case, steps: int) -> dict[str, Any]:
    """What `lorica plan` says."""
    from lorica import plan
    from lorica.models import load_tokenizer
    from lorica.models import machine as here
    from lorica.train.recipe import method_of

    rows = examples(case, steps)
    work = plan.work_of(*(plan.Asked(each, rows, method_of(each), steps) for each in members(case, steps).values()))
    load_tokenizer("smollm2-135m")  # which reading the data of a plan takes
    found = plan.predict(config_of(case), work, rate=here.step_rate(case.dtype))
    parts = dataclasses.asdict(found.memory)
    return {"total_bytes": found.memory.total, "parts": parts, "step_seconds": found.seconds}


def trained(case: Case, steps: int) -> dict[str, Any]:
    """What a training takes: peak resident bytes and the median seconds of an update of all after the first."""
    import statistics

    import lorica
    from lorica.models import load_tokenizer
    from lorica.train import many
    from lorica.train.memory import peak_rss_bytes

    model, tok, settings = _model(case), load_tokenizer("smollm2-135m"), members(case, steps)
    said: list[dict[str, Any]] = []

    def report(event: Any) -> None:
        said.append(dict(event))

    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "run"
        if case.ranks:
            many.train(model, tok, examples(case, steps), settings, out=path, report=report)
        else:
            lorica.train(model, tok, examples(case, steps), *settings.values(), out=path, report=report)
    start = next(event for event in said if event["kind"] == "start")
    seconds = [
        sum(event["seconds"] for event in said if event["kind"] == "step" and event["step"] == step)
        for step in range(2, steps + 1)
    ]
    return {
        "peak_bytes": peak_rss_bytes(),
        "header_bytes": start.get("predicted_bytes"),
        "step_seconds": statistics.median(seconds),
    }


def members(case: Case, steps: int) -> dict[str, Any]:
    """The settings of each adapter of the training, nothing held out and nothing written between."""
    import lorica

    return {
        f"a{place}": lorica.TrainSettings(
            rank=rank, targets=case.targets, dtype=case.dtype, device="cpu", steps=steps, batch=case.rows, lr=1e-4,
            sample=0, save_every=1e9, eval_every=10**9, **dict(case.how),
        )
        for place, rank in enumerate(case.ranks or (case.rank,))
    }  # fmt: skip


def examples(case: Case, steps: int) -> list[Any]:
    """Random ids, the same at each call."""
    from lorica.data import Example

    draw = random.Random(0)
    first = max(1, round(case.length * (1 - case.labelled)))
    marks = [i >= first for i in range(case.length)]
    return [Example([draw.randrange(1000, 30000) for _ in range(case.length)], marks) for _ in range(case.rows * steps)]


def config_of(case: Case) -> Any:
    """The config of a model that is only a shape, or of one that is there."""
    from transformers import GPT2Config, LlamaConfig

    from lorica import plan

    if case.model not in SHAPES:
        return plan.config_of(case.model)
    family, width, layers, heads, kv, inner, vocab = SHAPES[case.model]
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=2048, vocab_size=vocab)
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocab, max_position_embeddings=4096,
    )  # fmt: skip


def _model(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    import lorica

    if case.model not in SHAPES:
        return lorica.load(case.model, dtype=case.dtype, device="cpu")[0]
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    return AutoModelForCausalLM.from_config(config_of(case), dtype=dtype)


def report(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """The object of the contract."""
    there = [row for row in results.values() if "skipped" not in row]
    ratios = {"settings within 10 %": float(sum(abs(row["error"]) <= 0.1 for row in there))}
    for what, key in (("plan", "error"), ("header", "header_error")):
        if errors := [abs(row[key]) for row in there if row[key] is not None]:
            ratios[f"largest error of the {what}"] = max(errors)
    settings = {"steps": options.steps, "repeats": options.repeats}
    return {
        "bench": "plan", "settings": settings, "machine": machine(), "results": results, "ratios": ratios,
        "targets": TARGETS, "floor": None,
    }  # fmt: skip


def draw(results: dict[str, Any], path: Path) -> None:
    """Predicted against measured GB, with the line of agreement and 10 % on both sides."""
    from matplotlib.figure import Figure

    there = {name: row for name, row in results.items() if "skipped" not in row}
    limit = 1.1 * max(max(row["median"], row["plan"]) for row in there.values())
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, limit], [0, limit], color="0.6", lw=1)
    axes.fill_between([0, limit], [0, 0.9 * limit], [0, 1.1 * limit], color="0.9", lw=0, label="within 10 %")
    for dtype, mark in (("fp32", "o"), ("bf16", "s")):
        rows = [row for row in there.values() if row["case"]["dtype"] == dtype]
        axes.plot([row["median"] for row in rows], [row["plan"] for row in rows], mark, label=dtype)
    axes.set(xlabel="measured peak, GB", ylabel="predicted from shapes, GB", xlim=(0, limit), ylim=(0, limit))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    header = f"   header {row['header']:.2f} ({row['header_error']:+.1%})" if row["header"] else ""
    times = f"   step {row['step_seconds']:.1f} s, plan {row['plan_step_seconds']:.1f} s"
    return f"measured {row['median']:.2f} GB   plan {row['plan']:.2f} ({row['error']:+.1%}){header}{times}"


if __name__ == "__main__":
    main()
