"""`lorica doctor`: this machine and this install, made for pasting into a report of a fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorica.cli.parse import Common


@dataclass(kw_only=True)
class Settings(Common):
    """Show versions, device, memory, extras and caches; train, merge, save and load an adapter on a tiny model."""

    device: str = "auto"
    """Where to run: auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Number format of the run: auto (bf16 where the device computes it natively, else fp32), fp32, bf16, fp16."""


def run(settings: Settings) -> int | dict[str, Any]:
    """Print the report; 1 where the small run failed."""
    from lorica.cli.terminal import say
    from lorica.models.examine import examine, selftest

    report = examine(settings.device)
    report["selftest"] = selftest(settings.device, settings.dtype)
    if settings.json:
        return report
    for label, text in lines(report):
        say(f"{label:<12}{text}".rstrip())
    return 0 if report["selftest"]["ok"] else 1


def lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report as a person reads it: (label, facts)."""
    versions, machine, tested = report["versions"], report["machine"], report["selftest"]
    cache, hub, builtin = (report["caches"][key] for key in ("lorica", "hub", "builtin"))
    yield "lorica", f"{versions['lorica']}   python {versions['python']}   {machine['system']}"
    rest = [f"{name} {version}" for name, version in versions.items() if name not in ("lorica", "python")]
    yield "packages", "   ".join(rest)
    yield "device", f"{machine['device']}   bf16 {'yes' if machine['bf16'] else 'no'}   auto dtype {machine['dtype']}"
    for index, gpu in enumerate(machine.get("gpus", ())):
        yield f"cuda:{index}", f"{gpu['name']}   {_size(gpu['memory'])}   cuda {machine['cuda']}"
    yield "cores", f"{machine['cores']}   torch threads {machine['threads']}"
    yield "memory", f"{_size(machine['memory'])}   free {_size(machine['memory_free'])}"
    yield "disk", f"free {_size(machine['disk_free'])}"
    for extra, missing in report["extras"].items():
        install = f'missing {", ".join(missing)}: pip install "lorica[{extra}]"' if missing else "installed"
        yield "extra", f"{extra}   {install}"
    yield "pip", "found" if report["pip"] else "missing, so no built-in model can be fetched: python -m ensurepip"
    here = ", ".join(alias for alias, there in builtin.items() if there)
    yield "cache", f"{cache['path']}   {_size(cache['bytes'])}   built in: {here or 'none yet'}"
    yield "hub", f"{hub['path']}   {_size(hub['bytes'])}   token {'found' if hub['token'] else 'none'}"
    yield "self-test", f"{', '.join(tested['steps'])}: {_outcome(tested)}"
    yield "next", "lorica quickstart" if tested["ok"] else "report the lines above, with what you ran"


def _outcome(tested: dict[str, Any]) -> str:
    if tested["ok"]:
        return f"ok in {tested['seconds']:.1f} s ({tested['dtype']})"
    step, fault = next((step, fault) for step, fault in tested["steps"].items() if fault != "ok")
    return f"{step} FAILED ({tested['dtype']}): {fault}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
