"""What the adapters' products cost: forward passes of 16 tokens without a past, each between two of the base's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from measure import summary

import lorica
from lorica.serve.rows import Layers
from serve_parts.served import adapters_in, mixtures
from serve_parts.timing import beside, timed


def run(options: Any) -> dict[str, Any]:
    """Ratio of each mixture to the base."""
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    with adapters_in(options) as folder, torch.no_grad():
        model, _ = lorica.load(options.model, dtype="fp32")
        plans = mixtures(model, folder)
        model.requires_grad_(False)
        layers, ids = Layers(model), torch.randint(10, 40_000, (16, 1))

        def step(work: list[Any]) -> float:
            layers.work = work
            return timed(lambda: model(input_ids=ids, use_cache=False))

        base: list[Any] = [None] * len(layers.layers)

        def compare(name: str, other: Callable[[], float]) -> None:
            ratio, _, took = beside(lambda: step(base), other, 5 * options.repeats)
            layers.idle()
            ratios[f"{name} / base, products"] = ratio
            results[f"step, {name}"] = summary(16 / each for each in took)
            print(f"{name:22} {ratio:.3f}", file=sys.stderr, flush=True)

        with layers.attached():
            one = layers.read(folder / plans["one r8 all-linear"][0])
            changed = {}
            for index in one.ups:
                A, B = layers.factors(one, index)
                changed[index] = layers.layers[index].module.weight + B.T @ A

            def merged() -> float:
                layers.merge(one, changed)
                took = step(layers.plan([(one, 1)] * 16).work)
                layers.unmerge()
                return took

            compare("merged", merged)
            for name, names in plans.items():
                loaded = {each: layers.read(folder / each) for each in set(names)}
                work = layers.plan([(loaded[each], 1) for each in names]).work
                compare(name, lambda work=work: step(work))
    return {"results": results, "ratios": ratios}
