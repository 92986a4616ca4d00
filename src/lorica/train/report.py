"""A training on the terminal: a header, a table that grows, samples, a line of progress. Plain lines elsewhere.

`Terminal` is a `report` for `train`: it is called with the events that metrics.jsonl and samples.jsonl hold.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROWS = 20
SHOWN_LABELS = 8
_HEADINGS = ("step", "loss", "held out", "lr", "tok/s", "memory", "left")
_WIDTHS = (7, 8, 9, 9, 9, 9, 7)


def header(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What will happen, as (label, text). `facts` are those of `setup.facts`, with `run` where there is a folder."""
    held = f"{facts['held_out']:,} held out"
    if facts["held_out_all"] > facts["held_out"]:
        held += f" (of {facts['held_out_all']:,})"
    source = Path(facts["data"]).name or "examples"
    return [
        ("model", f"{facts['model']}   {number(facts['parameters'])} {facts['dtype']}   {facts['device']}"),
        ("data", f"{source}   {facts['train']:,} train, {held}"),
        *(_labels(facts)),
        (
            "method",
            f"{facts['method']} {facts['detail']},"
            f"{_layers(facts)} {number(facts['trainable'])} ({facts['share']:.2%}),"
            f" {size(facts['adapter_bytes'])}",
        ),
        ("steps", f"{facts['steps']:,} = {facts['epochs']:g} epochs, {facts['batch']:,} examples each"),
        ("lr", f"{facts['lr']:g} {facts['schedule']}   {facts['lr_from']}   seed {facts['seed']}"),
        *(planned(facts)),
        *((("out", facts["run"]),) if "run" in facts else ()),
        *(("note", note) for note in facts["notes"]),
    ]


def _layers(facts: Mapping[str, Any]) -> str:
    return f" {facts['layers']:,} layers," if facts["layers"] else ""


def _labels(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The task and, of classes, the share of each; those of many that are rarest are counted only."""
    if facts.get("task", "lm") == "lm":
        return []
    counts = {name: count for name, count in facts["labels"].items() if count is not None}
    shares = [f"{_visible(name)} {count / facts['train']:.0%}" for name, count in counts.items()]
    more = [f"and {len(shares) - SHOWN_LABELS} more"] if len(shares) > SHOWN_LABELS else []
    return [("task", "   ".join([facts["task"], ", ".join([*shares[:SHOWN_LABELS], *more])]).rstrip())]


def planned(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What memory and time were forecast, as a line of the header; none where nobody asked."""
    if not facts.get("predicted_bytes"):
        return [("plan", f"none: {facts['no_plan']}")] if facts.get("no_plan") else []
    kept = ", activations computed again" if facts["checkpointing"] else ""
    took = f", about {duration(facts['predicted_seconds'])} of updates" if facts["predicted_seconds"] else ""
    return [("plan", f"{size(facts['predicted_bytes'])} of {size(facts['available_bytes'])}{took}{kept}")]


def show_header(console: Console, title: str, facts: Mapping[str, Any]) -> None:
    """Print the header: a box on a terminal, lines elsewhere."""
    lines = [f"{label:<8}{text}" for label, text in header(facts)]
    if console.is_terminal:
        box = Panel(escape("\n".join(lines)), title=title, title_align="left", expand=False)
        console.print(box, soft_wrap=False)
    else:
        for line in lines:
            _line(console, line)


class Terminal:
    """Prints the events of one training to a console. Use as a context, so that its live line goes away."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._clear()

    def __enter__(self) -> Terminal:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event; kinds that have nothing to show are passed over."""
        if show := getattr(self, f"_{event['kind']}", None):
            show(event)

    def _start(self, event: Mapping[str, Any]) -> None:
        show_header(self.console, "lorica train", event)
        if event["first"]:
            _line(self.console, f"continuing after step {event['first']:,}")
        self.facts, self.first, self.began = event, event["first"], time.monotonic()
        self.task = self.progress.add_task("training", total=event["steps"], completed=event["first"])
        _line(self.console, _row(_HEADINGS))

    def _step(self, event: Mapping[str, Any]) -> None:
        self.loss += event["loss"] * event["labels"]
        self.labels += event["labels"]
        self.tokens += event["tokens"]
        self.seconds += event["seconds"]
        self.last = event
        self.progress.update(self.task, completed=event["step"])
        step, steps = event["step"], self.facts["steps"]
        if self._measures(step):
            self.progress.update(self.task, description="measuring")
        elif step % max(1, steps // ROWS) == 0:
            self._print("", "")

    def _eval(self, event: Mapping[str, Any]) -> None:
        known = {"kind", "step", "held_out", "best", "elapsed", "member"}
        measured = [f"{name} {value:.3f}" for name, value in event.items() if name not in known]
        mark = "".join(f"  {text}" for text in [*measured, *(["* best"] if event["best"] else [])])
        self._print(f"{event['held_out']:.3f}", mark, event["step"])
        self.sampled = False
        self.progress.update(self.task, description="training")

    def _note(self, event: Mapping[str, Any]) -> None:
        _line(self.console, f"note    {event['text']}")

    def _sample(self, event: Mapping[str, Any]) -> None:
        # One of them keeps the table readable; all are in samples.jsonl.
        if self.sampled:
            return
        self.sampled = True
        prompt, text = (_visible(" ".join(event[key].split())) for key in ("prompt", "text"))
        _line(self.console, f"{'':>9}> {_tail(prompt, 60)}  ->  {text[:100]}")

    def _measures(self, step: int) -> bool:
        due = step % self.facts["eval_every"] == 0 or step == self.facts["steps"]
        return bool(self.facts["held_out"]) and due

    def _print(self, held: str, mark: str, step: int = 0) -> None:
        """One row: means over the updates since the last row."""
        if not self.labels:
            _line(self.console, _row((f"{step:,}", "", held, "", "", "", "")) + mark)
            return
        last = self.last
        remaining = self.facts["steps"] - last["step"]
        pace = (time.monotonic() - self.began) / max(1, last["step"] - self.first)
        row = (
            f"{last['step']:,}",
            f"{self.loss / self.labels:.3f}",
            held,
            f"{last['lr']:.1e}",
            f"{self.tokens / self.seconds:,.0f}",
            size(last["memory"]),
            duration(remaining * pace) if remaining else "done",
        )
        _line(self.console, _row(row) + mark)
        self._clear()

    def _clear(self) -> None:
        self.loss, self.labels, self.tokens, self.seconds = 0.0, 0, 0, 0.0


def number(count: int) -> str:
    """596M, 5.0M, 12k."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 100 * unit else 0}f}{name}"
    return str(count)


def size(count: int) -> str:
    """4.1 GB, 20 MB, 3.0 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 10 * unit else 0}f} {name}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """1h04, 1m24, 9 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 60}m{whole % 60:02d}" if whole >= 60 else f"{whole} s"


def _row(cells: tuple[str, ...]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _visible(text: str) -> str:
    """Control codes spelled out: what a model writes is not to steer the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else "..." + text[-length:]


def _line(console: Console, text: str) -> None:
    # The text of models may look like markup, and a table is not to be broken at 80 columns in a log file.
    console.print(text, markup=False, highlight=False, soft_wrap=True)
