"""Training speed and memory beside the peers, on the same token ids, each contender in a process of its own, in turn.

    python bench/train.py --json > train.json
    python bench/train.py --workload equal512
    python bench/train.py --workload cost --plot docs/cost.png

Workloads: `e2e` (E2E rows, prompt and completion as raw text, 8 rows a step), `equal512` (rows of 512 tokens, all
labelled, 4 rows a step), `cost` (lorica alone against rank, sequence length and rows). A peer whose library another
environment holds is given by --python trl=/path/to/python; one that is missing is reported as skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import DATA, child, finish, interleaved, machine, peak, summary

HERE = Path(__file__).parent
CONTENDERS = (
    "lorica_fp32", "lorica_bf16", "peft_fp32", "peft_bf16", "plain_fp32_4", "plain_fp32_8", "plain_bf16_8",
    "trl_default", "trl_fp32", "trl_bf16", "unsloth_default", "unsloth_bf16", "unsloth_fp32",
)  # fmt: skip
# (ratio, sense, bound): tokens per second of ours over theirs, and our peak memory over theirs.
E2E_TARGETS = {
    "lorica_fp32 / peft_fp32": (">=", 1.6),
    "memory lorica_fp32 / peft_fp32": ("<=", 0.6),
    "lorica_bf16 / peft_bf16": (">=", 2.5),
    "lorica_best / plain_best": (">=", 1.4),
    "lorica_best / trl_default": (">=", 3.0),
    "lorica_best / trl_best": (">=", 2.0),
    "lorica_best / unsloth_default": (">=", 2.5),
    "lorica_best / unsloth_best": (">=", 2.3),
    "floor fp32": (">=", 0.65),
    "floor bf16": (">=", 0.55),
}
EQUAL_TARGETS = {"lorica_best / peer_best": (">=", 1.2), "floor fp32": (">=", 0.65), "floor bf16": (">=", 0.55)}


def main() -> None:
    """Parse, prepare the rows, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("e2e", "equal512", "cost"), default="e2e")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--python", action="append", default=[], metavar="FAMILY=PATH")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--plot", default="", help="where to draw the cost")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.workload == "cost":
        import cost

        cost.run(options)
        return
    work = prepare(options)
    pythons = dict(each.partition("=")[::2] for each in options.python)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "work.json"
        path.write_text(json.dumps(work))

        def contender(name: str) -> Any:
            python = pythons.get(name.partition("_")[0], sys.executable)
            env = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
            return lambda: child(python, HERE / "contenders.py", [name, str(path)], options.timeout, env)

        calls: dict[str, Any] = {name: contender(name) for name in options.contenders.split(",")}
        shapes = work["shapes"]
        calls |= {f"gemm_{dtype}": (lambda dtype=dtype: {"flops": peak(dtype, shapes)}) for dtype in ("fp32", "bf16")}
        found = interleaved(calls, options.repeats, lambda line: print(line, file=sys.stderr, flush=True))
    finish(report(options, work, found), options.json, "tok/s")


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Rows as ``[ids, first label]``, the batches, and what the floor needs to know of the model."""
    from transformers import AutoTokenizer

    from lorica.data import Sampler
    from lorica.models.loading import locate

    folder = str(locate(options.model))
    tok = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in (DATA / "e2e" / "train.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(lines)
    rows = []
    if options.workload == "e2e":
        batch = 8
        for line in lines[: 2 * batch * options.steps]:
            prompt, answer = tok(line["mr"] + "\n")["input_ids"], tok(line["ref"])["input_ids"]
            rows.append([[*prompt, *answer, tok.eos_token_id], len(prompt)])
    else:
        batch = 4
        stream = [
            token for line in lines for token in (*tok(line["mr"] + "\n" + line["ref"])["input_ids"], tok.eos_token_id)
        ]
        rows = [[stream[at : at + 512], 1] for at in range(0, 512 * 2 * batch * options.steps, 512)]
    sampler = Sampler(len(rows), batch, 0)
    config = json.loads((Path(folder) / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or width // heads
    return {
        "model": folder, "rows": rows, "batch": batch, "warm": options.warm,
        "batches": [next(sampler) for _ in range(options.steps)],
        "sizes": {
            "blocks": layers * (width * dim * (2 * heads + 2 * kv) + 3 * width * inner),
            "head": width * config["vocab_size"],
            "attention": layers * heads * dim,
            "lora": layers * 8 * (7 * width + 2 * heads * dim + 2 * kv * dim + 3 * inner),
        },
        "shapes": [(2048, 2048, 2048), (512, width, width), (512, width, inner), (512, inner, width)],
    }  # fmt: skip


def floor(work: dict[str, Any]) -> dict[str, float]:
    """FLOP per token: ``4 N_blocks + 4 H V l + 3.5 (2 S d_attn L) + 6 P_lora``, and what it is made of."""
    drawn = [work["rows"][i] for batch in work["batches"][work["warm"] :] for i in batch]
    tokens = sum(len(ids) for ids, _ in drawn)
    labelled = sum(len(ids) - first for ids, first in drawn) / tokens
    mean = sum(len(ids) ** 2 for ids, _ in drawn) / tokens
    sizes = work["sizes"]
    parts = {
        "blocks": 4 * sizes["blocks"],
        "head": 4 * sizes["head"] * labelled,
        "attention": 3.5 * 2 * mean * sizes["attention"],
        "lora": 6 * sizes["lora"],
    }
    return {"flop_per_token": sum(parts.values()), "labelled": labelled, "mean_tokens": tokens / len(drawn)} | parts


def report(options: argparse.Namespace, work: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The object of the contract."""
    results: dict[str, Any] = {}
    for name, runs in found.items():
        if any("skipped" in run for run in runs):
            results[name] = {"skipped": next(run["skipped"] for run in runs if "skipped" in run)}
        elif "flops" in runs[0]:
            results[name] = summary(run["flops"] / 1e9 for run in runs)
        else:
            memory = summary(run["peak_bytes"] for run in runs)["median"]
            more = {key: runs[0][key] for key in ("losses", "total_seconds", "sha256")}
            results[name] = summary(run["tokens_per_second"] for run in runs) | {"peak_bytes": memory} | more
    speed = {name: row["median"] for name, row in results.items() if "peak_bytes" in row}
    memory = {name: row["peak_bytes"] for name, row in results.items() if "peak_bytes" in row}
    best = {}
    for family, members in _families(speed).items():
        best[f"{family}_best"] = max(speed[name] for name in members)
    peers = [speed[name] for name in speed if not name.startswith("lorica")]
    values = speed | best | ({"peer_best": max(peers)} if peers else {})
    ratios = {}
    targets = E2E_TARGETS if options.workload == "e2e" else EQUAL_TARGETS
    least = floor(work)
    for name in targets:
        ours, _, theirs = name.removeprefix("memory ").partition(" / ")
        table = memory if name.startswith("memory") else values
        if name.startswith("floor"):
            dtype = name.removeprefix("floor ")
            if f"lorica_{dtype}" in speed:
                ratios[name] = (
                    speed[f"lorica_{dtype}"] * least["flop_per_token"] / results[f"gemm_{dtype}"]["median"] / 1e9
                )
        elif ours in table and theirs in table:
            ratios[name] = table[ours] / table[theirs]
    settings = {key: getattr(options, key) for key in ("workload", "model", "repeats", "steps", "warm")}
    settings |= {"r": 8, "alpha": 16, "lr": 2e-4, "batch": work["batch"]}
    settings["sha256"] = hashlib.sha256(json.dumps(work["rows"]).encode()).hexdigest()
    return {
        "bench": f"train {options.workload}", "settings": settings, "machine": machine(), "results": results,
        "ratios": ratios, "targets": targets, "floor": least,
    }  # fmt: skip


def _families(speed: dict[str, float]) -> dict[str, list[str]]:
    """Contenders by library; a peer's defaults are not among its best settings unless it has no others."""
    found: dict[str, list[str]] = {}
    for name in speed:
        found.setdefault(name.partition("_")[0], []).append(name)
    return {
        family: [name for name in names if not name.endswith("_default")] or names for family, names in found.items()
    }


if __name__ == "__main__":
    main()
