"""What adapters cost a decoding step of 16 requests: the base, merged, one adapter, sixteen of one rank and of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lorica
from serve_parts.served import Served, adapters_in, mixtures, prompts
from serve_parts.timing import in_turn, medians, rates


def run(options: Any) -> dict[str, Any]:
    """Ratio of each mixture's steps to the base's."""
    with adapters_in(options) as folder:
        model, _ = lorica.load(options.model, dtype="fp32")
        plan: dict[str, list[Any]] = {"base": [None] * 16} | mixtures(model, folder)
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

        calls: dict[str, Callable[[], Any]] = {
            name: lambda names=names: served.run(list(zip(names, ids, strict=True)), options.answer)[1]
            for name, names in plan.items()
        }
        calls = {"base": calls.pop("base"), "merged": merged, **calls}
        only = options.only.split(",") if options.only else calls
        found = in_turn({name: calls[name] for name in calls if name in only}, options.repeats)
        served.close()
    took = medians(found)
    ratios = {f"{name} / base": seconds / took["base"] for name, seconds in took.items() if name != "base"}
    return {"results": rates(found, 16), "ratios": ratios, "settings": {"prompts": digest}}
