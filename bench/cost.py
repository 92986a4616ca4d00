"""What an update costs against rank, sequence length and rows: `train.py --workload cost`."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import child, machine, summary

HERE = Path(__file__).parent
# (what grows, its values, rank, tokens per row, rows per update), None standing for what grows.
PANELS = (
    ("rank", (1, 4, 16, 64), None, 128, 4),
    ("tokens per row", (128, 256, 512, 1024, 2048, 4096), 8, None, 1),
    ("rows per update", (1, 4, 16, 64), 8, 64, None),
)


def run(options: argparse.Namespace) -> None:
    """Measure every point, print, draw."""
    from lorica.models.loading import locate

    folder = str(locate(options.model))
    results: dict[str, Any] = {}
    for what, values, *fixed in PANELS:
        for value in values:
            rank, length, rows = (value if each is None else each for each in fixed)
            seconds = [_seconds(folder, rank, length, rows, options) for _ in range(options.repeats)]
            results[f"{what} {value}"] = summary(seconds) | {"rank": rank, "tokens": length * rows}
            print(f"{what} {value}: {results[f'{what} {value}']['median']:.2f} s", file=sys.stderr, flush=True)
    report = {
        "bench": "train cost", "settings": {"model": options.model, "dtype": "fp32", "repeats": options.repeats},
        "machine": machine(), "results": results, "ratios": _ratios(results), "targets": {}, "floor": {},
    }  # fmt: skip
    if options.plot:
        _draw(report, Path(options.plot))
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, row in results.items():
        print(f"  {name:24} {row['median']:8.2f} s   {row['tokens'] / row['median']:7.0f} tok/s")
    for name, ratio in report["ratios"].items():
        print(f"  {name:44} {ratio:6.2f}")


def _seconds(folder: str, rank: int, length: int, rows: int, options: argparse.Namespace) -> float:
    """Seconds of an update of `rows` rows of `length` random tokens, half of them labelled."""
    draw = random.Random(0)
    every = [[[draw.randrange(1000, 40000) for _ in range(length)], length // 2] for _ in range(rows)]
    steps = 3 if length * rows < 2048 else 2
    work = {"model": folder, "rows": every, "batch": rows, "warm": 1, "batches": [list(range(rows))] * steps}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "work.json"
        path.write_text(json.dumps(work))
        arguments = [f"lorica_fp32_{rank}", str(path)]
        told = child(sys.executable, HERE / "contenders.py", arguments, options.timeout, {"HF_HUB_OFFLINE": "1"})
    if "skipped" in told:
        raise RuntimeError(told["skipped"])
    return length * rows / told["tokens_per_second"]


def _ratios(results: dict[str, Any]) -> dict[str, float]:
    """Cost over what a straight line through the origin would have, from one end of a panel to the other."""
    found = {}
    for what, values, *_ in PANELS:
        first, last = (results[f"{what} {value}"] for value in (values[0], values[-1]))
        grown = last["tokens"] / first["tokens"]
        found[f"{what} {values[0]} to {values[-1]}, cost per token"] = last["median"] / first["median"] / grown
    return found


def _draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.4), sharey=False)
    for axis, (what, values, *_) in zip(axes, PANELS, strict=True):
        rows = [report["results"][f"{what} {value}"] for value in values]
        axis.plot(values, [row["median"] for row in rows], "o-", label="measured")
        line = [rows[0]["median"] * row["tokens"] / rows[0]["tokens"] for row in rows]
        axis.plot(values, line, "--", color="0.6", label="in proportion to tokens")
        axis.set(xlabel=what, ylabel="seconds per update", xscale="log", yscale="log", title=what)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        seen = [*line, *(row["median"] for row in rows)]
        axis.set_ylim(10 ** math.floor(math.log10(min(seen))), 10 ** math.ceil(math.log10(max(seen))))
    axes[-1].legend(frameon=False)
    about = report["machine"]
    figure.suptitle(f"{report['settings']['model']}, fp32, {about['cores']} cores, {about['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit("run it as: python bench/train.py --workload cost")
