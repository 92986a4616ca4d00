"""The engine beside transformers' own ways, and PEFT's mixed batch, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

import lorica
from serve_parts.served import Served, adapters_in, made, prompts
from serve_parts.timing import in_turn, medians, rates, timed


def run(options: Any) -> dict[str, Any]:
    """Ratios of tokens per second, ours over theirs."""
    names = [f"qv-r8-{i}" for i in range(16)]
    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        for i, name in enumerate(names):
            made(model, folder, name, lorica.LoRA(r=8, alpha=8), "qv", 800 + i)
        served = Served(options, folder)
        ids, digest = prompts(options.prompt, 16)
        given = torch.tensor(ids)
        count = {"max_new_tokens": options.answer, "min_new_tokens": options.answer, "do_sample": False}
        quiet = GenerationConfig(**count, eos_token_id=-1, pad_token_id=0)
        pefted = PeftModel.from_pretrained(lorica.load(options.model, dtype="fp32")[0], folder / names[0], names[0])
        for name in names[1:]:
            pefted.load_adapter(folder / name, name)
        pefted.eval()

        def upstream() -> None:
            size = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512, max_memory_percent=1.0)
            plain = GenerationConfig(max_new_tokens=options.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
            found = model.generate_batch(ids, generation_config=plain, continuous_batching_config=size, warmup=False)
            assert all(len(each.generated_tokens) == options.answer for each in found.values())

        generate = {"attention_mask": torch.ones_like(given), "generation_config": quiet}
        calls: dict[str, Callable[[], float]] = {
            "lorica": lambda: served.run([(None, each) for each in ids], options.answer)[0],
            "transformers continuous batching": lambda: timed(upstream),
            "batched generate": lambda: timed(lambda: model.generate(given, **generate)),
            "lorica 16 r8 qv": lambda: served.run(list(zip(names, ids, strict=True)), options.answer)[0],
            "peft mixed batch": lambda: timed(lambda: pefted.generate(given, adapter_names=names, **generate)),
        }
        with torch.no_grad():
            found = in_turn(calls, options.repeats)
        served.close()
    took = medians(found)
    pairs = [("lorica", "transformers continuous batching"), ("lorica", "batched generate")]
    pairs.append(("lorica 16 r8 qv", "peft mixed batch"))
    ratios = {f"{ours} / {theirs}": took[theirs] / took[ours] for ours, theirs in pairs}
    return {"results": rates(found, 16 * options.answer), "ratios": ratios, "settings": {"prompts": digest}}
