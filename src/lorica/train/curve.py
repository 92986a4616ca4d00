"""The picture of one or more runs: training and held-out loss against updates, from metrics.jsonl alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError
from lorica.files import write_atomic
from lorica.train import folder

# Okabe and Ito's palette, told apart by people with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")  # where there are more runs than colours
FEW = 3  # runs whose training losses, legend and all fit into one frame
FORMATS = (".png", ".svg", ".pdf")


def draw(runs: Sequence[str | Path], out: str | Path) -> None:
    """Draw the curves of `runs` (folders) to `out`, a .png, .svg or .pdf.

    LoricaError if matplotlib is missing, a folder is no run, or a run has no update yet.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise LoricaError(f"{out}: a picture is written as {', '.join(FORMATS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise LoricaError('curves need matplotlib: pip install "lorica[plot]"') from missing
    logs = {Path(run): folder.read_log(Path(run) / folder.METRICS) for run in runs}
    if empty := [str(run) for run, log in logs.items() if not _of(log, "step")]:
        raise LoricaError(f"no update yet in {', '.join(empty)}")
    few = len(logs) <= FEW
    figure = Figure(figsize=(7.2, 4.2) if few else (9.6, max(4.2, 0.22 * len(logs))), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for place, (run, log) in enumerate(logs.items()):
        turn, colour = divmod(place, len(COLOURS))
        name = f"{run.resolve().name} " if len(logs) > 1 else ""
        _one(axes, log, COLOURS[colour], STYLES[turn % len(STYLES)], name, few)
    axes.set(xlabel="update", ylabel="loss (nats per token)", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    beside: dict[str, Any] = {} if few else {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(frameon=False, fontsize=9 if few else 7, **beside)
    axes.set_title(_title(logs), loc="left", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:])
    write_atomic(out, picture.getvalue())


def _one(axes: Any, log: list[dict[str, Any]], colour: str, style: str, name: str, few: bool) -> None:
    """One run; `name` is empty where it is the only one, and each update is then shown too.

    Among more than a few, the training loss is shown only where nothing was measured.
    """
    steps, losses = zip(*((event["step"], event["loss"]) for event in _of(log, "step")), strict=True)
    if not name:
        axes.plot(steps, losses, color="#d5d5d5", linewidth=0.7)
    measured = _of(log, "eval")
    if few or not measured:
        shade = {"color": colour if name else "#666666", "linewidth": 1.1, "linestyle": style, "alpha": 0.8}
        axes.plot(steps, _smooth(losses), label=f"{name}training", **shade)
    if not measured:
        return
    best = [event for event in measured if event["best"]][-1:]
    label = f"{name}held out" + "".join(f", best {event['held_out']:.3f}" for event in best)
    steps, losses = zip(*((event["step"], event["held_out"]) for event in measured), strict=True)
    mark = {"marker": "o", "markersize": 4, "clip_on": False}
    axes.plot(steps, losses, color=colour, linewidth=1.8, linestyle=style, label=label, **mark)
    for event in best:
        ring = {"markersize": 9, "markerfacecolor": "white", "markeredgewidth": 1.8, "zorder": 3}
        axes.plot([event["step"]], [event["held_out"]], color=colour, marker="o", **ring)


def _title(logs: dict[Path, list[dict[str, Any]]]) -> str:
    if len(logs) > 1:
        return f"{len(logs)} runs"
    (run, log), *_ = logs.items()
    facts = next(iter(_of(log, "start")), {})
    model = Path(facts.get("model", "")).name
    return f"{run.resolve().name}   {model}   {_method(facts)}, lr {facts.get('lr')}"


def _method(facts: dict[str, Any]) -> str:
    return f"rank {facts['rank']}, {facts.get('targets')}" if "rank" in facts else str(facts.get("method"))


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average over about a twentieth of the run, unbiased from the first value on."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth


def _of(log: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in log if event["kind"] == kind]
