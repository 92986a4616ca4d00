"""Render the results that `bench/*.py --json` left in bench/results into docs/bench.md.

python bench/train.py --json > bench/results/train-e2e.json
python bench/render.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measure import judged

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "bench.md"
UNITS = {"train": "tok/s", "many": "tok/s", "plan": "GB"}


def main() -> None:
    """Write one section per file of results."""
    parts = [
        "# Measurements",
        "",
        "Written by `bench/render.py` from `bench/results`; each section says how to repeat it.",
        "",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        parts += section(json.loads(path.read_text()))
    OUT.write_text("\n".join(parts).rstrip() + "\n")


def section(report: dict[str, Any]) -> list[str]:
    """Heading, machine, contenders and ratios of one report."""
    machine = report["machine"]
    unit = UNITS[report["bench"].split()[0]]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"## {report['bench']}",
        "",
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores. {libraries}.",
        "",
    ]
    lines += [f"Settings: {', '.join(f'{key} {value}' for key, value in report['settings'].items())}.", ""]
    lines += [f"| contender | median {unit} | min to max | repeats | peak memory |", "|---|---|---|---|---|"]
    for name, row in report["results"].items():
        if "skipped" in row:
            lines.append(f"| {name} | skipped: {row['skipped']} | | | |")
            continue
        memory = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
        span = f"{row['min']:.1f} to {row['max']:.1f}"
        lines.append(f"| {name} | {row['median']:.1f} | {span} | {row['repeats']} | {memory} |")
    lines += ["", "| ratio | measured | target | |", "|---|---|---|---|"]
    targets = {name: tuple(target) for name, target in report["targets"].items()}
    for name, ratio, target, good in judged(report["ratios"], targets):
        lines.append(f"| {name} | {ratio:.2f} | {target} | {'reached' if good else 'short'} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
