"""What adapters cost a decoding step of 16 requests: the base, merged, one adapter, sixteen of one rank and of many.

Each run stands between two of the base, and the base itself does as well, which shows how far a ratio scatters.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from measure import summary

import lorica
from serve_parts.served import Served, adapters_in, mixtures, prompts
from serve_parts.timing import beside


def run(options: Any) -> dict[str, Any]:
    """Ratio of each mixture's steps to the base's."""
    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        plan: dict[str, list[Any]] = {name: [None] * 16 for name in ("base", "merged")} | mixtures(model, folder)
        adapter = lorica.Adapter.load(folder / "all-linear-r8-0")
        del model
        served = Served(options, folder)
        ids, digest = prompts(options.prompt, 16)

        def merged() -> list[float]:
            with served.engine.pause():
                kept = {name: p.data for name, p in served.model.named_parameters()}
                for target in adapter.targets:
                    A, B = (adapter.tensors[f"{target.path}#lora.{factor}"] for factor in "AB")
                    parameter = served.model.get_parameter(f"{target.path}.weight")
                    parameter.data = parameter.data + adapter.method.scale_of(target.key) * (B @ A)
            gaps = served.run([(None, each) for each in ids], options.answer)[1]
            with served.engine.pause():
                for name, value in kept.items():
                    served.model.get_parameter(name).data = value
            return gaps

        def gap(name: str) -> float:
            """Median seconds between two tokens of one run."""
            jobs = list(zip(plan[name], ids, strict=True))
            return statistics.median(merged() if name == "merged" else served.run(jobs, options.answer)[1])

        results: dict[str, Any] = {}
        ratios: dict[str, float] = {}
        for name in options.only.split(",") if options.only else plan:
            ratio, base, took = beside(lambda: gap("base"), lambda name=name: gap(name), options.repeats)
            ratios[f"{name} / base"] = ratio
            results[name] = summary(16 / each for each in took)
            print(f"{name:22} {ratio:.3f}   base {1000 * statistics.median(base):.0f} ms", file=sys.stderr, flush=True)
        served.close()
    return {"results": results, "ratios": ratios, "settings": {"prompts": digest}}
