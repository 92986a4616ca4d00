"""A task switch on a merged model (`lorica.select`) beside copying the bytes that it touches.

What is copied is every weight that the adapters change, from one place in memory to another that is there already.
"""

from __future__ import annotations

from typing import Any

import torch
from measure import summary

import lorica
from serve_parts.timing import in_turn, medians, timed


def run(options: Any) -> dict[str, Any]:
    """Ratio of the times in fp32 and in bf16; adapters of r=8 on all linear layers."""
    report: dict[str, Any] = {"results": {}, "ratios": {}, "notes": []}
    for dtype in ("fp32", "bf16"):
        found, weights, nbytes = _switched(options, dtype)
        took = medians(found)
        report["ratios"][f"task switch {dtype} / copy"] = took["switch"] / took["copy"]
        for name, seconds in found.items():
            rate = summary(nbytes / 1e9 / each for each in seconds) | {"unit": "GB/s"}
            report["results"][f"{name}, merged {dtype}"] = rate
        told = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in took.items())
        report["notes"].append(f"switch {dtype}: {weights} weights, {nbytes / 1e6:.0f} MB: {told}; back to the bit")
    return report


def _switched(options: Any, dtype: str) -> tuple[dict[str, list[float]], int, int]:
    """Seconds of copying and of switching to and fro, in turn; how many weights and bytes that touches."""
    model, _ = lorica.load(options.model, dtype=dtype)
    base = {name: weight.clone() for name, weight in _weights(model).items()}
    for seed, name in enumerate("ab"):
        lorica.inject(model, lorica.LoRA(r=8, alpha=8), "all-linear", name)
        generator = torch.Generator().manual_seed(seed)
        for factor in lorica.trainable(model, name).values():
            factor.data = torch.randn(factor.shape, generator=generator) * 0.03
    lorica.select(model, "a")
    lorica.merge(model, check=False)
    merged = {name: weight.clone() for name, weight in _weights(model).items()}
    touched = [name for name, weight in merged.items() if not torch.equal(weight, base[name])]
    copies = [merged[name].clone() for name in touched]

    def switch() -> None:
        lorica.select(model, "b" if lorica.active(model) == "a" else "a")

    def copy() -> None:
        for name, into in zip(touched, copies, strict=True):
            into.copy_(merged[name])

    found = in_turn({"copy": lambda: timed(copy), "switch": lambda: timed(switch)}, 5 * options.repeats)
    lorica.select(model, "a")
    assert _same(model, merged), "a switch to and fro changed a weight"
    lorica.unmerge(model)
    assert _same(model, base), "the base has changed"
    return found, len(touched), sum(each.nbytes for each in copies)


def _same(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, weights[name]) for name, weight in _weights(model).items())


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights in their places, without those of adapters."""
    return {name: weight.detach() for name, weight in model.named_parameters() if ".lorica." not in f".{name}"}
