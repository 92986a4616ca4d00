"""`lorica show X`: what is in this model, adapter, run, or folder of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tyro

from lorica.cli.parse import Common
from lorica.errors import visible


@dataclass(kw_only=True)
class Settings(Common):
    """Show what X is: sizes, targets, ranks and scales, faults, and the line that serves it."""

    thing: tyro.conf.Positional[str]
    """A model, an adapter, a run, or a folder of adapters."""
    norms: bool = False
    """Load the base model of an adapter too, and show how large its updates are beside the matrices."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Look and print."""
    from lorica.inspect import inspect

    found = inspect(settings.thing, settings.norms)
    if settings.json:
        return found
    {"model": _model, "adapter": _adapter, "run": _run, "folder": _folder}[found["kind"]](_printable(found))
    return 0


def _printable(found: Any) -> Any:
    """The facts with each text as a terminal may have it: names come from the files."""
    if isinstance(found, dict):
        return {key: _printable(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_printable(value) for value in found]
    return visible(found) if isinstance(found, str) else found


def _model(found: dict[str, Any]) -> None:
    from lorica.cli.terminal import say, size

    say(f"model      {found['title']}   {found['class']}")
    say(f"size       {found['parameters']:,} parameters, {size(found['bytes'])} in {found['dtype']}")
    say(f"targets    {found['layers']}")
    if found["slices"]:
        say(f"slices     of {', '.join(found['slices'])}, as in {found['slices'][0]}[q,v]")
    say(f"next:  lorica train {found['name']} DATA")


def _adapter(found: dict[str, Any], next_line: bool = True) -> None:
    from lorica.cli.terminal import say, size

    say(f"adapter    {_method(found)}   on {found['base'] or 'an unnamed base'}")
    if found["targets"]:
        say(f"targets    {found['targets']}")
    if found["beside"]:
        shown = found["beside"][:3]
        say(f"beside     {', '.join(shown)}{' ...' if len(found['beside']) > 3 else ''}")
    say(f"size       {found['parameters']:,} parameters, {size(found['file_bytes'])}")
    if norms := found.get("norms"):
        say(f"||dW||/||W||  median {norms['median']:.3g}   max {norms['max']:.3g} at {norms['max_at']}")
    dead = found["dead"]
    say(f"dead       {f'{len(dead)}: {dead[0]} ...' if dead else 'none'} (updates that are zero)")
    vllm = found["vllm"]
    say(f"serve it   {vllm['line'] if 'line' in vllm else 'not with vLLM: ' + vllm['refused']}")
    if next_line:
        merge = "" if found.get("unmergeable") else f"      lorica merge {found['path']} -o merged"
        say(f"next:  lorica chat {found['path']}{merge}")


def _method(found: dict[str, Any]) -> str:
    if "ranks" not in found:
        return f"{found['method']}: {found['detail']}"
    ranks, scales = _several(found["ranks"]), _several(found["scales"])
    return f"{found['method']}, r {ranks}, alpha {found['alpha']:g} (x{scales})"


def _run(found: dict[str, Any]) -> None:
    from lorica.cli.terminal import say

    settings, result = found["settings"], found["result"]
    say(f"run        {found['path']}   {'finished' if found['finished'] else 'not finished'}")
    say(f"trained    {settings.get('model', 'a model in memory')} on {settings.get('data', 'data in memory')}")
    if result:
        held = "nothing held out"
        if result.get("after") is not None:
            held = f"held out {result['before']:.3f} -> {result['after']:.3f}"
        say(
            f"result     {held}   best step {result['best_step']:,} of {result['steps']:,}   {result['seconds']:,.0f} s"
        )
    if found["adapter"]:
        _adapter(found["adapter"], next_line=False)
    then = "chat" if found["finished"] else "train --resume"
    say(f"next:  lorica {then} {found['path']}")


def _folder(found: dict[str, Any]) -> None:
    from lorica.cli.terminal import say, size, table

    rows = [
        [
            row["name"],
            "yes",
            row["base"] or "-",
            row["method"],
            _several(row["ranks"]) if row["ranks"] else "-",
            size(row["bytes"]),
            row["fault"] or "-",
        ]
        if row["loads"]
        else [row["name"], "no", "-", "-", "-", "-", " ".join(row["fault"].split())]
        for row in found["adapters"]
    ]
    table(["adapter", "loads", "base", "method", "r", "size", "faults"], rows)
    say(f"next:  lorica show {found['path']}/{found['adapters'][0]['name']}")


def _several(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
