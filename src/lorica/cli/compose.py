"""`lorica compose EXPRESSION [NAME=PATH ...] -o OUT`: adapter algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lorica.cli.parse import Common

if TYPE_CHECKING:
    from lorica.adapter import Adapter
    from lorica.expression import Composed


@dataclass(kw_only=True)
class Settings(Common):
    """Add, subtract, weigh, truncate and merge adapters of one base; say how alike they are and what was cut.

    "0.7*a + 0.3*b" with a=runs/first b=runs/second; truncate(a, r=8), truncate(a, energy=0.99),
    ties(a, b, density=0.5), dare(a, b, density=0.5, seed=0), cat(a, b). Paths stand for themselves (spaces around
    minus then), or in quotes.
    """

    expression: tyro.conf.Positional[str]
    """What to compute, in quotes: names or paths of adapters and runs, numbers, + - *, parentheses, functions."""
    things: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=PATH of the names in it; a path, a run or a hub id."""
    rank: int | None = None
    """Truncate the result to this rank."""
    energy: float | None = None
    """Truncate the result to the smallest rank of each update that keeps this share of its squared norm."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the file."""
    base: Annotated[str, tyro.conf.arg(metavar="MODEL")] = ""
    """The base model, read only where parameters trained whole are combined with weights that do not add up to 1."""


def run(settings: Settings) -> dict[str, Any]:
    """Compute, write and print."""
    from pathlib import Path

    from lorica.errors import LoricaError

    if not settings.out:
        raise LoricaError("say where the result goes: -o OUT")
    if Path(settings.out).exists():
        raise LoricaError(f"{settings.out} is there already, and nothing is overwritten; give another name")
    done = _composed(settings)
    done.adapter.save(settings.out, settings.dtype)
    written = sum(file.stat().st_size for file in Path(settings.out).iterdir())
    facts = _facts(done) | {"composed": settings.out, "dtype": settings.dtype, "bytes": written}
    facts["next"] = f"lorica eval {settings.out} DATA --compare base"
    if not settings.json:
        _say(facts)
    return facts


def plan(settings: Settings) -> None:
    """What `run` would write: everything is computed, nothing is written."""
    done = _composed(settings)
    if not settings.json:
        _say(_facts(done))


def _composed(settings: Settings) -> Composed:
    from lorica.export import open_adapter
    from lorica.expression import compose, energy_cut

    done = compose(settings.expression, _named(settings.things), open_adapter)
    if settings.rank is not None or settings.energy is not None:
        whole, done.adapter = done.adapter, done.adapter.truncate(settings.rank, settings.energy)
        asked = [f"--{key} {value:g}" for key in ("rank", "energy") if (value := getattr(settings, key)) is not None]
        done.cuts[" ".join(asked)] = energy_cut(whole, done.adapter)
    if done.adapter.shares:
        done.adapter = _settled(done.adapter, settings.base)
    return done


def _settled(adapter: Adapter, base: str) -> Adapter:
    from lorica.errors import LoricaError
    from lorica.models import load

    named = base or adapter.meta.get("base_model", "")
    if not named:
        raise LoricaError(
            f"{next(iter(adapter.shares))} is trained whole, its weights do not add up to 1, and the adapters name no"
            " base model of which the rest could be taken: --base MODEL"
        )
    model, _ = load(named, dtype="fp32", device="cpu")
    return adapter.settled(model)


def _named(things: tuple[str, ...]) -> dict[str, str]:
    from lorica.errors import all_faults

    pairs = [thing.partition("=") for thing in things]
    if faults := [thing for thing, pair in zip(things, pairs, strict=True) if not all(pair)]:
        raise all_faults("after the expression come names of adapters, NAME=PATH, and not:", faults)
    return {name: path for name, _, path in pairs}


def _facts(done: Composed) -> dict[str, Any]:
    """Sizes and likenesses: cosines between updates, over all matrices, as ``<dW, dW'> / |dW| |dW'|``."""
    norms = {name: math.sqrt(each.inner(each)) for name, each in done.parts.items()}
    parts = [
        _sizes(each)
        | {
            "name": name,
            "norm": norms[name],
            "cosine": {
                other: each.inner(done.parts[other]) / (norms[name] * norms[other] or math.inf) for other in norms
            },
        }
        for name, each in done.parts.items()
    ]
    result = _sizes(done.adapter) | {"norm": math.sqrt(max(0.0, done.adapter.inner(done.adapter)))}
    return {"parts": parts, "result": result, "cuts": done.cuts, "sha256": done.adapter.sha256}


def _sizes(adapter: Adapter) -> dict[str, Any]:
    from lorica.targets import names

    keys = [target.key for target in adapter.targets]
    return {
        "ranks": sorted({adapter.method.rank_of(key) for key in keys}),
        "scales": sorted({adapter.method.scale_of(key) for key in keys}),
        "targets": names(str(target) for target in adapter.targets),
        "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
    }


def _say(facts: dict[str, Any]) -> None:
    from lorica.cli.terminal import say, size, table

    parts, result = facts["parts"], facts["result"]
    others = [part["name"] for part in parts] if len(parts) > 1 else []
    rows = [
        [each["name"], _span(each["ranks"]), _span(each["scales"]), f"{each['norm']:.4g}"]
        + [f"{each['cosine'][other]:.3f}" if "cosine" in each else "" for other in others]
        for each in [*parts, {"name": "result"} | result]
    ]
    table(["adapter", "r", "scale", "||dW||", *(f"cos {other}" for other in others)], rows)
    say(f"targets    {result['targets']}")
    for cut, share in facts["cuts"].items():
        say(f"cut        {share:.2%} of the energy, by {cut}")
    if "bytes" in facts:
        what = f"{result['parameters']:,} parameters, {size(facts['bytes'])} in {facts['dtype']}"
        say(f"wrote      {facts['composed']}: {what}")
        say(f"next:  {facts['next']}")
    else:
        say(f"would be   {result['parameters']:,} parameters; nothing was written")


def _span(values: list[float]) -> str:
    return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"
