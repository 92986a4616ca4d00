"""What every bench needs: contenders in processes of their own, in turn; the machine; ratios against targets.

The object that a bench prints with --json has `settings`, `machine`, `results` (a row per contender: median, min, max,
repeats, and its `unit` where that is another one), `ratios`, `targets` (the same names: bound and sense), `floor`, and
`notes` where there is more to say.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

DATA = Path(os.environ.get("LORICA_DATA", Path(__file__).parents[2] / "shared" / "data"))
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "unsloth", "unsloth_zoo", "bitsandbytes", "lorica")


def interleaved(
    calls: Mapping[str, Callable[[], dict[str, Any]]], repeats: int, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Run every contender once, then again, `repeats` times; what fails is not run again and says why."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name, call in calls.items():
            if any("skipped" in each for each in found[name]):
                continue
            began = time.monotonic()
            found[name].append(call())
            told = found[name][-1].get("skipped") or f"{found[name][-1].get('tokens_per_second', 0):.1f} tok/s"
            say(f"{turn + 1}/{repeats} {name:24} {told}   ({time.monotonic() - began:.0f} s)")
    return found


def child(
    python: str, script: Path, arguments: Sequence[str], timeout: float, env: Mapping[str, str]
) -> dict[str, Any]:
    """The last line that a process prints, as JSON; {"skipped": reason} if it fails."""
    try:
        done = subprocess.run(
            [python, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"} | dict(env),
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"skipped": f"exit {done.returncode}: {reason[:200]}"}
    return json.loads(lines[-1])


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Median, min, max and number of repeats."""
    every = sorted(values)
    return {"median": statistics.median(every), "min": every[0], "max": every[-1], "repeats": len(every)}


def peak(dtype: str, shapes: Sequence[tuple[int, int, int]], seconds: float = 0.6) -> float:
    """FLOP/s of the fastest of some matrix products ``[m, k] x [k, n]``, each the median over a time.

    The median and not the best single call: what a clock that boosts for a millisecond reaches, no training keeps up.
    """
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    best = 0.0
    for m, k, n in shapes:
        x, w = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)
        times: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 5:
            began = time.perf_counter()
            torch.nn.functional.linear(x, w)
            times.append(time.perf_counter() - began)
        best = max(best, 2 * m * k * n / statistics.median(times[1:]))
    return best


def machine() -> dict[str, Any]:
    """Cores, processor, memory, number formats and versions."""
    import psutil
    import torch

    about = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in about.read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cores": torch.get_num_threads(),
        "cpu": names[0] if names else platform.processor(),
        "memory_bytes": psutil.virtual_memory().total,
        "capabilities": sorted(key for key, value in torch.cpu.get_capabilities().items() if value is True),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def judged(ratios: Mapping[str, float], targets: Mapping[str, tuple[str, float]]) -> list[tuple[str, float, str, bool]]:
    """``(name, ratio, target, reached)`` of every ratio that has a target and was measured."""
    found = []
    for name, (sense, bound) in targets.items():
        if name in ratios:
            good = ratios[name] >= bound if sense == ">=" else ratios[name] <= bound
            found.append((name, ratios[name], f"{sense} {bound:g}", good))
    return found


def show(report: Mapping[str, Any], unit: str) -> None:
    """The tables of a report, for people."""
    for name, row in report["results"].items():
        if "skipped" in row:
            print(f"  {name:36} skipped: {row['skipped']}")
            continue
        memory = f"{row['peak_bytes'] / 1e9:6.2f} GB" if "peak_bytes" in row else ""
        span = f"{row['min']:.1f} to {row['max']:.1f} in {row['repeats']}"
        print(f"  {name:36} {row['median']:9.1f} {row.get('unit', unit)}   {span:28} {memory}")
    targets = {name: tuple(target) for name, target in report["targets"].items()}
    for name, ratio, target, good in judged(report["ratios"], targets):
        print(f"  {name:58} {ratio:8.3f}   {target:8} {'ok' if good else 'short'}")
    for note in report.get("notes", []):
        print(f"  {note}")


def finish(report: Mapping[str, Any], as_json: bool, unit: str) -> None:
    """Print one object, or tables."""
    if as_json:
        json.dump(report, sys.stdout, indent=1)
        print()
    else:
        show(report, unit)
