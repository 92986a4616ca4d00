"""Training on one GPU: a model of 8B parameters (random weights, bf16, r=16 on all linear layers, rows of 4,096), and
one of 1B beside PEFT under transformers' Trainer; the plan's error on both.

    python bench/gpu.py --json
    python bench/gpu.py --shapes tiny --device cpu        # that the script works, where there is no GPU
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import child, finish, interleaved, machine, summary

# (width, inner width, layers, heads, key and value heads, vocabulary) of Llama 3.1 8B, Llama 3.2 1B, and a toy.
SHAPES = {
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "tiny": (64, 128, 4, 4, 2, 49152),
}
TARGETS = {
    "lorica_8b tokens/s": (">=", 15000.0),
    "lorica_1b / peft_1b": (">=", 1.0),
    "plan error 8b": ("<=", 0.1),
    "plan error 1b": ("<=", 0.1),
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8b,1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4, help="rows an update")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(contender(options)), flush=True)
        return
    given = [f"--{key}={getattr(options, key)}" for key in ("device", "length", "rows", "steps")]
    names = [f"{who}_{shape}" for shape in options.shapes.split(",") for who in ("lorica", "peft")]
    names = [name for name in names if name != "peft_8b"]
    calls = {
        name: (lambda name=name: child(sys.executable, Path(__file__), ["--child", name, *given], 1200, {}))
        for name in names
    }
    found = interleaved(calls, options.repeats, lambda line: print(line, file=sys.stderr, flush=True))
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name, runs in found.items():
        if reason := next((run["skipped"] for run in runs if "skipped" in run), None):
            results[name] = {"skipped": reason}
            continue
        results[name] = summary(run["tokens_per_second"] for run in runs) | {"peak_bytes": runs[0]["peak_bytes"]}
        if "planned" in runs[0]:
            ratios[f"plan error {name.partition('_')[2]}"] = abs(runs[0]["planned"] / runs[0]["peak_bytes"] - 1)
    speed = {name: row["median"] for name, row in results.items() if "median" in row}
    if "lorica_8b" in speed:
        ratios["lorica_8b tokens/s"] = speed["lorica_8b"]
    if "lorica_1b" in speed and "peft_1b" in speed:
        ratios["lorica_1b / peft_1b"] = speed["lorica_1b"] / speed["peft_1b"]
    settings = {key: getattr(options, key) for key in ("shapes", "device", "length", "rows", "steps", "repeats")}
    report = {
        "bench": "train gpu", "settings": settings | {"r": 16, "dtype": "bf16"}, "machine": machine(),
        "results": results, "ratios": ratios, "targets": TARGETS, "floor": {},
    }  # fmt: skip
    finish(report, options.json, "tok/s")


def contender(options: argparse.Namespace) -> dict[str, Any]:
    """One of `lorica_SHAPE` and `peft_SHAPE`: tokens per second after the first update, and peak memory."""
    who, _, shape = options.child.partition("_")
    model = shaped(shape, options.device)
    draw = random.Random(0)
    rows = [[draw.randrange(1000, 40000) for _ in range(options.length)] for _ in range(options.rows * options.steps)]
    with tempfile.TemporaryDirectory() as out:
        steps, planned = (_lorica if who == "lorica" else _peft)(model, rows, options, out)
    from lorica.train.memory import peak_bytes

    seconds = sum(steps[1:]) / (len(steps) - 1)
    told = {"tokens_per_second": options.rows * options.length / seconds, "peak_bytes": peak_bytes(model.device)}
    return told | ({"planned": planned} if planned else {})


def shaped(shape: str, device: str) -> Any:
    """A Llama of one of `SHAPES` with random weights, in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, layers, heads, kv, vocab = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=8192, tie_word_embeddings=shape != "8b",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def _lorica(model: Any, rows: list[list[int]], options: argparse.Namespace, out: str) -> tuple[list[float], int]:
    import lorica
    from lorica.data import Example

    settings = lorica.TrainSettings(
        rank=16, alpha=16, lr=1e-4, steps=options.steps, batch=options.rows, sample=0, dtype="bf16", max_len=8192,
        save_every=1e9, device=options.device,
    )  # fmt: skip
    said: list[dict] = []
    examples = [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in rows]
    lorica.train(
        model, _tokenizer(), examples, settings, out=Path(out) / "run", report=lambda event: said.append(dict(event))
    )
    start = next(event for event in said if event["kind"] == "start")
    return [event["seconds"] for event in said if event["kind"] == "step"], start["predicted_bytes"]


def _tokenizer() -> Any:
    """Words for ids: the rows are ids already, and nothing is fetched."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(40_000)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="t1", pad_token="t1", unk_token="t0")


def _peft(model: Any, rows: list[list[int]], options: argparse.Namespace, out: str) -> tuple[list[float], int]:
    import torch
    from contenders import LINEAR, _timed
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=out, per_device_train_batch_size=options.rows, max_steps=options.steps, learning_rate=1e-4,
        bf16=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        use_cpu=options.device == "cpu",
    )  # fmt: skip
    data: Any = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in rows]
    return [step["seconds"] for step in _timed(Trainer, model=model, args=arguments, train_dataset=data)], 0


if __name__ == "__main__":
    main()
