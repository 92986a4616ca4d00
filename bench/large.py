"""A model of 1.5B parameters (random weights, bf16) trained for 20 updates of a 512-token row on a CPU: its memory.

python bench/large.py --json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from measure import finish, machine

LIMIT = 12e9


def main() -> None:
    """Build, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorica
    from lorica.data import Example
    from lorica.models import load_tokenizer

    # The shape of Qwen2.5-1.5B.
    config = LlamaConfig(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True, attention_bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    tok = load_tokenizer("smollm2-135m")
    draw = random.Random(0)
    rows = [
        Example([draw.randrange(1000, 40000) for _ in range(512)], [False] + [True] * 511) for _ in range(options.steps)
    ]
    settings = lorica.TrainSettings(steps=options.steps, batch=1, sample=0, lr=1e-4, dtype="bf16", save_every=1e9)
    said: list[dict] = []

    def report(event: dict) -> None:
        said.append(dict(event))
        if event["kind"] == "step":
            line = f"{event['step']:3} loss {event['loss']:.3f} {event['seconds']:.1f} s {event['memory'] / 1e9:.2f} GB"
            print(line, file=sys.stderr, flush=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        run = lorica.train(model, tok, rows, settings, out=Path(out) / "run", report=report)
    steps = sorted(event["seconds"] for event in said if event["kind"] == "step")
    planned = next(event for event in said if event["kind"] == "start")["predicted_bytes"]
    speed = {
        "median": 512 / steps[len(steps) // 2],
        "min": 512 / steps[-1],
        "max": 512 / steps[0],
        "repeats": len(steps),
    }
    result = {
        "bench": "train large",
        "settings": {"parameters": sum(each.numel() for each in model.parameters()) - run.adapter.nbytes // 4,
                     "r": 8, "targets": "all-linear", "dtype": "bf16", "steps": options.steps, "tokens": 512,
                     "planned_bytes": planned,
                     "total_seconds": time.monotonic() - began},
        "machine": machine(),
        "results": {"lorica_bf16": speed | {"peak_bytes": run.peak_rss_bytes}},
        "ratios": {"peak / 12 GB": run.peak_rss_bytes / LIMIT, "planned / measured": planned / run.peak_rss_bytes},
        "targets": {"peak / 12 GB": ("<=", 1.0)},
        "floor": {},
    }  # fmt: skip
    finish(json.loads(json.dumps(result)), options.json, "tok/s")


if __name__ == "__main__":
    main()
