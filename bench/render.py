"""Render the results that `bench/*.py --json` left in bench/results into docs/bench.md, README and the variants' page.

python bench/train.py --json > bench/results/train-e2e.json
python bench/render.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from measure import judged

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "bench.md"
README = HERE.parent / "README.md"
VARIANTS = HERE.parent / "docs" / "methods-variants.md"
DIGITS = {"nats": 3, "s": 2}  # of a number in this unit; else 1
UNITS = {"train cost": "s", "plan": "GB", "classify": "%", "variants": "nats"}  # else tok/s
PICTURES = {
    "plan": "![predicted against measured peaks](plan.png)",
    "train cost": "![seconds of an update against rank, tokens per row and rows](cost.png)",
}


def main() -> None:
    """Write one section per file of results, README's table, and that of the variants."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    parts = [
        "# Measurements",
        "",
        "Written by `bench/render.py` from `bench/results`; every section's script is in `bench`.",
    ]
    parts.append("")
    for report in reports.values():
        parts += section(report)
    OUT.write_text("\n".join(parts).rstrip() + "\n")
    if headline := reports.get("train-e2e"):
        put(README, "bench", short(headline))
    if compared := reports.get("variants"):
        put(VARIANTS, "variants", rates(compared))


def put(page: Path, name: str, lines: list[str]) -> None:
    """Write lines between the marks of a block of a page."""
    block = "\n".join([f"<!-- {name} -->", *lines, f"<!-- /{name} -->"])
    page.write_text(re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _: block, page.read_text(), flags=re.DOTALL))


def rates(report: dict[str, Any]) -> list[str]:
    """The variants' losses at each rate with the first seed, and at their best one with all, beside LoRA's."""
    settings, results = report["settings"], report["results"]
    factors, mean = settings["factors"], results["lora"]["mean"]
    head = ["variant", "default rate", *(f"{factor:g} times" for factor in factors), "best, all seeds", "less LoRA"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in results.items():
        losses = [f"{row['losses'][f'{factor:.2g} seed 0']:.3f}" for factor in factors]
        best = f"{row['mean']:.3f} ({row['min']:.3f} to {row['max']:.3f})"
        cells = [name, f"{row['default_lr']:.2g}", *losses, best, f"{row['mean'] - mean:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{settings['model']}, {settings['steps']} updates of {settings['batch']} E2E rows, r={settings['r']}, "
    about += f"nats per token on {settings['held']} held-out rows, {settings['seeds']} seeds; the base "
    return [*lines, "", f"{about}{results['lora']['base']:.3f}. {report['machine']['date']}."]


def short(report: dict[str, Any]) -> list[str]:
    """README's table: every contender's speed and memory, with the machine."""
    machine, settings = report["machine"], report["settings"]
    lines = ["| | tokens/s | peak memory |", "|---|---|---|"]
    rows = {name: row for name, row in report["results"].items() if "peak_bytes" in row}
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["median"]):
        lines.append(f"| {name.replace('_', ' ')} | {row['median']:.0f} | {row['peak_bytes'] / 1e9:.2f} GB |")
    about = f"{settings['model']}, r={settings['r']} on all linear layers, E2E rows, {settings['batch']} rows a step, "
    about += f"{machine['cores']} cores of {cpu(machine)}, {machine['date']}; real tokens, medians of "
    return [*lines, "", f"{about}{settings['repeats']} interleaved runs."]


def cpu(machine: dict[str, Any]) -> str:
    """The processor, and what it multiplies bf16 with: machines of one name differ most in that."""
    has = next((name for name in ("amx_bf16", "avx512_bf16") if name in machine["capabilities"]), "no bf16")
    return f"{machine['cpu']} ({has})"


def section(report: dict[str, Any]) -> list[str]:
    """Heading, machine, contenders and ratios of one report."""
    machine = report["machine"]
    unit = UNITS.get(report["bench"]) or UNITS.get(report["bench"].split()[0], "tok/s")
    digits = DIGITS.get(unit, 1)
    libraries = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    lines = [
        f"## {report['bench']}",
        "",
        f"{machine['date']}, {cpu(machine)}, {machine['cores']} cores{gpu}. {libraries}.",
        "",
    ]
    lines += [f"Settings: {', '.join(f'{key} {value}' for key, value in report['settings'].items())}.", ""]
    lines += plans(report["results"]) if report["bench"] == "plan" else contenders(report["results"], unit, digits)
    if picture := PICTURES.get(report["bench"]):
        lines += ["", picture]
    lines += ["", "| ratio | measured | target | |", "|---|---|---|---|"]
    targets = {name: tuple(target) for name, target in report["targets"].items()}
    for name, ratio, target, good in judged(report["ratios"], targets):
        lines.append(f"| {name} | {ratio:.3f} | {target} | {'reached' if good else 'short'} |")
    lines += [f"| {name} | {ratio:.3f} | | |" for name, ratio in report["ratios"].items() if name not in targets]
    lines += ["", *(f"- {note}" for note in report["notes"])] if report.get("notes") else []
    return [*lines, ""]


def contenders(results: dict[str, Any], unit: str, digits: int) -> list[str]:
    """The table of what was compared."""
    lines = [f"| contender | median {unit} | min to max | repeats | peak memory |", "|---|---|---|---|---|"]
    for name, row in results.items():
        if "skipped" in row:
            lines.append(f"| {name} | skipped: {row['skipped']} | | | |")
            continue
        memory = f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else ""
        span = f"{row['min']:.{digits}f} to {row['max']:.{digits}f}"
        own = f" {row['unit']}" if "unit" in row else ""
        lines.append(f"| {name} | {row['median']:.{digits}f}{own} | {span} | {row['repeats']} | {memory} |")
    return lines


def plans(results: dict[str, Any]) -> list[str]:
    """The table of peaks: measured, planned from the config alone, and in the header of the training itself."""
    lines = ["| setting | measured GB | planned | error | header | error |", "|---|---|---|---|---|---|"]
    for name, row in results.items():
        if "skipped" in row:
            lines.append(f"| {name} | skipped: {row['skipped']} | | | | |")
            continue
        header = f"{row['header']:.2f} | {row['header_error']:+.1%}" if row["header"] else "none | "
        lines.append(f"| {name} | {row['median']:.2f} | {row['plan']:.2f} | {row['error']:+.1%} | {header} |")
    return lines


if __name__ == "__main__":
    main()
