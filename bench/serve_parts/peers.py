"""The engine beside transformers' own ways, and PEFT's mixed batch, on the same prompts.

PEFT's batch is met in three ways: sixteen requests of one length, which suits it best, with its own default targets
(q and v) and with all linear layers; and 32 requests of many lengths, which it takes sixteen at a time, padded, each
batch until its longest answer is there. Tokens that were asked for count, on both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import ContinuousBatchingConfig, GenerationConfig

import lorica
from lorica.evaluate.generation import left_padded
from serve_parts.served import Served, adapters_in, made, prompts, uneven
from serve_parts.timing import in_turn, rates, timed

BATCH, UNEVEN = 16, 32  # requests at a time, and of many lengths


def run(options: Any) -> dict[str, Any]:
    """Ratios of tokens per second, ours over theirs."""
    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        names = {targets: [f"{targets}-r8-{i}" for i in range(BATCH)] for targets in ("qv", "all-linear")}
        for targets, each in names.items():
            for i, name in enumerate(each):
                made(model, folder, name, lorica.LoRA(r=8, alpha=8), targets, 800 + i)
        served = Served(options, folder)
        theirs = {targets: _pefted(options, folder, each) for targets, each in names.items()}
        ids, digest = prompts(options.prompt, BATCH)
        many, answers, other = uneven(UNEVEN)

        def upstream() -> None:
            size = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512, max_memory_percent=1.0)
            plain = GenerationConfig(max_new_tokens=options.answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
            found = model.generate_batch(ids, generation_config=plain, continuous_batching_config=size, warmup=False)
            assert all(len(each.generated_tokens) == options.answer for each in found.values())

        def generated(of: Any, ids: list[list[int]], answer: int, **more: Any) -> None:
            inputs = left_padded(ids, 0, of.device)
            count = {"max_new_tokens": answer, "min_new_tokens": answer, "do_sample": False}
            quiet = GenerationConfig(**count, eos_token_id=-1, pad_token_id=0)
            found = of.generate(**inputs, generation_config=quiet, **more)
            assert found.shape[1] == inputs["input_ids"].shape[1] + answer

        def ours(targets: str) -> float:
            return served.run(list(zip(names[targets], ids, strict=True)), options.answer)[0]

        def mixed(targets: str) -> float:
            return timed(lambda: generated(theirs[targets], ids, options.answer, adapter_names=names[targets]))

        def in_batches() -> None:
            for i in range(0, UNEVEN, BATCH):
                batch = slice(i, i + BATCH)
                generated(theirs["qv"], many[batch], max(answers[batch]), adapter_names=names["qv"])

        every = names["qv"] * (UNEVEN // BATCH)
        calls: dict[str, Callable[[], float]] = {
            "lorica": lambda: served.run([(None, each) for each in ids], options.answer)[0],
            "transformers continuous batching": lambda: timed(upstream),
            "batched generate": lambda: timed(lambda: generated(model, ids, options.answer)),
            "lorica 16 r8 qv": lambda: ours("qv"),
            "peft mixed batch": lambda: mixed("qv"),
            "lorica 16 r8 all-linear": lambda: ours("all-linear"),
            "peft mixed batch, all-linear": lambda: mixed("all-linear"),
            "lorica, many lengths": lambda: served.run(list(zip(every, many, strict=True)), answers)[0],
            "peft mixed batch, many lengths": lambda: timed(in_batches),
        }
        with torch.no_grad():
            wanted = options.only.split(",") if options.only else calls
            found = in_turn({name: calls[name] for name in calls if name in wanted}, options.repeats)
        served.close()
    pairs = [("lorica", "transformers continuous batching"), ("lorica", "batched generate")]
    pairs.append(("lorica 16 r8 qv", "peft mixed batch"))
    pairs.append(("lorica 16 r8 all-linear", "peft mixed batch, all-linear"))
    pairs.append(("lorica, many lengths", "peft mixed batch, many lengths"))
    # By turn, since neighbours share a moment of the machine.
    ratios = {
        f"{ours} / {theirs}": statistics.median(b / a for a, b in zip(found[ours], found[theirs], strict=True))
        for ours, theirs in pairs
        if ours in found and theirs in found
    }
    rows: dict[str, Any] = {}
    for name, each in found.items():
        rows |= rates({name: each}, sum(answers) if "many lengths" in name else BATCH * options.answer)
    return {"results": rows, "ratios": ratios, "settings": {"prompts": digest, "prompts of many lengths": other}}


def _pefted(options: Any, folder: Path, names: list[str]) -> Any:
    """The base with PEFT's adapters on it."""
    model, _ = lorica.load(options.model, dtype="fp32")
    found = PeftModel.from_pretrained(model, folder / names[0], names[0])
    for name in names[1:]:
        found.load_adapter(folder / name, name)
    return found.eval()
