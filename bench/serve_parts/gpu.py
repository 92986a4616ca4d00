"""On one GPU: 64 requests on a model of 8B parameters (random weights, bf16): the base, one adapter, and one for each.

Beside the engine's steps stands the least that its bytes take: weights, keys and values, and every adapter in the step,
each read once, at the speed of a large copy on this GPU.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu import shaped
from safetensors.torch import save_file

from lorica import Adapter, LoRA
from lorica.serve import open_engine
from lorica.serve.engine import EngineSettings
from lorica.serve.places import CONFIG, TENSORS
from lorica.serve.requests import kv_bytes
from lorica.serve.rows import Layers, Rows
from lorica.serve.store import Store
from lorica.targets import resolve
from serve_parts.served import Served, prompts
from serve_parts.timing import in_turn, medians, rates

REQUESTS, RANK = 64, 16


def run(options: Any) -> dict[str, Any]:
    """Ratios of a step to the base's, and to what its bytes take."""
    shape, device = ("8b", "cuda") if torch.cuda.is_available() else ("tiny", "cpu")
    model = shaped(shape, device).eval().requires_grad_(False)
    layers = Layers(model)
    names = [f"a{place}" for place in range(REQUESTS)]
    made = {name: _adapter(layers, place) for place, name in enumerate(names)}
    plan: dict[str, list[Any]] = {
        "base": [None] * REQUESTS, "one adapter": names[:1] * REQUESTS, f"{REQUESTS} adapters": names,
    }  # fmt: skip
    ids, digest = prompts(options.prompt, REQUESTS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            place = Path(folder) / name
            place.mkdir()
            save_file({"x": torch.zeros(1)}, place / TENSORS)
            (place / CONFIG).write_text("{}")
        served = _Made(model, layers, made, Path(folder), options)
        calls = {
            name: lambda owners=owners: served.run(list(zip(owners, ids, strict=True)), options.answer)[1]
            for name, owners in plan.items()
        }
        for call in calls.values():  # records what it will repeat
            call()
        found = in_turn(calls, options.repeats)
        served.close()
    took = medians(found)
    speed = _bytes_per_second(device)
    least = _weights(model) + REQUESTS * (options.prompt + options.answer // 2) * kv_bytes(model.config, 2)
    ratios = {}
    for name, owners in plan.items():
        floor = (least + sum(made[each].nbytes for each in set(owners) if each)) / speed
        ratios[f"gpu: {name} / byte floor"] = took[name] / floor
        if name != "base":
            ratios[f"gpu: {name} / base"] = took[name] / took["base"]
        print(f"{name:16} {took[name] * 1e3:7.2f} ms, floor {floor * 1e3:.2f} ms", file=sys.stderr, flush=True)
    about = {"model": f"Llama, {shape}", "gpu prompts": digest, "gpu rank": RANK, "copy bytes/s": round(speed)}
    return {"results": rates({f"gpu, {name}": each for name, each in found.items()}, REQUESTS), "ratios": ratios,
            "settings": about}  # fmt: skip


class _Made(Served):
    """An engine whose adapters are made instead of read: 64 files of 8B would take minutes."""

    def __init__(self, model: Any, layers: Layers, made: dict[str, Rows], root: Path, options: Any) -> None:
        self.model, self.layers, self.root = model, layers, root
        self.store = Store(lambda folder: made[folder.name], root)
        room = REQUESTS * (options.prompt + options.answer + 64)
        size = EngineSettings(REQUESTS, batch_tokens=4096, kv_tokens=room, prefix_cache=False)
        began = time.perf_counter()
        self.engine, note = open_engine(model, layers, size)
        print(f"opened in {time.perf_counter() - began:.1f} s {note}", file=sys.stderr, flush=True)
        assert not note, note


def _adapter(layers: Layers, seed: int) -> Rows:
    """An adapter on all linear layers with random factors."""
    model: Any = layers.model
    generator = torch.Generator(model.device).manual_seed(seed)
    tensors = {}
    for target in (targets := tuple(resolve(model, "all-linear"))):
        weight = model.get_submodule(target.path).weight
        for factor, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
            drawn = torch.randn(shape, generator=generator, device=model.device)
            tensors[f"{target.path}#lora.{factor}"] = 0.02 * drawn
    return layers.rows(Adapter(LoRA(r=RANK, alpha=RANK), targets, tensors, {}))


def _weights(model: Any) -> int:
    """Bytes that a step reads: of a table of embeddings that is not the head, only a few rows."""
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    table = 0 if tied else model.get_input_embeddings().weight.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def _bytes_per_second(device: str) -> float:
    """Read and written by a large copy, the median of some."""
    x = torch.empty(1 << (30 if device == "cuda" else 26), dtype=torch.uint8, device=device)
    y, times = torch.empty_like(x), []
    for _ in range(12):
        began = time.perf_counter()
        y.copy_(x)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * x.numel() / statistics.median(times[2:])
